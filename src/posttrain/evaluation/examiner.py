"""An evaluation of another kind than accuracy: a frozen value whose fields are its options, given a `Workshop` as makers are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.evaluation.accuracy import Outcome
    from posttrain.report.statistics import Interval
    from posttrain.synthesis.maker import Workshop

__all__ = ["Examiner", "curve", "entry", "need_columns"]


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """The base of every kind; concrete ones are final and override `examine`."""

    def examine(self, shop: Workshop, *, model_name: str) -> Outcome:
        """What `shop.model("start")`, called `model_name`, is worth on the workshop's rows."""
        raise NotImplementedError(f"{type(self).__name__} examines nothing")


def entry(model: str, task: str, split: str, metric: str, n: int, found: Interval) -> dict[str, Any]:
    """One number of `summary.json`; ends of an interval that are not finite are left out."""
    low, high = (value if math.isfinite(value) else None for value in (found.low, found.high))
    named = {"model": model, "task": task, "split": split, "n": n, "metric": metric}
    return {**named, "value": found.value, "low": low, "high": high}


def need_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, kind: str) -> None:
    """Raises DataError where a row lacks a column that a kind of evaluation reads."""
    for row in rows:
        if any(name not in row for name in columns):
            raise DataError(f"row {row.get('id')} has the columns {sorted(row)}; {kind} are examined on {', '.join(columns)}")


def curve(title: str, *, x: str, y: str, lines: Mapping[str, Sequence[Sequence[float]]], caption: str = "") -> dict[str, Any]:
    """One drawing of the report: named lines of points `[x, y]` or `[x, y, low, high]`, and what is on the axes."""
    points = {name: [[float(value) for value in point] for point in line] for name, line in lines.items()}
    return {"title": title, "x": x, "y": y, "lines": points, "caption": caption}
