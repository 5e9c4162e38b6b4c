"""Samples and verdicts as JSON: what rollouts look like on disk and between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from posttrain import types
from posttrain.errors import DataError
from posttrain.types import Sample, Verdict

_VERDICTS: dict[str, type[Verdict]] = {
    kind.__name__: kind
    for kind in (
        types.Score,
        types.Wrong,
        types.Unparseable,
        types.Overlong,
        types.Crashed,
        types.InfraError,
        types.Timeout,
    )
}


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    """`Score(1.0)` as `{"verdict": "Score", "value": 1.0, "reason": ""}`."""
    return {"verdict": type(verdict).__name__, **asdict(verdict)}


def verdict_from_json(record: Mapping[str, Any]) -> Verdict:
    """The verdict that `verdict_to_json` wrote.

    Raises:
        DataError: The kind of verdict is unknown.
    """
    values = dict(record)
    kind = values.pop("verdict", None)
    if kind not in _VERDICTS:
        raise DataError(f"unknown verdict {kind!r}; expected one of {', '.join(_VERDICTS)}")
    return _VERDICTS[kind](**values)


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """A sample as JSON values (columns must be numbers or lists of numbers)."""
    record = {field.name: getattr(sample, field.name) for field in fields(Sample)}
    record["verdicts"] = {name: verdict_to_json(verdict) for name, verdict in sample.verdicts.items()}
    record["trained"] = [int(flag) for flag in sample.trained]
    return record


def sample_from_json(record: Mapping[str, Any]) -> Sample:
    """The sample that `sample_to_json` wrote.

    Raises:
        DataError: A field is missing or unknown.
    """
    values = dict(record)
    values["trained"] = [bool(flag) for flag in values.get("trained", [])]
    values["verdicts"] = {name: verdict_from_json(value) for name, value in values.get("verdicts", {}).items()}
    try:
        return Sample(**values)
    except TypeError as cause:
        raise DataError(f"this is no record of a sample: {cause}") from cause
