"""The numbers of the agreement page, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from sqlalchemy import Engine, func, select

from posttrain.annotate.agreement import alpha, cohen, first_wins, fleiss
from posttrain.annotate.exports import judged, ranked_items
from posttrain.annotate.tables import annotators, events, items
from posttrain.report.statistics import Interval

MOST_PAIRS = 45
"""Pairs of annotators that are listed (ten annotators); those with the most items in common come first."""


@dataclass(frozen=True)
class Person:
    """What one annotator did."""

    name: str
    ranked: int
    ties: int  # rankings that tie at least two responses, all bad aside
    bad: int
    skipped: int
    undone: int
    seconds: float | None  # the median of a ranking
    first_wins: Interval


@dataclass(frozen=True)
class Figures:
    """What the agreement page shows."""

    items: int
    ranked: int  # items with a ranking
    shared: int  # items with two or more
    rankings: int
    alpha: Interval
    fleiss: Interval | None  # where three or more annotators ranked
    pairs: list[tuple[str, str, Interval]]  # Cohen's kappa
    pairs_left_out: int
    people: list[Person]


def figures(engine: Engine) -> Figures:
    """Everything that was ranked, in numbers; all intervals have 95 % coverage."""
    said, found = judged(engine), ranked_items(engine)
    with engine.connect() as connection:
        total = connection.execute(select(func.count()).select_from(items)).scalar_one()
        counted = select(annotators.c.name, func.count()).join(annotators, annotators.c.id == events.c.annotator_id)
        times = connection.execute(counted.where(events.c.what == "undone").group_by(annotators.c.name))
        undone: dict[str, int] = dict(times.tuples().all())
    each: dict[str, list[Any]] = {}
    for item in found:
        for one in item.said:
            each.setdefault(one.annotator, []).append(one)
    rankers: dict[str, set[int]] = {}
    for one_judged in said:
        rankers.setdefault(one_judged.annotator, set()).add(one_judged.item)
    couples = sorted(combinations(sorted(rankers), 2), key=lambda pair: -len(rankers[pair[0]] & rankers[pair[1]]))
    couples = [pair for pair in couples if rankers[pair[0]] & rankers[pair[1]]]
    labels = [sum(one.places is not None for one in item.said) for item in found]
    people = []
    for name in sorted(each):
        timed = [one.seconds for one in each[name] if one.seconds is not None and one.verdict != "skip"]
        orders = [one.places for one in each[name] if one.verdict == "order"]
        people.append(
            Person(
                name,
                ranked=sum(one.verdict != "skip" for one in each[name]),
                ties=sum(len(set(places)) < len(places) for places in orders),
                bad=sum(one.verdict == "bad" for one in each[name]),
                skipped=sum(one.verdict == "skip" for one in each[name]),
                undone=undone.get(name, 0),
                seconds=median(timed) if timed else None,
                first_wins=first_wins(said, name),
            )
        )
    return Figures(
        items=total,
        ranked=sum(count > 0 for count in labels),
        shared=sum(count > 1 for count in labels),
        rankings=sum(labels),
        alpha=alpha(said),
        fleiss=fleiss(said) if len(rankers) > 2 else None,
        pairs=[(one, other, cohen(said, one, other)) for one, other in couples[:MOST_PAIRS]],
        pairs_left_out=max(0, len(couples) - MOST_PAIRS),
        people=people,
    )
