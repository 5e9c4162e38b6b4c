"""What a stage writes while it runs: `metrics.jsonl`, one line a step, and `samples.jsonl`, the samples worth reading.

An interrupted and resumed run leaves the same two files as an undisturbed one, except for times.  No file is worth a
run: when the disk is full, one warning says so, the lines wait in memory, and the run goes on.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError
from posttrain.files import atomic_write
from posttrain.report.lines import decode, encode
from posttrain.report.names import PHASE

if TYPE_CHECKING:
    from posttrain.report.trackers import Tracker
    from posttrain.types import Sample, Verdict

WAITING = 4096
"""Lines of one file that wait in memory for room on a full disk; beyond it the oldest are given up."""

BINS = 24
"""Distinct rewards of a step that are counted each for itself; more are counted in as many bins."""


class Journal:
    """The lines of one stage.

    `metrics.jsonl`: `{"step", "stage", <metric>: number or null, ..., "time/<phase>": seconds,
    "reward_counts": [[reward, count]]}`.

    `samples.jsonl`: `{"step", "stage", "index", "group", "prompt", "completion", "reward", "verdicts", "finish",
    "origins"}`.

    Args:
        folder: The stage's folder; made when missing.
        resume_step: The first step that will be done (again); lines of it and of later steps are dropped, and so is a
            torn line.  None: a new run; what an earlier one left is set aside as `metrics.jsonl.old` and
            `samples.jsonl.old`.
        stage: Name in every line; by default the folder's.
        trackers: Further receivers of the numbers, such as `trackers.TensorBoard`.

    Raises:
        ConfigError: `resume_step` is negative.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Journal(folder, resume_step=None, stage="sft") as journal:
        ...     journal.step(0, {"loss": 0.5, "kl": float("nan")}, phases={"update": 0.2, "other": 0.1})
        ...     print((journal.folder / "metrics.jsonl").read_text().strip())
        {"step": 0, "stage": "sft", "loss": 0.5, "kl": null, "time/update": 0.2, "time/other": 0.1}
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume_step: int | None,
        stage: str | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        if resume_step is not None and resume_step < 0:
            raise ConfigError(f"resume_step is {resume_step}: expected the first step to do, at least 0, or None for a new run")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stage = self.folder.name if stage is None else stage
        self._trackers = list(trackers)
        self._metrics = _Lines(self.folder / "metrics.jsonl", resume_step)
        self._samples = _Lines(self.folder / "samples.jsonl", resume_step)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        phases: Mapping[str, float] | None = None,
        rewards: Sequence[float] | None = None,
    ) -> None:
        """Write the line of one step.

        Args:
            step: Number of the step that was done, from 0.
            metrics: Name -> number (see `names.METRICS`); non-finite ones are written as null.
            phases: Seconds by phase, `other` included.
            rewards: All rewards of the step, for the distribution on the page; only their counts are kept.
        """
        times = {PHASE + name: round(seconds, 6) for name, seconds in (phases or {}).items()}
        row: dict[str, Any] = {"step": step, "stage": self.stage, **metrics, **times}
        if rewards:
            row["reward_counts"] = reward_counts(rewards)
        self._metrics.write(encode(row))
        numbers = {name: value for name, value in {**metrics, **times}.items() if isinstance(value, (int, float))}
        for tracker in list(self._trackers):
            try:
                tracker.log(step, numbers)
            except Exception as error:  # a dashboard's failure is never the run's
                self._trackers.remove(tracker)
                _warn(f"{type(tracker).__name__} failed ({error}) and gets no more numbers; metrics.jsonl is still written.")

    def samples(
        self, step: int, samples: Sequence[Sample], decode: Callable[[list[int]], str], *, count: int | None = None
    ) -> None:
        """Write samples of one step as text.

        Args:
            step: Number of the step, from 0.
            samples: In the order of the step.
            decode: Tokens to text, such as `Renderer.decode`; special tokens should be shown.
            count: How many to keep, spread evenly over `samples` whatever their reward; None keeps all.
        """
        for sample in chosen(samples, count):
            self._samples.write(encode({"step": step, "stage": self.stage, **described(sample, decode)}))

    def close(self) -> None:
        """Close the files and the trackers; what waits for room on the disk is tried once more."""
        self._metrics.close()
        self._samples.close()
        for tracker in self._trackers:
            with contextlib.suppress(Exception):
                tracker.close()
        self._trackers.clear()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def chosen(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """`count` samples spread evenly over the step, chosen by their place alone and so without regard to the reward."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[place * len(samples) // count] for place in range(count)]


def described(sample: Sample, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """A sample as JSON values: its text, what was said of it, and how many tokens each origin wrote."""
    from posttrain.types import Origin

    lengths = Counter(Origin(origin).name.lower() for origin in sample.origin)
    return {
        "index": sample.index,
        "group": sample.group,
        "prompt": decode(sample.tokens[: sample.prompt_length]),
        "completion": decode(sample.completion),
        "reward": sample.reward,
        "verdicts": {name: _verdict(verdict) for name, verdict in sample.verdicts.items()},
        "finish": sample.finish,
        "origins": dict(sorted(lengths.items())),
    }


def reward_counts(rewards: Sequence[float]) -> list[list[float]]:
    """`[[reward, count], ...]`, rising: each distinct reward, or `BINS` bins by their centres when there are more."""
    finite = [float(reward) for reward in rewards if abs(reward) != float("inf") and reward == reward]
    counts = Counter(round(reward, 6) for reward in finite)
    if len(counts) > BINS:
        low, high = min(finite), max(finite)
        width = (high - low) / BINS
        places = Counter(min(BINS - 1, int((reward - low) / width)) for reward in finite)
        counts = Counter({round(low + (place + 0.5) * width, 6): count for place, count in places.items()})
    return [[reward, count] for reward, count in sorted(counts.items())]


def _verdict(verdict: Verdict) -> dict[str, Any]:
    found: dict[str, Any] = {"verdict": type(verdict).__name__.lower()}
    value = getattr(verdict, "value", None)
    if value is not None:
        found["value"] = value
    if verdict.reason:
        found["reason"] = verdict.reason
    return found


class _Lines:
    """A file of JSON lines, each whole: opened without a buffer, cut back to the last whole line when a write fails."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._warned = False
        if path.exists():
            if resume_step is None:
                path.replace(path.with_name(path.name + ".old"))
            else:
                _cut(path, resume_step)
        self._file: int | None = None
        self._open()

    def write(self, line: bytes) -> None:
        """Append one line, and those that wait before it; never raises for a disk that cannot take them."""
        self._waiting.append(line)
        if self._file is None and not self._open():
            return
        assert self._file is not None
        whole = os.fstat(self._file).st_size
        content = memoryview(b"".join(self._waiting))
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, whole)
            self._failed(error)
        else:
            self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self.write(b"")
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None

    def _open(self) -> bool:
        try:
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: OSError) -> None:
        del self._waiting[:-WAITING]
        if self._warned:
            return
        self._warned = True
        _warn(
            f"{self._path} cannot be written: {error.strerror or error}. The run goes on; the last {WAITING:,} lines "
            "wait in memory and are written as soon as there is room. Free disk space, or the curves will have a gap."
        )


def _cut(path: Path, resume_step: int) -> None:
    """Keep the whole lines of steps before `resume_step`."""
    content = path.read_bytes()
    kept = []
    for line in content.split(b"\n")[:-1]:  # what follows the last newline is torn, or empty
        row = decode(line)
        step = None if row is None else row.get("step")
        if isinstance(step, int) and step < resume_step:
            kept.append(line + b"\n")
    wanted = b"".join(kept)
    if wanted == content:
        return
    try:
        atomic_write(path, wanted)
    except OSError:
        if not content.startswith(wanted):
            raise
        os.truncate(path, len(wanted))  # needs no room on the disk, and the lines that stay are untouched


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
