"""`summary.json`: what a run made and how good it is, in one form that the page, the comparison and scripts read.

{"name", "seed", "versions",
 "stages": [{"name", "kind", "method", "artifact", "seconds", "metrics"}],
 "evaluations": [{"model", "task", "split", "n", "metric", "value", "low", "high"}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from posttrain.errors import DataError, nearest
from posttrain.files import atomic_write
from posttrain.report.lines import plain


class StageSummary(TypedDict):
    """One stage of the pipeline, done."""

    name: str  # unique; the folder of its metrics.jsonl and samples.jsonl
    kind: str  # the verb: train, sample, select, merge, evaluate
    method: str | None  # of a train stage: its method's name
    artifact: str | None  # what it made, relative to the run folder
    seconds: float | None  # wall time
    metrics: dict[str, float | None]  # of the last step


class EvaluationSummary(TypedDict):
    """One number of one model on one task."""

    model: str  # "base", or the name of the stage that made the model
    task: str
    split: str
    n: int  # problems
    metric: str
    value: float | None
    low: float | None  # ends of the 95 % interval
    high: float | None


class Summary(TypedDict):
    """The whole of `summary.json`."""

    name: str
    seed: int
    versions: dict[str, str]  # package -> version
    stages: list[StageSummary]  # in the order in which they ran
    evaluations: list[EvaluationSummary]  # models in the order in which they were made


def write_summary(
    folder: str | Path,
    *,
    name: str,
    seed: int,
    versions: Mapping[str, str],
    stages: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
) -> Path:
    """Write `summary.json` into the run folder, whole or not at all; numbers that are not finite become null.

    Args:
        folder: The run's folder.
        name: The run's name.
        seed: The run's seed.
        versions: Package -> version.
        stages: See `StageSummary`.
        evaluations: See `EvaluationSummary`.

    Returns:
        The file.

    Raises:
        DataError: A stage or an evaluation has other keys than the form.
        CheckpointError: The file cannot be written; an earlier one stands.
    """
    found = {"name": name, "seed": seed, "versions": versions, "stages": list(stages), "evaluations": list(evaluations)}
    summary = checked(plain(found), "summary")
    path = Path(folder) / "summary.json"
    atomic_write(path, json.dumps(summary, ensure_ascii=False, indent=2).encode("utf-8", "replace") + b"\n")
    return path


def read_summary(folder: str | Path) -> Summary:
    """Read `summary.json` of a run folder.

    Raises:
        DataError: There is none, or it has another form.
    """
    path = Path(folder) / "summary.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError as error:
        raise DataError(f"'{folder}' has no summary.json: expected the folder of a run that finished a stage") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); write it again with write_summary") from error
    return checked(found, str(path))


def checked(found: Any, where: str) -> Summary:
    """The value itself, when it has the form of a summary.

    Raises:
        DataError: It has not; the message names the first difference.
    """
    _keys(found, Summary, where)
    for part, form in (("stages", StageSummary), ("evaluations", EvaluationSummary)):
        if not isinstance(found[part], list):
            raise DataError(f"{where}: '{part}' is {type(found[part]).__name__}, expected a list")
        for number, entry in enumerate(found[part]):
            _keys(entry, form, f"{where}: {part}[{number}]")
            for key, value in entry.items():
                if not _fits(key, value):
                    raise DataError(f"{where}: {part}[{number}]['{key}'] is {value!r}, expected {_EXPECTED[key]}")
    if not isinstance(found["versions"], dict):
        raise DataError(f"{where}: 'versions' is {type(found['versions']).__name__}, expected a mapping of package to version")
    return cast("Summary", found)


_EXPECTED = {
    **dict.fromkeys(("name", "kind", "model", "task", "split", "metric"), "a text"),
    **dict.fromkeys(("method", "artifact"), "a text or null"),
    **dict.fromkeys(("seconds", "value", "low", "high"), "a number or null"),
    "n": "a whole number",
    "metrics": "a mapping of names to numbers",
}


def _fits(key: str, value: Any) -> bool:
    expected = _EXPECTED[key]
    if value is None:
        return expected.endswith("or null")
    if expected.startswith("a text"):
        return isinstance(value, str)
    if expected.startswith("a mapping"):
        return isinstance(value, dict)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole if expected == "a whole number" else whole or isinstance(value, float)


def _keys(found: Any, form: type, where: str) -> None:
    expected = form.__annotations__
    if not isinstance(found, dict):
        raise DataError(f"{where} is {type(found).__name__}, expected a mapping with the keys {', '.join(expected)}")
    for key in found:
        if key not in expected:
            raise DataError(f"{where} has the key '{key}', which is not in its form{nearest(str(key), expected)}")
    missing = [key for key in expected if key not in found]
    if missing:
        raise DataError(f"{where} lacks {', '.join(repr(key) for key in missing)}: expected {', '.join(expected)}")
