"""The charts of the page: small SVG images, each drawn once for light and once for dark, as data URIs.

Texts stay texts and take the reader's system font; the same numbers always give the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from posttrain.report.names import Metric, Unit, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 300
"""Points of a curve at most; longer runs are averaged in as many equal stretches."""

FEW = 8
"""Distinct rewards that each get a place of their own in the distribution; more are put in bins."""

DOTS = 12
"""Values up to which each is drawn as a point of its own."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Palette:
    """Colours of one mode, those of the page's style sheet."""

    ink: str
    muted: str
    line: str
    accent: str
    second: str


LIGHT = Palette(ink="#1d2129", muted="#6a7180", line="#e3e5ea", accent="#2f5fd0", second="#b9bfca")
DARK = Palette(ink="#e8eaee", muted="#99a1b0", line="#2d323c", accent="#7fa6ff", second="#565d6b")


@dataclass(frozen=True)
class Chart:
    """One image in both modes, and what it shows in words."""

    title: str
    alt: str
    light: str  # data URI
    dark: str  # data URI
    caption: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: a value with its interval; the ends may be missing."""

    label: str
    value: float
    low: float | None
    high: float | None


Draw = Callable[["Axes", Palette], None]


def bars(title: str, entries: Sequence[Bar], *, unit: Unit, caption: str = "") -> Chart:
    """Horizontal bars with 95 % intervals, the first at the top; the last, what the run made, in the accent colour."""
    scale = 100 if unit == "share" else 1

    def draw(axes: Axes, palette: Palette) -> None:
        for place, entry in enumerate(entries):
            last = place == len(entries) - 1
            axes.barh(place, scale * entry.value, height=0.52, color=palette.accent if last else palette.second)
            ends = [entry.value if end is None else end for end in (entry.low, entry.high)]
            if entry.low is not None and entry.high is not None:
                error = [[scale * max(0.0, entry.value - ends[0])], [scale * max(0.0, ends[1] - entry.value)]]
                axes.errorbar(scale * entry.value, place, xerr=error, color=palette.ink, elinewidth=1.2, capsize=3)
            place_at = scale * max(entry.value, ends[1], 0.0)
            axes.annotate(
                number(entry.value, unit),
                (place_at, place),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=palette.ink,
            )
        top = max(max(entry.value, entry.high or entry.value) for entry in entries)
        right = max(0.0, scale * top * 1.24) or (0.0 if top < 0 else 1)
        axes.set_xlim(left=None if any(entry.value < 0 for entry in entries) else 0, right=right)
        if unit == "share":
            axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 100 and tick <= axes.get_xlim()[1]])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_yticks(range(len(entries)), [shortened(entry.label, 18) for entry in entries])
        axes.tick_params(axis="y", length=0, labelcolor=palette.ink)
        axes.grid(axis="x", color=palette.line, linewidth=0.8)
        axes.spines["bottom"].set_visible(False)

    ends = [f" [{number(bar.low, unit)}, {number(bar.high, unit)}]" if bar.low is not None else "" for bar in entries]
    said = "; ".join(f"{bar.label} {number(bar.value, unit)}{end}" for bar, end in zip(entries, ends, strict=True))
    return _chart(title, f"Bar chart, {title}: {said}", draw, height=0.62 + 0.42 * len(entries), caption=caption)


def curve(
    metric: Metric,
    steps: Sequence[int],
    values: Sequence[float],
    *,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Chart:
    """One metric over the steps, with the band of its interval, and a running mean over it when the steps are many.

    Args:
        metric: What is drawn.
        steps: `[n]`, counted from 0; the axis counts from 1, as the live line does.
        values: `[n]`, NaN where there is none.
        band: Low and high ends, `[n]` each.
    """
    scale = 100 if metric.unit == "share" else 1
    x, y = thinned([step + 1 for step in steps]), [scale * value for value in thinned(values)]

    def draw(axes: Axes, palette: Palette) -> None:
        if band is not None:
            low, high = ([scale * value for value in thinned(end)] for end in band)
            axes.fill_between(x, low, high, color=palette.accent, alpha=0.18, linewidth=0)
        noisy = len(y) >= 40 and metric.name != "learning_rate"
        if noisy and band is None:
            axes.plot(x, y, color=palette.accent, linewidth=0.8, alpha=0.4)
        marker = "o" if len(y) <= DOTS else None
        axes.plot(x, smoothed(y) if noisy else y, color=palette.accent, linewidth=1.8, marker=marker, markersize=3.5)
        _whole_steps(axes, x)
        axes.set_xlabel("step", loc="right", fontsize=7, color=palette.muted, labelpad=0)
        axes.grid(axis="y", color=palette.line, linewidth=0.8)
        shown = [value for value in y if math.isfinite(value)]
        if metric.unit == "share":
            axes.set_ylim(0, max(5.0, 1.15 * max(shown)) if max(shown) < 60 else 104)
        elif min(shown) >= 0 and metric.name not in ("loss", "reward"):
            axes.set_ylim(0, 1.12 * max(shown) or 1)

    finite = [value for value in values if math.isfinite(value)]
    first, last = number(finite[0], metric.unit), number(finite[-1], metric.unit)
    title = metric.title + (", %" if metric.unit == "share" else "")
    count = "1 step" if len(values) == 1 else f"{len(values)} steps"
    alt = f"Curve of {metric.title.lower()} over {count}: {first} at first, {last} at last"
    return _chart(title, alt, draw, caption=metric.meaning)


def distribution(early: Mapping[float, int], late: Mapping[float, int], *, steps: int) -> Chart:
    """Shares of each reward in the first and in the last steps, side by side.

    Args:
        early: Reward -> how often, in the first steps.
        late: The same in the last steps.
        steps: How many steps are in each.
    """
    values = sorted({*early, *late})
    if len(values) <= FEW:  # a place for each reward, whatever lies between them
        labels: list[str] | None = [number(value) for value in values]
        heights = [[100 * counts.get(value, 0) / max(1, sum(counts.values())) for value in values] for counts in (early, late)]
        centres, width = [float(place) for place in range(len(values))], 1.0
    else:
        labels, edges = None, bin_edges(values)
        heights = [[100 * share for share in binned(counts, edges)] for counts in (early, late)]
        centres, width = [(low + high) / 2 for low, high in pairwise(edges)], edges[1] - edges[0]

    def draw(axes: Axes, palette: Palette) -> None:
        sides = ((-0.2, "early", palette.second, heights[0]), (0.2, "late", palette.accent, heights[1]))
        for offset, label, colour, height in sides:
            axes.bar([c + offset * width for c in centres], height, width=0.36 * width, color=colour, label=label)
        axes.grid(axis="y", color=palette.line, linewidth=0.8)
        axes.legend(frameon=False, labelcolor=palette.ink, loc="upper center", ncols=2, borderpad=0, handlelength=1)
        axes.set_ylim(0, 1.25 * max(max(height) for height in heights))
        axes.set_xlabel("reward", loc="right", fontsize=7, color=palette.muted, labelpad=0)
        if labels is not None:
            axes.set_xticks(centres, labels)
            axes.set_xlim(-0.6, len(centres) - 0.4)

    means = [sum(v * c for v, c in counts.items()) / max(1, sum(counts.values())) for counts in (early, late)]
    words = f"{steps} steps" if steps != 1 else "step"
    alt = f"Distribution of rewards: mean {number(means[0])} in the first {words}, {number(means[1])} in the last"
    return _chart("Rewards, % of answers", alt, draw, caption=f"the first {words} against the last {words}")


def lines(title: str, alt: str, draw: Draw, *, caption: str = "") -> Chart:
    """A chart that `draw` fills, of the size of the curves."""
    return _chart(title, alt, draw, caption=caption)


def _whole_steps(axes: Axes, steps: Sequence[float]) -> None:
    """An axis over the steps alone, with ticks at whole ones."""
    from matplotlib.ticker import MaxNLocator

    room = 0.02 * (steps[-1] - steps[0]) if len(steps) > 1 else 0.5
    axes.set_xlim(steps[0] - room, steps[-1] + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def bin_edges(values: Sequence[float], *, count: int = 16) -> list[float]:
    """`[count + 1]` edges of equal bins that hold all values."""
    low, span = min(values), max(values) - min(values)
    return [low + place * span / count for place in range(count + 1)]


def binned(counts: Mapping[float, int], edges: Sequence[float]) -> list[float]:
    """Share of the counted values in each bin; they add up to 1."""
    found = [0] * (len(edges) - 1)
    width = edges[1] - edges[0]
    for value, count in counts.items():
        found[max(0, min(len(found) - 1, int((value - edges[0]) / width)))] += count
    total = max(1, sum(found))
    return [count / total for count in found]


def thinned(values: Sequence[float], *, points: int = POINTS) -> list[float]:
    """At most `points` values: means of equal stretches, without the NaNs in them."""
    if len(values) <= points:
        return [float(value) for value in values]
    found = []
    for place in range(points):
        stretch = values[place * len(values) // points : (place + 1) * len(values) // points]
        finite = [value for value in stretch if math.isfinite(value)]
        found.append(math.fsum(finite) / len(finite) if finite else float("nan"))
    return found


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred running mean over a tenth of the values; only the half of it at both ends, NaNs left out."""
    half = max(1, len(values) // 20)
    found = []
    for place in range(len(values)):
        finite = [value for value in values[max(0, place - half) : place + half + 1] if math.isfinite(value)]
        found.append(math.fsum(finite) / len(finite) if finite else float("nan"))
    return found


def shortened(text: str, length: int) -> str:
    """The text, its middle left out where it is longer than `length`."""
    if len(text) <= length:
        return text
    return text[: length // 2] + "…" + text[len(text) - (length - length // 2 - 1) :]


def _chart(title: str, alt: str, draw: Draw, *, height: float = 2.0, caption: str = "") -> Chart:
    return Chart(title, alt, _drawn(draw, LIGHT, height), _drawn(draw, DARK, height), caption)


def _drawn(draw: Draw, palette: Palette, height: float) -> str:
    """One image, 4 inches wide, as a data URI."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    options: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "posttrain",
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "text.parse_math": False,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(4.0, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.set_axisbelow(True)
        axes.tick_params(colors=palette.muted, length=0, labelsize=8)
        for name, spine in axes.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color(palette.line)
        draw(axes, palette)
        content = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, content.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")
