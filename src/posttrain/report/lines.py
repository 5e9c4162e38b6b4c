"""JSON lines of a run: without NaN when they are written, and with a note for what is torn when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinities become None, scalars of other libraries numbers, the rest text.

    Example:
        >>> plain({"a": float("nan"), "b": (1, 2.5)})
        {'a': None, 'b': [1, 2.5]}
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and arrays, also those of no dimension
        return plain(value.tolist())
    return str(value)


def encode(value: Mapping[str, Any]) -> bytes:
    """One object as one line of UTF-8, newline included; lone surrogates become question marks."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace") + b"\n"


def read_lines(path: Path, *, note: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file; what is no whole JSON object is skipped, and said to `note`.

    Lines part at `\\n` alone: a text may hold other line separators.
    """
    rows: list[dict[str, Any]] = []
    torn = 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        row = decode(line)
        if row is None:
            torn += 1
        else:
            rows.append(row)
    if torn and note is not None:
        note(f"{path.name} of '{path.parent.name}': {torn} unreadable line{'s' if torn > 1 else ''} skipped")
    return rows


def decode(line: bytes) -> dict[str, Any] | None:
    """The JSON object of one line, or None when the line holds none; `NaN`, which is no JSON, is read as None."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
