"""Judging goes on beside sampling where that pays, and changes nothing but the time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from small import lines, same, small_run, weights

from posttrain.methods import GRPO
from posttrain.rewards import Reward, load_reward
from posttrain.rewards.runner import Singles
from posttrain.run import Run, train
from posttrain.samplers.native import NativeSampler
from posttrain.scoring import EVERY, PAYS, Overlap
from posttrain.types import Sample, State

METRIC = "overlap/judged_ahead"


@pytest.fixture
def reward(tmp_path: Path) -> Reward:
    """A reward that notes which answers it judges, 1 for half of all answers, and that fails on a few."""
    file = tmp_path / "mine.py"
    (tmp_path / "judged").touch()
    file.write_text(
        "def f(answer):\n"
        f"    with open({str(tmp_path / 'judged')!r}, 'a') as log:\n        log.write(f'{{answer.group}} {{answer.index}}\\n')\n"
        "    if answer.text.encode()[:1] < b'(':\n        raise ValueError('poison')\n"
        "    return float(sum(answer.text.encode()) % 2)\n"
    )
    return load_reward(f"{file}:f")


def shares(out: Path) -> list[float | None]:
    """Of each step: how many of its judgements were ready when they were asked for."""
    return [json.loads(line).get(METRIC) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tapped(monkeypatch: pytest.MonkeyPatch, tap: Callable[[int, int], None]) -> None:
    """Call `tap(step, number of answers told so far)` before each answer that is told; in steps that overlap only."""
    real = NativeSampler.sample

    def sample(self: NativeSampler, prompts: Sequence[Sample], **options: Any) -> list[Sample]:
        done, told = options.pop("done"), []

        def tell(answer: Sample) -> None:
            tap(options["step"], len(told))
            told.append(answer)
            done(answer)

        return real(self, prompts, **options, done=tell if done is not None else None)

    monkeypatch.setattr(NativeSampler, "sample", sample)


def always(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlap every step, or none."""
    monkeypatch.setattr(Overlap, "pays", lambda self: pays)


def run_with(reward: Reward, model: Path, out: Path, **changes: Any) -> Run:
    return small_run(GRPO(), model, out, rewards=(reward,), max_failure_rate=0.9, steps=4, **changes)


def test_overlap_changes_no_weight_no_verdict_and_no_metric(
    small_model: Path, tmp_path: Path, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, pays in (("with", True), ("without", False)):
        always(pays, monkeypatch)
        train(run_with(reward, small_model, tmp_path / name / "run"))
    assert all(share is not None and 0 <= share <= 1 for share in shares(tmp_path / "with/run"))
    assert shares(tmp_path / "without/run") == [None] * 4
    found = lines(tmp_path / "with/run")
    assert found == lines(tmp_path / "without/run")
    assert any(line["reward_failures"] > 0 for line in found), "failures are part of what is compared"
    assert lines(tmp_path / "with/run", "samples.jsonl") == lines(tmp_path / "without/run", "samples.jsonl")
    assert same(weights(tmp_path / "with/run/model"), weights(tmp_path / "without/run/model"))


def test_the_first_answer_is_judged_before_the_last_is_written(
    small_model: Path, tmp_path: Path, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler waits at its last answer until the worker has begun on one of the same step."""
    always(True, monkeypatch)
    seen = []

    def tap(step: int, told: int) -> None:
        if told < 7:
            return
        end = time.monotonic() + 60
        while f"{step}/" not in (tmp_path / "judged").read_text():
            assert time.monotonic() < end, "no answer was judged while the sampler wrote"
            time.sleep(0.01)
        seen.append(step)

    tapped(monkeypatch, tap)
    train(run_with(reward, small_model, tmp_path / "run"))
    assert seen == [0, 1, 2, 3]
    assert all(share is not None and share > 0 for share in shares(tmp_path / "run"))


def test_a_sampler_that_fails_midway_leaves_no_thread_and_no_worker(
    small_model: Path, tmp_path: Path, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(True, monkeypatch)

    def tap(step: int, told: int) -> None:
        if (step, told) == (3, 5):
            raise KeyboardInterrupt

    tapped(monkeypatch, tap)
    threads, children = threading.active_count(), set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt):
        train(run_with(reward, small_model, tmp_path / "run"))
    assert threading.active_count() == threads
    assert set(psutil.Process().children(recursive=True)) == children
    monkeypatch.undo()
    train(run_with(reward, small_model, tmp_path / "run"))
    train(run_with(reward, small_model, tmp_path / "undisturbed"))
    assert same(weights(tmp_path / "run/model"), weights(tmp_path / "undisturbed/model"))


def test_a_method_that_changes_its_samples_is_judged_on_what_it_returns(
    small_model: Path, tmp_path: Path, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Regroups(GRPO):
        """Drops the first group, and gives the answers of the second another group and another text."""

        def experience(self, sampler: Any, rows: Any, state: State) -> list[Sample]:
            written = [sample for sample in sampler.rollout(rows) if not sample.group.endswith("/0")]
            return [s.with_(group="mine", tokens=[*s.tokens[:-1], s.tokens[-1] ^ 1]) for s in written[:2]] + written[2:]

    for name, pays in (("with", True), ("without", False)):
        always(pays, monkeypatch)
        train(small_run(Regroups(), small_model, tmp_path / name / "run", rewards=(reward,), max_failure_rate=0.9))
    assert all(share is not None and share <= 0.5 for share in shares(tmp_path / "with/run")), "two of four were changed"
    found = lines(tmp_path / "with/run")
    assert found == lines(tmp_path / "without/run")
    assert same(weights(tmp_path / "with/run/model"), weights(tmp_path / "without/run/model"))
    assert any(line["signal"] > 0 for line in found), "what was judged moved the weights"
    assert "mine" in (tmp_path / "judged").read_text()


# --------------------------------------------------------------------------------------------------------------
# When it pays.


class Clock:
    """Stands where a runner does, and tells what it is told of the time in workers."""

    def __init__(self) -> None:
        self.overlap = Overlap((), None, self)  # type: ignore[arg-type]
        self.singles = Singles()

    def settle(self) -> Singles:
        return self.singles

    def step(self, *, worker: float, total: float = 2.0, tokens: int = 100, judged: int = 4) -> bool:
        """One step that samples for a second; was it overlapped?"""
        overlapped = self.overlap.pays()
        self.singles = Singles(judged=judged, ahead=1, seconds=worker)
        self.overlap.settle(num_tokens=tokens, sample_seconds=1.0, score_seconds=total - 1.0)
        return overlapped


def test_slow_rewards_are_overlapped_after_two_steps_and_quick_ones_never() -> None:
    slow, quick, start = Clock(), Clock(), Clock()
    assert [slow.step(worker=2 * PAYS) for _ in range(5)] == [False, False, True, True, True]
    assert [quick.step(worker=PAYS / 2) for _ in range(5)] == [False] * 5
    assert [start.step(worker=9.0 if step == 0 else 0.0) for step in range(5)] == [False] * 5
    assert slow.overlap.metrics == {"overlap/judged_ahead": 0.25}
    assert quick.overlap.metrics == {}


def test_a_step_without_judgements_says_nothing() -> None:
    clock = Clock()
    given = [clock.step(worker=w, judged=j) for w, j in [(1.0, 4), (0.0, 0), (1.0, 4), (1.0, 4)]]
    assert given == [False, False, False, True]


def test_overlap_that_makes_a_token_dearer_is_given_up_and_tried_again_later() -> None:
    clock = Clock()
    costs = {False: 2.0, True: 3.0}
    chosen = [clock.step(worker=1.0, total=costs[clock.overlap.pays()]) for _ in range(EVERY)]
    assert chosen == [False, False, True, True] + [False] * (EVERY - 6) + [True, True]
    costs[True] = 1.0  # the sampler has got cores of its own
    chosen = [clock.step(worker=1.0, total=costs[clock.overlap.pays()]) for _ in range(EVERY)]
    assert not any(chosen[: EVERY - 2])
    assert all(clock.step(worker=1.0, total=1.0) for _ in range(EVERY - 2))


def test_longer_answers_are_not_held_against_it() -> None:
    clock = Clock()
    assert not clock.step(worker=1.0, total=2.0, tokens=100)
    assert not clock.step(worker=1.0, total=2.0, tokens=100)
    assert all(clock.step(worker=1.0, total=6.0, tokens=400) for _ in range(10))
