"""`report.html`: one page, in one file, that says what a run made, how good it is, and what went on.

Nothing is loaded from elsewhere and nothing on the page runs: there is no script, and a content policy forbids any.
Everything that a model, a data set or a recipe wrote is escaped.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.files import atomic_write
from posttrain.report import charts, curves
from posttrain.report.charts import Chart
from posttrain.report.comparison import compare
from posttrain.report.curves import over_optimisation
from posttrain.report.folder import RunFolder, Stage, read_folder
from posttrain.report.judgements import write_judgements
from posttrain.report.names import BY_NAME, METRICS, PHASE, phases_of, shares
from posttrain.report.results import lede, made_by, results_in_words, results_of
from posttrain.report.templates import template_of
from posttrain.report.warnings import warnings_in_words

SECRET = re.compile(
    r"(?i)^(\s*[\"']?[\w.-]*(?:api_?key|secret|password|access_token|auth_token|hf_token)[\"']?\s*[:=]\s*)(\S.*)$", re.M
)
"""Lines of a recipe whose value must not be shown."""

KNOWN_SECRETS = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,})\b")
"""Values that are tokens by their looks."""

COLOURS = 7
"""Colours of the style sheet for phases of a step; one more is for `other`."""


@dataclass(frozen=True)
class StageView:
    """One stage as the page shows it."""

    stage: Stage
    steps: int
    charts: list[Chart]
    phases: list[tuple[str, float, int]]  # name, seconds, whole per cent; the per cents add up to 100
    further: list[tuple[str, float, float, float, float]]  # metrics the report does not know: name, first, last, least, most
    warnings: list[str]


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder, from the files in it.

    Read are `summary.json`, `recipe.yaml` (or `resolved.json`), `<stage>/metrics.jsonl` and `<stage>/samples.jsonl` of
    the stages that the summary names, and `evaluations/*.jsonl`.  What is missing is left out; what is torn is skipped
    and noted on the page.

    Args:
        folder: The run's folder.

    Returns:
        The file.

    Raises:
        DataError: `folder` is no folder, or holds neither a summary nor the metrics of any stage.
        CheckpointError: The file cannot be written; an earlier one stands.
    """
    path = Path(folder) / "report.html"
    run = read_folder(folder)
    judged = write_judgements(folder) is not None
    atomic_write(path, page(run, judged=judged).encode("utf-8", "replace"))
    return path


def page(run: RunFolder, *, judged: bool = False) -> str:
    """The page as HTML, the same for the same run; with a link to `judgements.html` where there is one."""
    results = results_of(run)
    stages = [_stage(stage) for stage in run.stages]
    return template_of("report.html.j2").render(
        run=run,
        judged=judged,
        lede=lede(results),
        made_by=made_by(run),
        results=results,
        results_warnings=results_in_words(results),
        stages=stages,
        curves=[curves.drawn(curve) for curve in run.curves],
        colours_of=_phase_colours(stages),
        comparison=compare(run.answers, run.starts),
        recipe=None if run.recipe is None else redacted(run.recipe),
        light=charts.LIGHT,
        dark=charts.DARK,
    )


def redacted(recipe: str) -> str:
    """The recipe without the values of keys and tokens."""
    return KNOWN_SECRETS.sub("•••", SECRET.sub(r"\1•••", recipe))


def _phase_colours(stages: Sequence[StageView]) -> dict[str, int]:
    """Phase -> number of its colour, the same in every stage: those that took longest get colours of their own."""
    total: dict[str, float] = {}
    for view in stages:
        for name, seconds, _ in view.phases:
            total[name] = total.get(name, 0.0) + seconds
    longest = sorted((name for name in total if name != "other"), key=lambda name: -total[name])
    return {name: place % COLOURS for place, name in enumerate(longest)} | {"other": COLOURS}


def _stage(stage: Stage) -> StageView:
    rows = stage.metrics
    drawn = [chart for metric in METRICS if metric.chart and (chart := _curve(metric.name, rows)) is not None]
    rewards = _distribution(stage)
    if rewards is not None:
        drawn.insert(1, rewards)
    if (several := over_optimisation(rows)) is not None:
        drawn.insert(1, curves.drawn(several))
    total: dict[str, float] = {}
    for row in rows:
        for name, seconds in phases_of(row).items():
            total[name] = total.get(name, 0.0) + seconds
    parts = shares(total)
    phases = [(name, seconds, parts[name]) for name, seconds in total.items()] if sum(total.values()) > 0 else []
    return StageView(stage, len(rows), drawn, phases, _further(rows), warnings_in_words(rows))


def _curve(name: str, rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The curve of one known metric, or None when no step has it."""
    present = [row for row in rows if name in row]
    values = [_number(row, name) for row in present]
    if not any(math.isfinite(value) for value in values):
        return None
    low, high = ([_number(row, f"{name}_{end}") for row in present] for end in ("low", "high"))
    band = (low, high) if any(math.isfinite(value) for value in low) else None
    return charts.curve(BY_NAME[name], [row["step"] for row in present], values, band=band)


def _distribution(stage: Stage) -> Chart | None:
    """Rewards in the first and last tenth of the steps; from the samples that were kept where steps have no counts."""
    by_step: dict[int, dict[float, int]] = {}
    for row in stage.metrics:
        with contextlib.suppress(TypeError, ValueError, KeyError):  # absent, or of another form
            by_step[row["step"]] = {float(reward): int(count) for reward, count in row["reward_counts"]}
    if not by_step:
        for sample in stage.samples:
            reward, step = sample.get("reward"), sample.get("step")
            if isinstance(reward, (int, float)) and isinstance(step, int):
                counts = by_step.setdefault(step, {})
                counts[float(reward)] = counts.get(float(reward), 0) + 1
    steps = sorted(by_step)
    if len(steps) < 2:
        return None
    tenth = max(1, len(steps) // 10)
    early, late = (_summed([by_step[step] for step in part]) for part in (steps[:tenth], steps[-tenth:]))
    return charts.distribution(early, late, steps=tenth) if early and late else None


def _summed(counts: Sequence[Mapping[float, int]]) -> dict[float, int]:
    found: dict[float, int] = {}
    for part in counts:
        for value, count in part.items():
            found[value] = found.get(value, 0) + count
    return found


def _further(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float, float, float]]:
    """Metrics without a chart of their own: first, last, least and greatest value."""
    drawn = {metric.name for metric in METRICS if metric.chart}
    skipped = {
        "step",
        "stage",
        "reward_counts",
        *drawn,
        *(f"{name}_{end}" for name in drawn for end in ("low", "high")),
    }
    names = dict.fromkeys(name for row in rows for name in row if name not in skipped and not name.startswith(PHASE))
    found = []
    for name in names:
        values = [value for row in rows if math.isfinite(value := _number(row, name))]
        if values:
            found.append((name, values[0], values[-1], min(values), max(values)))
    return found


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else float("nan")
