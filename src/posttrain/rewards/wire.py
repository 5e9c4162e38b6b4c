"""Verdicts as JSON, and what functions return as verdicts, for both sides of the pipe; nothing that arrives is trusted.

>>> encode(read(True))
{'kind': 'Score', 'value': 1.0, 'reason': ''}
>>> read(float("nan"))
InfraError(reason='returned nan, not a finite number')
"""

from __future__ import annotations

from typing import Any

from posttrain.types import Crashed, InfraError, Overlong, Score, Timeout, Unparseable, Verdict, Wrong

__all__ = ["LARGEST", "ContractBroken", "decode", "encode", "read", "read_all"]

LARGEST = 3.4028234e38
"""Greatest number that float32 holds: a reward beyond it would be infinite in the batch."""

_KINDS: dict[str, type[Verdict]] = {
    kind.__name__: kind for kind in (Score, Wrong, Unparseable, Overlong, Crashed, InfraError, Timeout)
}
_REASON = 4000  # characters of a reason that are kept


class ContractBroken(ValueError):
    """A list function did not return one judgement for each answer: asking again would not help."""


def read(value: object) -> Verdict | None:
    """What a reward returned for one answer, as a verdict; what cannot be one is an `InfraError` that says why."""
    if isinstance(value, Score):
        checked = read(value.value + 0 if isinstance(value.value, bool) else value.value)
        if isinstance(checked, Score):
            return Score(checked.value, reason=value.reason)
        return checked if isinstance(checked, InfraError) else InfraError(reason="returned a Score without a number")
    if value is None or (isinstance(value, Verdict) and type(value).__name__ in _KINDS):
        return value
    if hasattr(value, "item") and not isinstance(value, (bool, int, float)):  # numpy scalars, tensors of one element
        try:
            value = value.item()
        except Exception:  # several elements
            return InfraError(reason=f"returned a {type(value).__name__} of several values, not one number")
    if isinstance(value, bool):
        return Score(1.0) if value else Wrong()
    if not isinstance(value, (int, float)):
        return InfraError(reason=f"returned a {type(value).__name__}, not a verdict, number, bool or None")
    try:
        number = float(value)
    except OverflowError:
        return InfraError(reason="returned an integer that no float holds")
    if not -LARGEST <= number <= LARGEST:  # NaN compares false
        return InfraError(reason=f"returned {number}, not a finite number")
    return Score(number + 0.0)  # -0.0 becomes 0.0


def read_all(returned: object, count: int) -> list[Verdict | None]:
    """What a list function returned, as `count` verdicts.

    Raises:
        ContractBroken: It is not a list of `count` entries.
    """
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        raise ContractBroken(f"returned a {type(returned).__name__}, not a list of {count} values")
    if len(returned) != count:
        values = "1 value" if len(returned) == 1 else f"{len(returned)} values"
        raise ContractBroken(f"returned {values} for {count} answer{'' if count == 1 else 's'}")
    return [read(value) for value in returned]


def encode(verdict: Verdict | None) -> dict[str, Any] | None:
    """A verdict as JSON."""
    if verdict is None:
        return None
    value = {"value": verdict.value} if isinstance(verdict, Score) else {}
    return {"kind": type(verdict).__name__, **value, "reason": str(verdict.reason)[-_REASON:]}


def decode(found: object) -> Verdict | None:
    """A verdict from JSON; anything else is an `InfraError`."""
    if found is None:
        return None
    if isinstance(found, dict) and isinstance(found.get("kind"), str) and found["kind"] in _KINDS:
        reason = str(found.get("reason", ""))[-_REASON:]
        if found["kind"] != "Score":
            return _KINDS[found["kind"]](reason=reason)
        score = read(found.get("value"))
        return Score(score.value, reason=reason) if isinstance(score, Score) else InfraError(reason="sent a bad score")
    return InfraError(reason="sent something that is not a verdict")
