"""What the evaluations say: one card a model, the change from what it started from, and the run in a few sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.report import charts
from posttrain.report.charts import Chart
from posttrain.report.comparison import lineage, paired, path_to
from posttrain.report.folder import RunFolder, model_order
from posttrain.report.names import Unit, duration, evaluation_unit, metric_in_words, metric_meaning, number
from posttrain.report.statistics import Interval
from posttrain.report.summary import EvaluationSummary

MOSTLY = 0.9
"""Share of answers that parse below which a model's accuracy says much about the format."""


@dataclass(frozen=True)
class Card:
    """One model's number on one task."""

    entry: EvaluationSummary
    unit: Unit
    start: str | None  # the model it started from
    since_start: Interval | None  # change from that one, on the same questions
    since_first: Interval | None  # change from the first model; None where that is its start
    is_last: bool


@dataclass(frozen=True)
class Results:
    """One metric on one task, for all models."""

    key: tuple[str, str, str]  # task, split, metric
    title: str
    meaning: str
    entries: list[Card]
    unit: Unit
    chart: Chart | None

    @property
    def path(self) -> list[Card]:
        """The models with a number that led to the last one, it included."""
        cards = {card.entry["model"]: card for card in self.entries if card.entry["value"] is not None}
        if not cards:
            return []
        return [cards[name] for name in path_to(list(cards)[-1], {n: card.start for n, card in cards.items()}) if name in cards]


def results_of(run: RunFolder) -> list[Results]:
    """One entry for each task, split and metric, in the order of the summary; models in the order in which they were made."""
    made = model_order(run.evaluations, [stage.name for stage in run.stages])
    groups: dict[tuple[str, str, str], list[EvaluationSummary]] = {}
    for entry in run.evaluations:
        groups.setdefault((entry["task"], entry["split"], entry["metric"]), []).append(entry)
    found = []
    for (task, split, metric), entries in groups.items():
        entries.sort(key=lambda entry: made.index(entry["model"]))
        unit = evaluation_unit(metric, [entry["value"] for entry in entries])
        known = [charts.Bar(e["model"], e["value"], e["low"], e["high"]) for e in entries if e["value"] is not None]
        title = f"{metric_in_words(metric)} on {metric_in_words(task)} ({metric_in_words(split)})"
        title = title[:1].upper() + title[1:]
        meaning = metric_meaning(metric)
        chart = charts.bars(title, known, unit=unit, caption=meaning) if known else None
        found.append(Results((task, split, metric), title, meaning, _cards(run, entries, unit), unit, chart))
    return found


def _cards(run: RunFolder, entries: Sequence[EvaluationSummary], unit: Unit) -> list[Card]:
    by_model = {entry["model"]: entry for entry in entries}
    parents, first, cards = lineage(list(by_model), run.starts), entries[0], []
    for place, entry in enumerate(entries):
        start = by_model.get(parents[entry["model"]] or "")
        since_start = None if start is None else paired(run.answers, start, entry)
        since_first = None if place == 0 or start is first else paired(run.answers, first, entry)
        name = None if start is None else start["model"]
        cards.append(Card(entry, unit, name, since_start, since_first, place == len(entries) - 1))
    return cards


def lede(results: Sequence[Results]) -> str:
    """The way from the first model to the last, and what the format has to do with it; "" for fewer than two models."""
    path = results[0].path if results else []
    if len(path) < 2:
        return ""
    head = results[0]
    way = " → ".join(f"{number(card.entry['value'], head.unit)} ({card.entry['model']})" for card in path)
    said = f"{head.title}: {way}, n\u00a0=\u00a0{path[-1].entry['n']:,}."
    read = next((found for found in results if found.key == (*head.key[:2], "parsed")), None)
    if read is None or head.key[2] != "accuracy":
        return said
    shares = {card.entry["model"]: card.entry["value"] for card in read.entries}
    parsed = [share for card in path if (share := shares.get(card.entry["model"])) is not None]
    if len(parsed) < len(path) or min(parsed) >= MOSTLY:
        return said
    changed = " → ".join(number(share, "share") for share in parsed)
    return (
        f"{said} Parsed: {changed}. An answer that is not in the asked format counts as wrong, so where few parse, as those of "
        f"{path[parsed.index(min(parsed))].entry['model']}, accuracy speaks of the format too."
    )


def made_by(run: RunFolder) -> str:
    """What it took: `2 stages, 4 min 40 s in all, seed 0`."""
    known = [seconds for stage in run.stages if (seconds := stage.summary["seconds"]) is not None]
    said = f"{len(run.stages)} stage{'s' if len(run.stages) != 1 else ''}"
    if known:
        said += f", {duration(sum(known))} in all"
    return said + (f", seed\u00a0{run.seed}" if run.seed is not None else "")


def results_in_words(results: Sequence[Results]) -> list[str]:
    """Stages that made a model worse than the one it started from, by the first metric, and those that cannot be told."""
    return [said for card in (results[0].entries if results else []) if (said := _against_start(card)) is not None]


def _against_start(card: Card) -> str | None:
    model, change = card.entry["model"], card.since_start
    if card.start is None or change is None or not change.known:
        return None
    how = f"{points(change, card.unit)} on the same {change.n:,} problems"
    if change.high < 0:
        return (
            f"{model} is worse than {card.start}, the model it started from: {how}. Use {card.start}, and look at the warnings "
            f"and completions of {model}; a lower learning rate is the first thing to try."
        )
    if change.low <= 0:
        return (
            f"{model} cannot be told from {card.start}, the model it started from: {how}. Evaluate on more problems, or train "
            "for longer."
        )
    return None


def points(change: Interval, unit: Unit) -> str:
    """A difference with its interval: `+38.1 pts (+34.9 to +41.3)`, in points of a per cent for shares."""
    scale, form = (100, "{:+.1f}") if unit == "share" else (1, "{:+.3g}")
    value, low, high = (form.format(scale * end).replace("-", "\u2212") for end in (change.value, change.low, change.high))
    return f"{value}{' pts' if unit == 'share' else ''}" + (f" ({low} to {high})" if change.known else "")
