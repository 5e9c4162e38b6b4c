"""JSON that gives back exactly what was put in, or refuses it.

Python's floats print as the shortest text that reads back as the same number, so finite floats (and -0.0) are exact
as they stand.  JSON has no infinities and no NaN: they are written as `{"$float": "inf"}`.  A key of the caller's that
begins with `$` gets one more `$`, so that nothing can be mistaken for it.  Tuples, sets, tensors and keys that are not
text would come back as something else and are refused with the place where they stand.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeAlias

__all__ = ["JSON", "dumps", "loads"]

JSON: TypeAlias = Any
"""None, bool, int, float, str, list of JSON, dict of str to JSON.  (A recursive alias makes all callers cast.)"""


def _encoded(value: JSON, place: str) -> JSON:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [_encoded(item, f"{place}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, dict):
        encoded: dict[str, JSON] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{place} has the key {key!r} of type {type(key).__name__}; expected a string: write str(key)"
                )
            encoded["$" + key if key.startswith("$") else key] = _encoded(item, f"{place}[{key!r}]")
        return encoded
    kind = type(value).__name__
    hint = "write list(...)" if isinstance(value, tuple | set | frozenset) else "put tensors among the tensors"
    raise TypeError(f"{place} is of type {kind}; expected None, bool, int, float, str, list or dict: {hint}")


def _decoded(value: JSON) -> JSON:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        if len(value) == 1 and "$float" in value:
            return float(value["$float"])
        return {key[1:] if key.startswith("$$") else key: _decoded(item) for key, item in value.items()}
    return value


def dumps(value: JSON, *, sort_keys: bool = False, indent: int | None = None) -> str:
    """JSON text (ASCII) from which `loads` makes an equal value.

    Raises:
        TypeError: Something in it is no JSON value; the message names the place.

    Example:
        >>> dumps({"best": float("-inf"), "$x": [0.1, -0.0]})
        '{"best": {"$float": "-inf"}, "$$x": [0.1, -0.0]}'
    """
    return json.dumps(_encoded(value, "value"), sort_keys=sort_keys, indent=indent, allow_nan=False)


def loads(text: str | bytes) -> JSON:
    """The value of a text that `dumps` wrote.

    Raises:
        ValueError: The text is no JSON, or holds a bare `NaN` or `Infinity`.
    """
    return _decoded(json.loads(text, parse_constant=_no_constant))


def _no_constant(name: str) -> float:
    raise ValueError(f"bare {name}; expected {{'$float': ...}}")
