"""Drawings with lines of their own: what evaluations left to look at, and a proxy reward beside the gold one as KL grows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.report import charts
from posttrain.report.charts import Chart, Palette
from posttrain.report.names import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REWARD = "reward/"
"""Prefix of the mean of one of several rewards."""


def curves_in(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """What the evaluations of a run folder left to draw, in order of their files."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            found += [curve for curve in written.get("curves", []) if curve["lines"]]
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            notes.append(f"{path.name} of 'evaluations' cannot be read: {error}")
    return found


def drawn(curve: Mapping[str, Any]) -> Chart:
    """A chart of named lines of points `[x, y]` or `[x, y, low, high]`; a line called 'calibrated' is the diagonal."""
    lines = {str(name): [[float(value) for value in point] for point in points] for name, points in curve["lines"].items()}

    def draw(axes: Axes, palette: Palette) -> None:
        colours = [palette.accent, palette.ink, palette.muted, palette.second]
        styles = ["-", "-", "--", ":"]
        plain = [name for name in lines if name != "calibrated"]
        for place, name in enumerate(plain):
            points = lines[name]
            x, y = [point[0] for point in points], [point[1] for point in points]
            colour, style = colours[place % 4], styles[place % 4]
            axes.plot(x, y, style, color=colour, linewidth=1.7, marker="o" if len(x) <= 12 else None, markersize=3, label=name)
            if all(len(point) == 4 for point in points):
                axes.fill_between(x, [p[2] for p in points], [p[3] for p in points], color=colour, alpha=0.12, linewidth=0)
        if "calibrated" in lines:
            ends = lines["calibrated"]
            axes.plot([p[0] for p in ends], [p[1] for p in ends], "--", color=palette.muted, linewidth=1)
        axes.grid(axis="y", color=palette.line, linewidth=0.8)
        axes.set_xlabel(str(curve["x"]), loc="right", fontsize=7, color=palette.muted, labelpad=0)
        if len(plain) > 1:
            axes.legend(frameon=False, labelcolor=palette.ink, fontsize=7, borderpad=0, handlelength=1.4)

    ends = "; ".join(f"{name} from {number(line[0][1])} to {number(line[-1][1])}" for name, line in lines.items() if line)
    alt = f"{curve['title']}, {curve['y']} against {curve['x']}: {ends}"
    title = f"{curve['title']}: {curve['y']}"
    return charts.lines(title, alt, draw, caption=str(curve.get("caption", "")))


def over_optimisation(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The rewards of a stage that logged several against the KL from the start, nats an answer; None where it did not.

    Each is drawn as its change since the first tenth of the steps in units of its largest change, since their scales differ.
    A proxy that goes on rising while the gold reward falls is over-optimised.

    Source: Gao et al., "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760, figure 1.
    """
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name.startswith(REWARD)]
    steps = [row for row in rows if all(_finite(row.get(name)) for name in (*names, "kl", "length"))]
    if len(names) < 2 or len(steps) < 10:
        return None
    kl = charts.smoothed([float(row["kl"]) * float(row["length"]) for row in steps])
    lines = {}
    for name in names:
        values = charts.smoothed([float(row[name]) for row in steps])
        first = values[: max(1, len(values) // 10)]
        since = [value - sum(first) / len(first) for value in values]
        scale = max(map(abs, since)) or 1.0
        points = sorted([x, value / scale] for x, value in zip(kl, since, strict=True))
        lines[name.removeprefix(REWARD)] = [points[i] for i in range(0, len(points), max(1, len(points) // 60))]
    return {
        "title": "Proxy and gold",
        "x": "KL from the start, nats an answer",
        "y": "change of each reward, in its largest change",
        "lines": lines,
        "caption": "a proxy that rises while the true reward falls is over-optimised",
    }


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
