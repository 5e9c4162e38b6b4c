"""Edges of the plumbing: nothing to train, equal rewards, parts that step later, what is remembered and watched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import PARITY, UNLESS_HARD, demonstrations, lines, same, small_run

from posttrain.errors import ConfigError, DataError
from posttrain.method import Part, Sum
from posttrain.methods import DFT, GRPO, KTO, PPO, RLOO, SASR, SFT, ReLIFT
from posttrain.models.load import load
from posttrain.pack import pack
from posttrain.rewards import Reward
from posttrain.run import train
from posttrain.types import Origin, Sample, State


def constant(value: float | None) -> Reward:
    """The same for every answer; None is no verdict at all."""
    return Reward("constant", lambda answer: value, where="inline")


def untouched(out: Path, model: Path) -> bool:
    """Are the final weights those of the start?"""
    before, after = (dict(load(folder)[0].weights()) for folder in (model, out / "model"))
    return same(before, after)


@pytest.mark.parametrize("method", [RLOO(), PPO(), GRPO()])
def test_where_every_reward_fails_nothing_is_trained(method: Any, small_model: Path, tmp_path: Path) -> None:
    samples = 1 if isinstance(method, PPO) else 4
    train(
        small_run(
            method, small_model, tmp_path / "run", rewards=(constant(None),), samples_per_prompt=samples, steps=2,
            max_failure_rate=1.0,
        )
    )  # fmt: skip
    assert [step["reward_failures"] for step in lines(tmp_path / "run")] == [1.0, 1.0]
    assert untouched(tmp_path / "run", small_model)


@pytest.mark.parametrize("value", [0.1, 0.5, 0.7])
def test_equal_rewards_move_nothing(value: float, small_model: Path, tmp_path: Path) -> None:
    """Not the KL term either: 0.7 has a spread in float32 that is rounding alone."""
    train(small_run(GRPO(beta=0.5), small_model, tmp_path / "run", rewards=(constant(value),), samples_per_prompt=7, steps=2))
    assert untouched(tmp_path / "run", small_model)


@pytest.mark.parametrize("alone", [False, True])
def test_the_old_policy_is_that_of_the_samples(
    alone: bool, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that steps after another has its old log-probabilities read before that other step."""
    gaps: list[float] = []
    real = GRPO.loss

    def loss(self: GRPO, batch: Any, seen: Any, state: State) -> Any:
        gaps.append(float((seen.old.logprob - batch.logprobs)[batch.mask].abs().max()))
        return real(self, batch, seen, state)

    monkeypatch.setattr(GRPO, "loss", loss)
    members = {"sft": Part(method=SFT(), data="answers"), "rl": Part(method=GRPO(beta=0.0), data="questions", alone=alone)}
    data = {"answers": demonstrations(6), "questions": demonstrations(4)}
    train(small_run(Sum(members=members), small_model, tmp_path / "run", data=data, dtype="float64"))
    assert gaps
    assert max(gaps) < 1e-9


def test_two_sampling_parts_draw_and_report_apart(small_model: Path, tmp_path: Path) -> None:
    members = {"one": Part(method=GRPO(beta=0.0)), "two": Part(method=GRPO(beta=0.0))}
    train(small_run(Sum(members=members), small_model, tmp_path / "run", steps=1))
    step = lines(tmp_path / "run")[0]
    assert {"one/reward", "two/reward"} <= step.keys()
    assert "reward" not in step
    indices = [row["index"] for row in lines(tmp_path / "run", "samples.jsonl") if "index" in row]
    assert len(indices) == len(set(indices))


def test_a_sum_takes_plain_methods() -> None:
    with pytest.raises(ConfigError, match=r"'a' is a SASR, which has parts of its own"):
        Sum(members={"a": Part(method=SASR())})


def test_norms_that_are_not_finite_are_not_remembered(small_model: Path, tmp_path: Path) -> None:
    """SASR's switch compares norms: one that is no number would leave it practising for ever."""
    from posttrain.session import Session

    seen: list[dict[str, Any]] = []
    real = SASR.remember
    try:
        SASR.remember = lambda self, state, batch, metrics: seen.append(dict(metrics)) or real(self, state, batch, metrics)  # type: ignore[assignment, func-returns-value]
        run = small_run(SASR(warmup=2), small_model, tmp_path / "run", rewards=(PARITY,), steps=1)
        with Session.open(run) as session:
            phases = session.phases()
            ready = session.credit(session.score(session.experience(phases), phases), phases)
            session.remember(ready, {"sft/gradient_norm": math.nan, "sft/loss": 1.0})
    finally:
        SASR.remember = real  # type: ignore[method-assign]
    assert seen == [{"sft/loss": 1.0}]
    assert session.memory["last"] == 0.0


def test_a_row_waits_once_in_relifts_buffer(small_model: Path, tmp_path: Path) -> None:
    from posttrain.state import load_state

    hopeless = [dict(row, hard=True) for row in demonstrations(2)]
    method = ReLIFT(max_tokens=8, buffer_size=100)
    train(small_run(method, small_model, tmp_path / "run", data=hopeless, rewards=(UNLESS_HARD,), steps=4))
    saved = load_state(tmp_path / "run/state")
    assert saved is not None
    memory: Any = saved.values["memory"]
    assert sorted(row["id"] for row in memory["buffer"]) == ["sum-0", "sum-1"]


def test_validation_reads_rows_as_training_does(small_model: Path, tmp_path: Path) -> None:
    """Bad answers are bad there too, and a loss that falls where likelihood falls does not choose the best weights."""
    bad = [dict(row, label=False) for row in demonstrations()]
    train(
        small_run(
            KTO(beta=0.5), small_model, tmp_path / "kto", data=bad, validation=bad, evaluate_every=4, steps=4,
            prompts_per_step=8,
        )
    )  # fmt: skip
    found = [row for row in lines(tmp_path / "kto") if "validation/loss" in row]
    assert found[-1]["validation/loss"] < 0.5
    train(small_run(DFT(), small_model, tmp_path / "dft", validation=demonstrations()[-2:], evaluate_every=2, steps=4))
    assert all(row["validation/nll"] > 0 for row in lines(tmp_path / "dft") if "validation/loss" in row)


def test_validation_of_answers_that_are_sampled_is_refused(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GRPO samples, so validation rows have no loss"):
        small_run(GRPO(), small_model, tmp_path / "run", validation=demonstrations(), evaluate_every=1)


def test_a_column_that_some_samples_lack_is_refused_in_any_order() -> None:
    plain = Sample(tokens=[5, 6], origin=[Origin.USER, Origin.DEMONSTRATION], trained=[False, True])
    marked = replace(plain, columns={"margin": 1.0})
    for samples in ([plain, marked], [marked, plain]):
        with pytest.raises(DataError, match="margin"):
            pack(samples)


def test_answers_that_leave_no_room_for_a_prompt_are_refused(small_model: Path, tmp_path: Path) -> None:
    from posttrain.types import Sampling

    with pytest.raises(ConfigError, match=r"max_tokens is 128 and the model's context has 128 tokens"):
        train(small_run(GRPO(), small_model, tmp_path / "run", sampling=Sampling(max_tokens=128)))


def test_moments_come_back_where_the_optimizer_wants_them(small_model: Path, tmp_path: Path) -> None:
    from posttrain.method import Optimizer
    from posttrain.step import Stepper

    parameter = torch.nn.Parameter(torch.ones(2))
    stepper = Stepper(Optimizer(lr=0.1), {"w": parameter}, 3)
    parameter.grad = torch.ones(2)
    stepper.clip_and_step(1.0)
    again = Stepper(Optimizer(lr=0.1), {"w": parameter}, 3)
    again.restore(stepper.tensors(), stepper.updates)
    parameter.grad = torch.ones(2)
    again.clip_and_step(1.0)
    assert float(again.tensors()["w:step"]) == 2.0
    assert again.tensors()["w:step"].device == parameter.device
