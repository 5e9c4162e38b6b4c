"""The main path: bad updates are left out, sums ask weights first, several passes read the old policy, the best is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small import PARITY, UNLESS_HARD, demonstrations, lines, same, small_run, weights

from posttrain import score
from posttrain.errors import ConfigError, NumericsError
from posttrain.evaluation.accuracy import Evaluation, Outcome
from posttrain.method import Method, Optimizer, Part, Sum
from posttrain.methods import GRPO, PPO, SFT, ReLIFT
from posttrain.models.load import load
from posttrain.reads import logprob
from posttrain.run import train
from posttrain.samplers.native import NativeSampler
from posttrain.state import load_state
from posttrain.types import Batch, Readings, Row, State, View
from posttrain.wiring import Cursor


@dataclass(frozen=True, kw_only=True)
class Breaks(Method):
    """Imitation whose loss is no number in some steps."""

    at: tuple[int, ...] = ()

    def views(self) -> dict[str, View]:
        return {"policy": View(reads=(logprob,))}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, torch.Tensor]:
        factor = float("nan") if state.step in self.at else 1.0
        return {"loss": -seen.policy.logprob * factor}


# --------------------------------------------------------------------------------------------------------------
# Updates that must not be made.


def test_a_non_finite_update_is_left_out_and_named(small_model: Path, tmp_path: Path) -> None:
    """Skipping step 1 is the same as never having had it, but for the place in the data."""
    with pytest.warns(UserWarning, match=r"step 1: the gradient of 'policy/.*' is not finite"):
        train(small_run(Breaks(at=(1,)), small_model, tmp_path / "run", save_every=1))
    steps = lines(tmp_path / "run")
    assert [step["skipped_updates"] for step in steps] == [0.0, 1.0, 0.0, 0.0]
    replay = json.loads((tmp_path / "run/replay/step-00000001-1.json").read_text())
    assert replay["first_non_finite"].startswith("policy/")
    rows = replay["parts"][0]["tokens"]
    assert len(rows) == 2
    assert all(isinstance(token, int) for row in rows for token in row)
    saved = load_state(tmp_path / "run/state")
    assert saved is not None
    assert saved.values["updates"] == {"": 3}
    assert all(bool(torch.isfinite(value).all()) for value in saved.tensors.values())


def test_a_skipped_update_leaves_weights_and_moments(small_model: Path, tmp_path: Path) -> None:
    train(small_run(Breaks(), small_model, tmp_path / "one/run", steps=1))
    with pytest.warns(UserWarning, match="not finite"):
        train(small_run(Breaks(at=(1,)), small_model, tmp_path / "two/run", steps=2))
    states = [load_state(tmp_path / name / "run/state") for name in ("one", "two")]
    assert states[0] is not None
    assert states[1] is not None
    assert same(states[0].tensors, states[1].tensors)


def test_too_many_in_a_row_stop_the_run(small_model: Path, tmp_path: Path) -> None:
    run = small_run(Breaks(at=(0, 2, 3, 4)), small_model, tmp_path / "run", steps=6, max_skipped=3)
    with pytest.warns(UserWarning, match="not finite"), pytest.raises(NumericsError, match=r"step 4: .* 3 updates in a row"):
        train(run)
    assert len(lines(tmp_path / "run")) == 4
    replays = sorted(path.name for path in (tmp_path / "run/replay").iterdir())
    assert replays == [f"step-{step:08d}-{n}.json" for step, n in ((0, 1), (2, 1), (3, 2), (4, 3))]


# --------------------------------------------------------------------------------------------------------------
# Sums.


def late(state: State) -> float:
    """Nothing in the first two steps."""
    return 0.0 if state.step < 2 else 0.5


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps in which the sampler was called."""
    calls: list[int] = []
    real = NativeSampler.sample

    def sample(self: NativeSampler, prompts: Sequence[Any], **options: Any) -> Any:
        calls.append(options["step"])
        return real(self, prompts, **options)

    monkeypatch.setattr(NativeSampler, "sample", sample)
    return calls


def test_a_part_that_weighs_nothing_is_neither_sampled_nor_read(
    small_model: Path, tmp_path: Path, drawn: list[int]
) -> None:
    members = {"sft": Part(method=SFT(), data="answers"), "rl": Part(method=GRPO(), weight=late, data="questions")}
    data = {"answers": demonstrations(6), "questions": demonstrations(4)}
    train(small_run(Sum(members=members), small_model, tmp_path / "run", data=data))
    assert drawn == [2, 3]
    steps = lines(tmp_path / "run")
    assert [any(key.startswith("rl/") for key in step) for step in steps] == [False, False, True, True]
    assert all("sft/loss" in step for step in steps)
    saved = load_state(tmp_path / "run/state")
    assert saved is not None
    assert saved.values["taken"] == {"answers": 8, "questions": 4}


def test_a_weight_below_zero_is_refused(small_model: Path, tmp_path: Path) -> None:
    part = Part(method=SFT(), weight=lambda state: -1.0)
    with pytest.raises(ConfigError, match=r"-1.0 at step 0"):
        train(small_run(Sum(members={"sft": part}), small_model, tmp_path / "run"))


def test_a_sum_of_halves_is_the_whole(small_model: Path, tmp_path: Path) -> None:
    """Two parts of weight 1/2 on the same rows give the gradient of one part of weight 1."""
    data = {name: demonstrations() for name in ("one", "two")}
    members = {name: Part(method=SFT(), weight=0.5, data=name) for name in data}
    exact: dict[str, Any] = {"dtype": "float64", "steps": 2}
    train(small_run(Sum(members=members), small_model, tmp_path / "sum", data=data, **exact))
    train(small_run(SFT(), small_model, tmp_path / "plain", **exact))
    whole = weights(tmp_path / "plain/model")
    for name, tensor in weights(tmp_path / "sum/model").items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-9, rtol=0)


def moments(out: Path, optimizer: str) -> dict[str, torch.Tensor]:
    """An optimiser's moments in the last save."""
    saved = load_state(out / "state")
    assert saved is not None
    prefix = f"optimizer:{optimizer}:"
    return {name.removeprefix(prefix): value for name, value in saved.tensors.items() if name.startswith(prefix)}


def test_parts_with_their_own_optimizers_keep_their_own_moments(small_model: Path, tmp_path: Path) -> None:
    """With a rate of 0 the second part moves no weight, so the first must run as if it were alone."""
    members = {"one": Part(method=SFT()), "two": Part(method=SFT(), data="two", optimizer=Optimizer(lr=0.0))}
    data = {"one": demonstrations(), "two": demonstrations(5)}
    train(small_run(Sum(members=members), small_model, tmp_path / "both/run", data=data))
    train(small_run(SFT(), small_model, tmp_path / "alone/run"))
    assert same(weights(tmp_path / "both/run/model"), weights(tmp_path / "alone/run/model"))
    shared, own = moments(tmp_path / "both/run", ""), moments(tmp_path / "both/run", "two")
    assert same(shared, moments(tmp_path / "alone/run", ""))
    assert own.keys() == shared.keys()
    assert not same(own, shared)


def test_relift_without_imitation_is_the_rl_trainer(small_model: Path, tmp_path: Path) -> None:
    """A buffer that never fills reduces to RL exactly; imitation steps never touch RL's moments."""
    common: dict[str, Any] = {"rewards": (UNLESS_HARD,), "samples_per_prompt": 2, "steps": 5}

    def trained(out: str, **options: Any) -> Path:
        train(small_run(ReLIFT(max_tokens=8, **options), small_model, tmp_path / out / "run", **common))
        return tmp_path / out / "run"

    never, huge = trained("never", buffer_size=-1), trained("huge", buffer_size=10_000)
    still = trained("still", buffer_size=1, study_lr=0.0)  # imitates with a rate of 0: weights follow RL alone
    assert any("sft/loss" in step for step in lines(still))
    assert not any("sft/loss" in step for step in lines(huge))
    for other in (huge, still):
        assert same(weights(other / "model"), weights(never / "model"))
        assert same(moments(other, ""), moments(never, ""))
    assert moments(still, "sft")


# --------------------------------------------------------------------------------------------------------------
# Several updates of one batch, and what is read for them.


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The views that were read once, one entry a pass."""
    seen: list[set[str]] = []
    real = score.read

    def read(models: Any, batch: Batch, views: Mapping[str, View], **options: Any) -> Readings:
        seen.append(set(views))
        return real(models, batch, views, **options)

    monkeypatch.setattr(score, "read", read)
    return seen


def test_four_updates_read_the_old_policy_and_clip(small_model: Path, tmp_path: Path, read_once: list[set[str]]) -> None:
    hot = Optimizer(lr=3e-2)
    train(small_run(GRPO(), small_model, tmp_path / "run", updates=4, steps=2, optimizer=hot))
    assert all({"old", "reference"} <= views for views in read_once)
    assert len(read_once) >= 2
    steps = lines(tmp_path / "run")
    assert all(step["clip_fraction"] > 0 for step in steps)
    saved = load_state(tmp_path / "run/state")
    assert saved is not None
    assert saved.values["updates"] == {"": 8}


def test_one_update_takes_the_old_policy_from_the_live_one(
    small_model: Path, tmp_path: Path, read_once: list[set[str]]
) -> None:
    """The same weights give the same numbers, so the pass is spared and nothing is clipped."""
    train(small_run(GRPO(), small_model, tmp_path / "run", updates=1, steps=2))
    assert all("old" not in views for views in read_once)
    assert all(step["clip_fraction"] == 0 for step in lines(tmp_path / "run"))


def test_the_critic_learns_and_the_reference_does_not(small_model: Path, tmp_path: Path) -> None:
    train(small_run(PPO(), small_model, tmp_path / "run", minibatches=2))
    saved = load_state(tmp_path / "run/state")
    assert saved is not None
    learnt = {name.split("/")[0].removeprefix("weights:") for name in saved.tensors if name.startswith("weights:")}
    assert learnt == {"policy", "critic"}
    assert saved.values["updates"] == {"": 8}
    assert bool((saved.tensors["weights:critic/heads.value.weight"] != 0).any())


def test_the_sampler_agrees_with_the_trainer(small_model: Path, tmp_path: Path) -> None:
    """One forward for both: log-probabilities differ by float error, before and after updates."""
    train(small_run(GRPO(), small_model, tmp_path / "run"))
    assert max(step["logprob_gap_max"] for step in lines(tmp_path / "run")) < 1e-4


# --------------------------------------------------------------------------------------------------------------
# Evaluation.


def test_the_best_by_evaluation_is_kept(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation says 0.2, 0.6, 0.6, 0.1 after steps 1 to 4: the first of the best is step 2."""
    said = iter([0.2, 0.6, 0.6, 0.1])
    real = Evaluation.of

    def of(self: Evaluation, *args: Any, **options: Any) -> Outcome:
        found = real(self, *args, **options)
        return Outcome([{**found.numbers[0], "value": next(said)}, *found.numbers[1:]], found.records)

    monkeypatch.setattr(Evaluation, "of", of)
    evaluation = Evaluation(task="sums", rows=demonstrations(3), rewards=(PARITY,), max_tokens=4)
    run = small_run(SFT(), small_model, tmp_path / "run", evaluate_every=1, evaluation=evaluation)
    result = train(run)
    assert result.best == tmp_path / "run/best"
    manifest = json.loads((tmp_path / "run/best/manifest.json").read_text())
    assert manifest["fields"]["inputs"]["step"] == 2
    values = [row["evaluation"] for row in lines(tmp_path / "run") if "evaluation" in row]
    assert values == [0.2, 0.6, 0.6, 0.1]

    other = small_run(SFT(), small_model, tmp_path / "two", steps=2)
    train(other)
    assert same(weights(tmp_path / "run/best"), weights(tmp_path / "two/model"))
    model, _ = load(tmp_path / "run/best")
    assert model.num_layers == 2


def test_what_is_saved_opens_with_transformers(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(small_run(SFT(), small_model, tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(str(result.model))
    tokenizer = AutoTokenizer.from_pretrained(str(result.model))
    ids = tokenizer("What is 2?", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (*ids.shape, len(tokenizer))


# --------------------------------------------------------------------------------------------------------------
# The order of rows.


def test_rows_come_as_they_stand_where_nothing_is_shuffled(small_model: Path, tmp_path: Path) -> None:
    """A curriculum is an order; by default an epoch's order is drawn."""
    rows: list[Row] = [{"id": str(number)} for number in range(6)]
    assert [row["id"] for row in Cursor(rows, 0, shuffle=False).next(8)] == list("01234501")
    drawn = [row["id"] for row in Cursor(rows, 0).next(12)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list("012345")
    assert drawn[:6] != drawn[6:]
    wanted = demonstrations()
    places = [int(row["id"]) for row in Cursor([{"id": str(place)} for place in range(len(wanted))], 0).next(len(wanted))]
    laid = [wanted[places.index(place)] for place in range(len(wanted))]  # so that the drawn order gives them as wanted
    train(small_run(SFT(), small_model, tmp_path / "one", data=wanted, shuffle=False))
    train(small_run(SFT(), small_model, tmp_path / "other", data=laid))
    assert same(weights(tmp_path / "one/model"), weights(tmp_path / "other/model"))
