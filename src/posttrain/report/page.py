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
from importlib import resources
from pathlib import Path
from typing import Any

from posttrain.files import atomic_write
from posttrain.report import charts
from posttrain.report.charts import Chart
from posttrain.report.comparison import compare, paired
from posttrain.report.folder import RunFolder, Stage, read_folder
from posttrain.report.names import BY_NAME, METRICS, PHASE, Unit, duration, evaluation_unit, number, phases_of, shares
from posttrain.report.statistics import Interval
from posttrain.report.summary import EvaluationSummary
from posttrain.report.warnings import warnings_in_words

SECRET = re.compile(
    r"(?i)^(\s*[\"']?[\w.-]*(?:api_?key|secret|password|access_token|auth_token|hf_token)[\"']?\s*[:=]\s*)(\S.*)$", re.M
)
"""Lines of a recipe whose value must not be shown."""

KNOWN_SECRETS = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,})\b")
"""Values that are tokens by their looks."""


@dataclass(frozen=True)
class Card:
    """One model's number on the first task."""

    entry: EvaluationSummary
    unit: Unit
    change: Interval | None  # against the first model, on the same questions
    is_last: bool


@dataclass(frozen=True)
class Results:
    """One metric on one task, for all models."""

    title: str
    entries: list[Card]
    unit: Unit
    chart: Chart | None


@dataclass(frozen=True)
class StageView:
    """One stage as the page shows it."""

    stage: Stage
    steps: int
    charts: list[Chart]
    phases: list[tuple[str, float, int]]  # name, seconds, whole per cent; the per cents add up to 100
    further: list[
        tuple[str, float, float, float, float]
    ]  # metrics the report does not know: name, first, last, least, most
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
    atomic_write(path, page(read_folder(folder)).encode("utf-8", "replace"))
    return path


def page(run: RunFolder) -> str:
    """The page as HTML, the same for the same run."""
    import jinja2

    template = resources.files("posttrain.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(number=number, duration=duration, points=points)
    environment.filters["clean"] = clean
    results = _results(run)
    return environment.from_string(template).render(
        run=run,
        lede=_lede(run, results),
        results=results,
        stages=[_stage(stage) for stage in run.stages],
        comparison=compare(run.answers),
        recipe=None if run.recipe is None else redacted(run.recipe),
        light=charts.LIGHT,
        dark=charts.DARK,
    )


def points(change: Interval, unit: Unit) -> str:
    """A difference with its interval: `+38.1 pts (+34.9 to +41.3)`, in points of a per cent for shares."""
    scale, form = (100, "{:+.1f}") if unit == "share" else (1, "{:+.3g}")
    value, low, high = (
        form.format(scale * end).replace("-", "\u2212") for end in (change.value, change.low, change.high)
    )
    return f"{value}{' pts' if unit == 'share' else ''} ({low} to {high})"


def clean(text: object, limit: int = 6000) -> str:
    """Text that a model wrote, fit for a page: control characters are made visible, long text is cut with a note."""
    shown = re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        "\ufffd",
        str(text).replace("\r\n", "\n"),
    )
    if len(shown) <= limit:
        return shown
    return f"{shown[:limit]}\n… {len(shown) - limit:,} more characters"


def redacted(recipe: str) -> str:
    """The recipe without the values of keys and tokens."""
    return KNOWN_SECRETS.sub("•••", SECRET.sub(r"\1•••", recipe))


def _results(run: RunFolder) -> list[Results]:
    """One entry for each task, split and metric, in the order of the summary."""
    groups: dict[tuple[str, str, str], list[EvaluationSummary]] = {}
    for entry in run.evaluations:
        groups.setdefault((entry["task"], entry["split"], entry["metric"]), []).append(entry)
    found = []
    for (task, split, metric), entries in groups.items():
        unit = evaluation_unit(metric, [entry["value"] for entry in entries])
        cards = []
        for place, entry in enumerate(entries):
            change = None if place == 0 else paired(run.answers, entries[0], entry)
            cards.append(Card(entry, unit, change, place == len(entries) - 1))
        known = [charts.Bar(e["model"], e["value"], e["low"], e["high"]) for e in entries if e["value"] is not None]
        title = f"{_words(metric)} on {_words(task)} ({_words(split)})"
        title = title[:1].upper() + title[1:]
        chart = charts.bars(title, known, unit=unit) if known else None
        found.append(Results(title, cards, unit, chart))
    return found


def _lede(run: RunFolder, results: Sequence[Results]) -> str:
    """The run in one or two sentences."""
    seconds = [stage.summary["seconds"] for stage in run.stages]
    known = [value for value in seconds if value is not None]
    said = f"{len(run.stages)} stage{'s' if len(run.stages) != 1 else ''}"
    if known:
        said += f", {duration(sum(known))} in all"
    said += f", seed\u00a0{run.seed}." if run.seed is not None else "."
    shown = [card.entry for card in results[0].entries if card.entry["value"] is not None] if results else []
    if len(shown) < 2:
        return said
    first, last, unit = shown[0], shown[-1], results[0].unit
    return (
        f"{results[0].title} went from {number(first['value'], unit)} ({first['model']}) to "
        f"{number(last['value'], unit)} "
        f"({last['model']}), n\u00a0=\u00a0{last['n']:,}. {said}"
    )


def _stage(stage: Stage) -> StageView:
    rows = stage.metrics
    drawn = [chart for metric in METRICS if metric.chart and (chart := _curve(metric.name, rows)) is not None]
    rewards = _distribution(stage)
    if rewards is not None:
        drawn.insert(1, rewards)
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


def _words(name: str) -> str:
    return {"accuracy_parsed": "accuracy among parsed answers", "parsed": "answers that parse"}.get(
        name, name.replace("_", " ")
    )
