"""The lines of a run: whole, without NaN, the same after a kill, and no reason for a run to end."""

from __future__ import annotations

import json
import os
import resource
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from posttrain.report.journal import Journal, chosen, reward_counts
from posttrain.report.trackers import TensorBoard, WandB, open_trackers
from posttrain.types import InfraError, Origin, Sample, Score


def letters(tokens: list[int]) -> str:
    return "".join(chr(token) for token in tokens)


def sample(index: int, text: str = "ab\u2028c") -> Sample:
    tokens = [ord("?"), ord("!"), *(ord(letter) for letter in text)]
    origin = [int(Origin.SYSTEM), int(Origin.USER)] + [int(Origin.POLICY)] * len(text)
    verdicts = {"exact": Score(0.5, reason="half"), "judge": InfraError(reason="no answer")}
    return Sample(
        tokens=tokens, origin=origin, trained=[o == 5 for o in origin], index=index, reward=0.5, verdicts=verdicts
    )


def lines(path: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").split("\n")[:-1]]


def write(folder: Path, start: int, stop: int, *, resume_step: int | None) -> None:
    with Journal(folder, resume_step=resume_step) as journal:
        for step in range(start, stop):
            journal.step(step, {"reward": step / 7, "loss": -step}, rewards=[0.0, 1.0, step])
            journal.samples(step, [sample(step), sample(step + 1)], letters)


def test_a_line_holds_the_step_without_nan(tmp_path: Path) -> None:
    with Journal(tmp_path / "grpo", resume_step=None) as journal:
        journal.step(0, {"loss": float("nan"), "kl": float("inf"), "n": 3}, phases={"sample": 1.25, "other": 0.5})
    assert lines(tmp_path / "grpo" / "metrics.jsonl") == [
        {"step": 0, "stage": "grpo", "loss": None, "kl": None, "n": 3, "time/sample": 1.25, "time/other": 0.5}
    ]


def test_a_sample_is_text_with_its_verdicts(tmp_path: Path) -> None:
    with Journal(tmp_path, resume_step=None, stage="s") as journal:
        journal.samples(4, [sample(9)], letters)
    assert lines(tmp_path / "samples.jsonl") == [
        {
            "step": 4,
            "stage": "s",
            "index": 9,
            "group": "",
            "prompt": "?!",
            "completion": "ab\u2028c",
            "reward": 0.5,
            "verdicts": {
                "exact": {"verdict": "score", "value": 0.5, "reason": "half"},
                "judge": {"verdict": "infraerror", "reason": "no answer"},
            },
            "finish": "stop",
            "origins": {"policy": 4, "system": 1, "user": 1},
        }
    ]


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 7, "rew', b'{"step": 7}', b"\x00\xff{{{", b'\n\nnull\n{"step": "x"}\n']
)
@pytest.mark.parametrize("resume_step", [0, 1, 5, 7])
def test_a_resumed_run_leaves_the_files_of_an_undisturbed_one(tmp_path: Path, torn: bytes, resume_step: int) -> None:
    write(tmp_path / "a" / "s", 0, 10, resume_step=None)
    write(tmp_path / "b" / "s", 0, 7, resume_step=None)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / "b" / "s" / name).open("ab") as file:
            file.write(torn)
    write(tmp_path / "b" / "s", resume_step, 10, resume_step=resume_step)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "b" / "s" / name).read_bytes() == (tmp_path / "a" / "s" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "b" / "s").iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_lines_are_there_before_the_journal_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, resume_step=None)
    journal.step(0, {"loss": 1.0})
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    journal.close()


def test_a_new_run_sets_the_old_lines_aside(tmp_path: Path) -> None:
    write(tmp_path, 0, 3, resume_step=None)
    write(tmp_path, 0, 1, resume_step=None)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    assert len(lines(tmp_path / "metrics.jsonl.old")) == 3


def test_a_full_disk_is_said_once_and_catches_up(tmp_path: Path) -> None:
    """The limit on a file's size makes writes short and then fail, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path, resume_step=None, stage="s") as journal:
        journal.step(0, {"loss": 0.0})
        whole = (tmp_path / "metrics.jsonl").stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 10, hard))
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for step in range(1, 5):
                    journal.step(step, {"loss": float(step)})
            content = (tmp_path / "metrics.jsonl").read_bytes()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(said) == 1
        assert "The run goes on" in str(said[0].message)
        assert str(tmp_path) in str(said[0].message)
        assert content.endswith(b"\n"), "the torn piece of line 1 is taken back"
        assert len(content) == whole
        journal.step(5, {"loss": 5.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_disk_without_any_room_does_not_end_the_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path, resume_step=None)
    assert journal._metrics._file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._metrics._file)
    os.close(full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        journal.step(0, {"loss": 0.0})
    journal.step(1, {"loss": 0.0})
    journal.close()


def test_samples_are_chosen_by_place_alone() -> None:
    samples = [sample(index) for index in range(10)]
    assert [kept.index for kept in chosen(samples, 4)] == [0, 2, 5, 7]
    assert chosen(samples, None) == samples
    assert chosen(samples, 99) == samples
    assert chosen(samples, 0) == []


def test_rewards_are_counted_or_binned() -> None:
    assert reward_counts([1.0, 0.0, 1.0, float("nan")]) == [[0.0, 1], [1.0, 2]]
    many = reward_counts([index / 1000 for index in range(1000)])
    assert len(many) == 24
    assert sum(count for _, count in many) == 1000
    assert [value for value, _ in many] == sorted(value for value, _ in many)


def test_negative_resume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        Journal(tmp_path, resume_step=-1)


class Failing:
    """A tracker whose service is down from the second step on."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.seen.append(step)
        if step:
            raise ConnectionError("service is down")

    def close(self) -> None:
        raise ConnectionError("service is down")


def test_a_failing_tracker_is_dropped_with_one_warning(tmp_path: Path) -> None:
    tracker = Failing()
    with Journal(tmp_path, resume_step=None, trackers=[tracker]) as journal:
        journal.step(0, {"loss": 0.0})
        with pytest.warns(RuntimeWarning, match="service is down"):
            journal.step(1, {"loss": 0.0})
        journal.step(2, {"loss": 0.0})
    assert tracker.seen == [0, 1]
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensorboard"):
        open_trackers(["tensorbord"], tmp_path)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Journal(tmp_path, resume_step=None, trackers=[TensorBoard(tmp_path / "tb")]) as journal:
        for step in range(3):
            journal.step(step, {"loss": step / 2, "kl": float("nan")})
    found = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert "kl" not in found.Tags()["scalars"]


def test_wandb_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Journal(tmp_path, resume_step=None, trackers=[WandB("p", "n", folder=tmp_path)]) as journal:
        journal.step(0, {"loss": 0.5})
    assert (tmp_path / "wandb_id.txt").read_text()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
