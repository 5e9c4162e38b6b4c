"""What annotators said, as rows to train on: pairs, rankings, or everything as it was said.

Skips say nothing.  "All bad" is no vote between responses, and an item that at least half of its annotators call all bad
gives neither a pair nor a ranking: nothing in it is worth preferring.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select

from posttrain.annotate.agreement import Judged
from posttrain.annotate.tables import annotators, items, rankings
from posttrain.errors import ConfigError, DataError, nearest
from posttrain.files import atomic_write


@dataclass(frozen=True)
class Said:
    """One ranking with whose it is."""

    annotator: str
    verdict: str
    places: list[int] | None
    shown: list[int] | None
    seconds: float | None
    at: float


@dataclass(frozen=True)
class Ranked:
    """An item with everything that was said of it."""

    id: int
    prompt: list[dict[str, Any]]
    responses: list[list[dict[str, Any]]]
    models: list[str | None]
    info: dict[str, Any]
    said: list[Said]

    @property
    def name(self) -> str:
        """Its id in exports: the row's own, else its number."""
        return str(self.info.get("id") or f"item-{self.id}")

    @property
    def orders(self) -> list[list[int]]:
        """The places that count; none where the item is called all bad."""
        bad = sum(one.verdict == "bad" for one in self.said)
        orders = [one.places for one in self.said if one.verdict == "order" and one.places is not None]
        return orders if bad < len(orders) else []


def ranked_items(engine: Engine) -> list[Ranked]:
    """All items that somebody ranked or skipped, in the order in which they came."""
    with engine.connect() as connection:
        rows = connection.execute(
            select(rankings, annotators.c.name)
            .join(annotators, annotators.c.id == rankings.c.annotator_id)
            .order_by(rankings.c.item_id, rankings.c.id)
        ).mappings()
        said: dict[int, list[Said]] = {}
        for row in rows:
            places, shown = (None if row[key] is None else json.loads(row[key]) for key in ("places", "shown"))
            one = Said(row["name"], row["verdict"], places, shown, row["seconds"], row["at"])
            said.setdefault(row["item_id"], []).append(one)
        found = []
        for row in connection.execute(select(items).order_by(items.c.id)).mappings():
            if row["id"] in said:
                prompt, responses, models, info = (json.loads(row[key]) for key in ("prompt", "responses", "models", "info"))
                found.append(Ranked(row["id"], prompt, responses, models, info, said[row["id"]]))
    return found


def judged(engine: Engine) -> list[Judged]:
    """All rankings but skips, as the statistics read them."""
    return [
        Judged(item.id, one.annotator, one.places, one.shown)
        for item in ranked_items(engine)
        for one in item.said
        if one.places is not None
    ]


def pairs(engine: Engine) -> Iterator[dict[str, Any]]:
    """`prompt`, `chosen`, `rejected`, and `columns.preference`: the share of annotators that prefer the chosen one.

    Every two responses of an item are a pair; a tie is half a vote for each, and pairs without a majority are left out.
    """
    for item in ranked_items(engine):
        for one, other in combinations(range(len(item.responses)), 2):
            for_one = sum(places[one] < places[other] for places in item.orders)
            for_other = sum(places[one] > places[other] for places in item.orders)
            if for_one == for_other:
                continue
            better, worse = (one, other) if for_one > for_other else (other, one)
            votes = {"chosen": max(for_one, for_other), "rejected": min(for_one, for_other)}
            tied = len(item.orders) - for_one - for_other
            yield {
                **item.info,
                "id": f"{item.name}:{better}>{worse}",
                "prompt": item.prompt,
                "chosen": item.responses[better],
                "rejected": item.responses[worse],
                "columns": {"preference": (votes["chosen"] + tied / 2) / len(item.orders)},
                "votes": {**votes, "tied": tied},
                "models": [item.models[better], item.models[worse]],
            }


def consensus(item: Ranked) -> dict[str, Any] | None:
    """`prompt`, `responses`, `ranking`: numbers of responses, best first, by their mean place over annotators.

    Responses with the same mean place are put in an order drawn from the item alone; `places` shows them.  An item
    whose responses all have the same mean place says nothing and gives no row.
    """
    if not item.orders:
        return None
    mean = [sum(places[number] for places in item.orders) / len(item.orders) for number in range(len(item.responses))]
    if len(set(mean)) == 1:
        return None
    drawn = [hashlib.sha256(f"{item.id}/{number}".encode()).digest() for number in range(len(mean))]
    ranking = sorted(range(len(mean)), key=lambda number: (mean[number], drawn[number]))
    row = {"id": item.name, "prompt": item.prompt, "responses": item.responses, "ranking": ranking}
    return {**item.info, **row, "places": mean, "models": item.models, "annotators": len(item.orders)}


def consensus_rankings(engine: Engine) -> Iterator[dict[str, Any]]:
    """The `consensus` of every item."""
    yield from (row for item in ranked_items(engine) if (row := consensus(item)) is not None)


def dataset(engine: Engine) -> Iterator[dict[str, Any]]:
    """Everything that was said, a row a ranking, each with the same columns: `datasets` loads it, and so does `rank`."""
    for item in ranked_items(engine):
        for one in item.said:
            yield {
                "id": item.name,
                "prompt": item.prompt,
                "responses": item.responses,
                "models": item.models,
                "annotator": one.annotator,
                "verdict": one.verdict,
                "places": one.places,
                "shown": one.shown,
                "seconds": one.seconds,
                "at": one.at,
            }


KINDS: Mapping[str, Callable[[Engine], Iterator[dict[str, Any]]]] = {
    "pairs": pairs,
    "rankings": consensus_rankings,
    "dataset": dataset,
}


def export(engine: Engine, kind: str, out: Path) -> int:
    """Write one of `KINDS` as a JSONL file, whole or not at all; how many rows.

    Raises:
        ConfigError: There is no such kind, or the file is not called .jsonl.
        DataError: Nothing was ranked that could be written.
    """
    if kind not in KINDS:
        raise ConfigError(f"--as {kind}: there is no such export{nearest(kind, KINDS)}")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: expected a file that ends in .jsonl")
    rows: Sequence[dict[str, Any]] = list(KINDS[kind](engine))
    if not rows:
        raise DataError(f"no {kind} to export; expected an item that somebody ranked, with a preference in it")
    atomic_write(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)
