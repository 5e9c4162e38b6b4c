"""Who ranks what next, and what becomes of a ranking.

An annotator has one open item.  The next one is that with the fewest rankings, those counted that others are at work on
right now; among equals the one its annotators disagree on most, then the one that came first.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from sqlalchemy import Connection, Engine, RowMapping, delete, exists, func, insert, select, update

from posttrain.annotate.agreement import disagreement
from posttrain.annotate.people import Annotator
from posttrain.annotate.tables import assignments, changing, events, items, rankings
from posttrain.errors import DataError

Verdict = Literal["order", "bad", "skip"]

LEASE_SECONDS = 900.0
"""How long an item that somebody has open counts as if it were ranked."""


class Conflict(DataError):
    """A submission that what is there already stands against."""


@dataclass(frozen=True)
class Turn:
    """An item as one annotator sees it."""

    item: int
    digest: str
    prompt: list[dict[str, Any]]
    responses: list[list[dict[str, Any]]]  # in the order of the page


@dataclass(frozen=True)
class Undone:
    """What was taken back."""

    digest: str
    verdict: Verdict
    places: list[int] | None  # in the order of the page


@dataclass(frozen=True)
class Progress:
    """How far an annotator is."""

    done: int
    total: int


def shuffled(digest: str, annotator: str, count: int) -> list[int]:
    """The order of the page: response numbers, the same whenever the same annotator sees the same item.

    Example:
        >>> sorted(shuffled("an item", "ada", 4)), shuffled("an item", "ada", 4) == shuffled("an item", "ada", 4)
        ([0, 1, 2, 3], True)
    """
    order = list(range(count))
    Random(hashlib.sha256(f"{digest}/{annotator}".encode()).digest()).shuffle(order)
    return order


def dense(places: Sequence[int]) -> list[int]:
    """Places without gaps, from 0.

    Example:
        >>> dense([4, 1, 4, 2])
        [2, 0, 2, 1]
    """
    levels = {place: level for level, place in enumerate(sorted(set(places)))}
    return [levels[place] for place in places]


def next_turn(engine: Engine, annotator: Annotator) -> Turn | None:
    """The annotator's open item, else the most useful one, which becomes theirs; None where all are done."""
    with engine.connect() as connection:
        row = _open_item(connection, annotator)
    if row is None:
        with changing(engine) as connection:
            row = _open_item(connection, annotator) or _most_useful(connection, annotator)
            if row is None:
                return None
            connection.execute(delete(assignments).where(assignments.c.annotator_id == annotator.id))
            connection.execute(insert(assignments).values(annotator_id=annotator.id, item_id=row["id"], at=time.time()))
    responses = json.loads(row["responses"])
    order = shuffled(row["digest"], annotator.name, len(responses))
    return Turn(row["id"], row["digest"], json.loads(row["prompt"]), [responses[number] for number in order])


def _mine(annotator: Annotator) -> Any:
    """Has the annotator ranked the item?"""
    return exists(select(1).where(rankings.c.item_id == items.c.id, rankings.c.annotator_id == annotator.id))


def _open_item(connection: Connection, annotator: Annotator) -> RowMapping | None:
    joined = select(items).join(assignments, assignments.c.item_id == items.c.id)
    return connection.execute(joined.where(assignments.c.annotator_id == annotator.id, ~_mine(annotator))).mappings().first()


def _most_useful(connection: Connection, annotator: Annotator) -> RowMapping | None:
    at_work = (
        select(func.count())
        .where(
            assignments.c.item_id == items.c.id,
            assignments.c.annotator_id != annotator.id,
            assignments.c.at > time.time() - LEASE_SECONDS,
        )
        .scalar_subquery()
    )
    best = select(items).where(~_mine(annotator)).order_by(items.c.labels + at_work, items.c.disagreement.desc(), items.c.id)
    return connection.execute(best.limit(1)).mappings().first()


def submit(
    engine: Engine, annotator: Annotator, *, item: int, key: str, verdict: Verdict, places: Sequence[int] | None = None
) -> None:
    """Record a ranking, once: the same key again changes nothing, whatever has happened since.

    Args:
        item: The item's number.
        key: The submission's own name, chosen by the page.
        verdict: "order", "bad" (all of them; counts as all tied) or "skip" (counts as no ranking).
        places: For an order, the place of each response in the order of the page; smaller is better, equal is tied.

    Raises:
        Conflict: The annotator has ranked the item under another key, or the key was used for something else.
        DataError: There is no such item, or the places do not fit it.
    """
    now = time.time()
    with changing(engine) as connection:
        before = connection.execute(select(events).where(events.c.key == key)).mappings().first()
        if before is not None:
            if (before["annotator_id"], before["item_id"], before["what"]) == (annotator.id, item, "ranked"):
                return
            raise Conflict("the key of this submission was used for something else; load the page again")
        row = connection.execute(select(items).where(items.c.id == item)).mappings().first()
        if row is None:
            raise DataError(f"there is no item {item}; load the page again")
        if connection.execute(
            select(rankings.c.id).where(rankings.c.item_id == item, rankings.c.annotator_id == annotator.id)
        ).first():
            raise Conflict("you have ranked this item already, perhaps in another window; undo that first")
        count = len(json.loads(row["responses"]))
        order = shuffled(row["digest"], annotator.name, count)
        stored = _stored(verdict, places, order)
        since = connection.execute(
            select(assignments.c.at).where(assignments.c.annotator_id == annotator.id, assignments.c.item_id == item)
        ).scalar()
        seconds = None if since is None else max(0.0, now - since)
        record(connection, annotator.id, item, verdict, stored, shown=order, seconds=seconds, at=now, key=key)
        mine = (assignments.c.annotator_id == annotator.id, assignments.c.item_id == item)
        connection.execute(delete(assignments).where(*mine))


def _stored(verdict: Verdict, places: Sequence[int] | None, order: Sequence[int]) -> list[int] | None:
    """Places by the response's own number, from those by its position on the page."""
    if verdict == "skip":
        return None
    if verdict == "bad":
        return [0] * len(order)
    if places is None or len(places) != len(order):
        found = "none" if places is None else str(len(places))
        raise DataError(f"the item has {len(order)} responses and the order {found} places; expected one a response")
    stored = [0] * len(order)
    for position, place in enumerate(dense(places)):
        stored[order[position]] = place
    return stored


def record(
    connection: Connection,
    annotator: int,
    item: int,
    verdict: Verdict,
    places: list[int] | None,
    *,
    shown: list[int] | None,
    seconds: float | None,
    at: float,
    key: str | None,
) -> None:
    """Write a ranking, its event, and what follows for the item; `places` by the response's own number."""
    ranking = {
        "verdict": verdict,
        "places": None if places is None else json.dumps(places),
        "shown": None if shown is None else json.dumps(shown),
        "seconds": seconds,
    }
    about = {"annotator_id": annotator, "item_id": item, "at": at, "key": key}
    connection.execute(insert(rankings).values(**about, **ranking))
    what = "imported" if key is None else "ranked"
    connection.execute(insert(events).values(**about, what=what, detail=json.dumps(ranking)))
    _recount(connection, item)


def undo(engine: Engine, annotator: Annotator, *, key: str) -> Undone | None:
    """Take back the annotator's newest ranking, whose item is then open again; None where there is none.

    The same key again gives the same answer and takes nothing further back.

    Raises:
        Conflict: The key was used for something else.
    """
    with changing(engine) as connection:
        before = connection.execute(select(events).where(events.c.key == key)).mappings().first()
        if before is not None:
            if (before["annotator_id"], before["what"]) != (annotator.id, "undone"):
                raise Conflict("the key of this request was used for something else; load the page again")
            return _undone(connection, before["item_id"], json.loads(before["detail"]))
        mine = select(rankings).where(rankings.c.annotator_id == annotator.id, rankings.c.key.is_not(None))
        last = connection.execute(mine.order_by(rankings.c.id.desc()).limit(1)).mappings().first()
        if last is None:
            return None
        detail = {name: last[name] for name in ("verdict", "places", "shown", "seconds")}
        about = {"annotator_id": annotator.id, "item_id": last["item_id"], "at": time.time()}
        connection.execute(delete(rankings).where(rankings.c.id == last["id"]))
        connection.execute(insert(events).values(**about, what="undone", key=key, detail=json.dumps(detail)))
        connection.execute(delete(assignments).where(assignments.c.annotator_id == annotator.id))
        connection.execute(insert(assignments).values(**about))
        _recount(connection, last["item_id"])
        return _undone(connection, last["item_id"], detail)


def _undone(connection: Connection, item: int, detail: dict[str, Any]) -> Undone:
    digest = connection.execute(select(items.c.digest).where(items.c.id == item)).scalar_one()
    if detail["verdict"] != "order":
        return Undone(digest, detail["verdict"], None)
    places, shown = json.loads(detail["places"]), json.loads(detail["shown"])
    return Undone(digest, "order", [places[number] for number in shown])


def _recount(connection: Connection, item: int) -> None:
    """How many rankings an item has, and how far they disagree."""
    found = select(rankings.c.places).where(rankings.c.item_id == item, rankings.c.verdict != "skip")
    places = [json.loads(text) for text in connection.execute(found).scalars()]
    connection.execute(update(items).where(items.c.id == item).values(labels=len(places), disagreement=disagreement(places)))


def progress(engine: Engine, annotator: Annotator) -> Progress:
    """How many items there are, and how many the annotator has ranked or skipped."""
    with engine.connect() as connection:
        total = connection.execute(select(func.count()).select_from(items)).scalar_one()
        done = connection.execute(select(func.count()).where(rankings.c.annotator_id == annotator.id)).scalar_one()
    return Progress(done, total)
