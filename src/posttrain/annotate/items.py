"""Rows become items: a prompt with 2 to 8 responses, and with them the comparisons that a file holds already."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select

from posttrain.annotate.people import known
from posttrain.annotate.tables import changing, items, rankings
from posttrain.annotate.turns import Verdict, dense, record
from posttrain.data.rows import load_rows
from posttrain.errors import DataError

FEWEST, MOST = 2, 8
"""Responses of an item."""

IMPORTED = "imported"
"""The annotator of comparisons that do not say whose they are."""

_USED = {"prompt", "responses", "ranking", "places", "verdict", "chosen", "rejected", "models", "annotator", "shown", "columns"}


@dataclass(frozen=True)
class Item:
    """What is ranked, and what is known of it.

    Example:
        >>> asked = [{"role": "user", "content": "2 + 2?"}]
        >>> answers = [[{"role": "assistant", "content": text}] for text in ("4", "5")]
        >>> Item(asked, answers).models
        [None, None]
    """

    prompt: list[dict[str, Any]]
    responses: list[list[dict[str, Any]]]
    models: list[str | None] = field(default_factory=list)
    """Who wrote each response; annotators do not see it."""
    info: dict[str, Any] = field(default_factory=dict)
    """The row's other keys, which exports give back."""
    annotator: str = IMPORTED
    verdict: Verdict | None = None
    """What the annotator said, where the row holds a comparison."""
    places: list[int] | None = None

    def __post_init__(self) -> None:
        if not FEWEST <= len(self.responses) <= MOST:
            raise DataError(f"{len(self.responses)} responses; expected {FEWEST} to {MOST}")
        if not self.models:
            object.__setattr__(self, "models", [None] * len(self.responses))
        if len(self.models) != len(self.responses):
            raise DataError(f"{len(self.models)} models for {len(self.responses)} responses; expected one each")

    @property
    def digest(self) -> str:
        """What makes it this item: prompt and responses."""
        text = json.dumps([self.prompt, self.responses], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Added:
    """What came new into a database."""

    items: int
    comparisons: int
    total: int  # items that are there now


def read_items(source: str | Path, **options: Any) -> list[Item]:
    """The items of a file.

    Rows are `prompt` + `responses` (texts or lists of messages), perhaps with `models` (who wrote each); with `ranking`
    (best first) or `places` (equal is tied), perhaps with `annotator` and `verdict`, they are comparisons as well;
    `chosen` + `rejected` is a comparison of two.

    Args:
        source: See `data.rows.load_rows`.
        options: Of `load_rows`: `rename`, `limit`, `skip_invalid`.

    Raises:
        DataError: A row that cannot be ranked; the message has file and line.
    """
    found = []
    for row in load_rows(source, **options):
        try:
            found.append(as_item(row))
        except DataError as cause:
            raise DataError(f"{row.get('_source', source)}: {cause}") from None
    return found


def as_item(row: Mapping[str, Any]) -> Item:
    """One normalised row as an item; see `read_items`."""
    rest = {key: value for key, value in row.items() if key not in _USED and not key.startswith("_")}
    models, annotator = list(row.get("models") or []), str(row.get("annotator") or IMPORTED)
    if "chosen" in row:
        sides = [row["chosen"], row["rejected"]]
        return Item(row["prompt"], sides, models, rest, annotator, "order", [0, 1])
    if "responses" not in row:
        raise DataError(f"nothing to rank (found: {', '.join(rest)}); expected prompt + responses, or chosen + rejected")
    if not isinstance(row["responses"], list):
        raise DataError(f"'responses' is a {type(row['responses']).__name__}; expected a list of {FEWEST} to {MOST}")
    responses = [_messages(response, number) for number, response in enumerate(row["responses"])]
    item = Item(row["prompt"], responses, models, rest)
    verdict, places = _comparison(row, len(responses))
    return item if verdict is None else Item(item.prompt, responses, models, rest, annotator, verdict, places)


def _messages(response: Any, number: int) -> list[dict[str, Any]]:
    found = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    whole = isinstance(found, list) and found and all(isinstance(message, Mapping) and "role" in message for message in found)
    if not whole or not any(message.get("content") for message in found):
        raise DataError(f"'responses'[{number}] is {str(response)[:40]!r}; expected a text, or a list of messages, not empty")
    return [dict(message) for message in found]


def _comparison(row: Mapping[str, Any], count: int) -> tuple[Verdict | None, list[int] | None]:
    """What a row says of its responses already."""
    verdict = row.get("verdict")
    if verdict not in (None, "order", "bad", "skip"):
        raise DataError(f"'verdict' is {verdict!r}; expected order, bad or skip")
    if verdict in ("bad", "skip"):
        return verdict, ([0] * count if verdict == "bad" else None)
    if row.get("ranking") is not None:  # the rows' format has been checked where they were read
        return "order", [row["ranking"].index(number) for number in range(count)]
    places = row.get("places")
    if places is None:
        return None, None
    if not isinstance(places, list) or len(places) != count or not all(isinstance(place, int | float) for place in places):
        raise DataError(f"'places' is {places!r}; expected {count} numbers, one a response, smaller is better")
    return "order", dense(places)


def add(engine: Engine, found: Sequence[Item]) -> Added:
    """Put items and comparisons into the database; what is there already stays as it is and is not doubled."""
    new = compared = 0
    with changing(engine) as connection:
        for item in found:
            number, fresh = _placed(connection, item)
            new += fresh
            if item.verdict is not None:
                compared += _said(connection, number, item)
        total = connection.execute(select(func.count()).select_from(items)).scalar_one()
    return Added(new, compared, total)


def _placed(connection: Connection, item: Item) -> tuple[int, bool]:
    """The number of an item, and whether it is new."""
    there = connection.execute(select(items.c.id).where(items.c.digest == item.digest)).scalar()
    if there is not None:
        return int(there), False
    texts = {name: json.dumps(getattr(item, name), ensure_ascii=False) for name in ("prompt", "responses", "models", "info")}
    made = connection.execute(insert(items).values(digest=item.digest, labels=0, disagreement=0.0, **texts))
    return int(made.inserted_primary_key[0]), True  # type: ignore[index]


def _said(connection: Connection, number: int, item: Item) -> bool:
    """Record the comparison that came with an item, unless this annotator has ranked it."""
    assert item.verdict is not None
    person = known(connection, item.annotator)
    there = select(rankings.c.id).where(rankings.c.item_id == number, rankings.c.annotator_id == person.id)
    if connection.execute(there).first():
        return False
    about: dict[str, Any] = {"shown": None, "seconds": None, "at": time.time(), "key": None}
    record(connection, person.id, number, item.verdict, item.places, **about)
    return True
