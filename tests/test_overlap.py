"""Judging goes on beside sampling where that pays, and changes nothing but the time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from small import lines, same, small_run, weights

from posttrain import scoring
from posttrain.methods import GRPO
from posttrain.rewards import Reward, load_reward
from posttrain.run import Run, train
from posttrain.samplers.native import NativeSampler
from posttrain.types import Sample, State

METRIC = "overlap/judged_ahead"


@pytest.fixture
def reward(tmp_path: Path) -> Reward:
    """A reward that notes which answers it judges, 1 for half of all answers, and that fails on a few."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def f(answer):\n"
        f"    with open({str(tmp_path / 'judged')!r}, 'a') as log:\n        log.write(f'{{answer.group}} {{answer.index}}\\n')\n"
        "    if answer.text.encode()[:1] < b'(':\n        raise ValueError('poison')\n"
        "    return float(sum(answer.text.encode()) % 2)\n"
    )
    return load_reward(f"{file}:f")


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


def run_with(reward: Reward, model: Path, out: Path, **changes: Any) -> Run:
    return small_run(GRPO(), model, out, rewards=(reward,), max_failure_rate=0.9, steps=4, **changes)


def test_overlap_changes_no_weight_no_verdict_and_no_metric(
    small_model: Path, tmp_path: Path, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, pays in (("with", 0.0), ("without", math.inf)):
        monkeypatch.setattr(scoring, "PAYS", pays)
        train(run_with(reward, small_model, tmp_path / name / "run"))
    found = lines(tmp_path / "with/run")
    ahead = [line.pop(METRIC, None) for line in found]
    assert ahead[:2] == [None, None], "the first two steps are measured"
    assert all(share is not None and 0 <= share <= 1 for share in ahead[2:])
    assert found == lines(tmp_path / "without/run")
    assert any(line["reward_failures"] > 0 for line in found), "failures are part of what is compared"
    assert lines(tmp_path / "with/run", "samples.jsonl") == lines(tmp_path / "without/run", "samples.jsonl")
    assert same(weights(tmp_path / "with/run/model"), weights(tmp_path / "without/run/model"))
    for line in lines(tmp_path / "without/run"):
        assert METRIC not in line


def test_the_first_answer_is_judged_before_the_last_is_written(
    small_model: Path, tmp_path: Path, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler waits at its last answer until the worker has begun on one of the same step."""
    monkeypatch.setattr(scoring, "PAYS", 0.0)
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
    assert seen == [2, 3]
    shares = [line.get(METRIC) for line in lines(tmp_path / "run")]
    assert all(share is not None and share > 0 for share in shares[2:])


def test_a_sampler_that_fails_midway_leaves_no_thread_and_no_worker(
    small_model: Path, tmp_path: Path, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PAYS", 0.0)

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

    for name, pays in (("with", 0.0), ("without", math.inf)):
        monkeypatch.setattr(scoring, "PAYS", pays)
        train(small_run(Regroups(), small_model, tmp_path / name / "run", rewards=(reward,), max_failure_rate=0.9))
    found = lines(tmp_path / "with/run")
    ahead = [line.pop(METRIC, 0.0) for line in found]
    assert max(ahead) <= 0.5, "two of four answers were changed"
    assert found == lines(tmp_path / "without/run")
    assert same(weights(tmp_path / "with/run/model"), weights(tmp_path / "without/run/model"))
    assert any(line["signal"] > 0 for line in found), "what was judged moved the weights"
    assert "mine" in (tmp_path / "judged").read_text()
