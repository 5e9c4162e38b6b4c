"""What the tests of ranking share: items, a database, annotators, a server in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from small import assistant, user
from sqlalchemy import Engine, select

from posttrain.annotate import items, people, tables, turns


def rows(count: int, responses: int = 3) -> list[dict[str, Any]]:
    """Questions with numbered answers, each by a model of its own."""
    return [
        {
            "id": f"q{number}",
            "prompt": f"Question {number}?",
            "responses": [f"Answer {number}.{answer}" for answer in range(responses)],
            "models": [f"model-{answer}" for answer in range(responses)],
        }
        for number in range(count)
    ]


def some_items(count: int, responses: int = 3) -> list[items.Item]:
    """The same as items."""
    return [
        items.Item(user(row["prompt"]), [assistant(text) for text in row["responses"]], row["models"], {"id": row["id"]})
        for row in rows(count, responses)
    ]


def filled(database: str | Path, count: int, responses: int = 3) -> Engine:
    """A database with items."""
    engine = tables.opened(database)
    items.add(engine, some_items(count, responses))
    return engine


def person(engine: Engine, name: str) -> people.Annotator:
    """An annotator who can sign in."""
    found = people.signed_in(engine, people.new_token(engine, name))
    assert found is not None
    return found


def answer_number(response: list[dict[str, Any]]) -> int:
    """The number of an answer among those to its question, as its text says."""
    return int(response[0]["content"].rpartition(".")[2])


def rank_next(engine: Engine, annotator: people.Annotator, places: Sequence[int] | None, *, verdict: Any = "order") -> int:
    """Rank the open item; `places` are by the answers' own numbers.  Gives the item."""
    turn = turns.next_turn(engine, annotator)
    assert turn is not None
    shown = None if places is None else [places[answer_number(response)] for response in turn.responses]
    key = f"key-{annotator.name}-{os.urandom(6).hex()}"
    turns.submit(engine, annotator, item=turn.item, key=key, verdict=verdict, places=shown)
    return turn.item


def all_rows(engine: Engine, name: str) -> list[dict[str, Any]]:
    """A whole table."""
    with engine.connect() as connection:
        found = connection.execute(select(tables.metadata.tables[name]).order_by("id")).mappings()
        return [dict(row) for row in found]


def check_whole(engine: Engine) -> None:
    """Rankings are what their events leave of them, none twice, and the items count them."""
    left: dict[tuple[int, int], str] = {}
    for event in all_rows(engine, "events"):
        place = (event["item_id"], event["annotator_id"])
        if event["what"] == "undone":
            assert place in left
            del left[place]
        else:
            assert place not in left, "ranked twice"
            left[place] = event["key"]
    found = all_rows(engine, "rankings")
    assert {(row["item_id"], row["annotator_id"]): row["key"] for row in found} == left
    assert len(found) == len(left)
    for item in all_rows(engine, "items"):
        mine = [row for row in found if row["item_id"] == item["id"] and row["verdict"] != "skip"]
        assert item["labels"] == len(mine)


@dataclass
class Server:
    """A server in a process of its own."""

    database: str | Path
    process: subprocess.Popen[str]
    links: dict[str, str]
    said: list[str]

    @property
    def address(self) -> str:
        """Where it listens."""
        return next(iter(self.links.values())).split("/enter")[0]

    def client(self, name: str) -> httpx.Client:
        """An annotator who is signed in."""
        return signed_in(self.address, self.links[name].partition("#")[2])

    def kill(self) -> None:
        """As the power goes."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def signed_in(address: str, token: str) -> httpx.Client:
    """A client with the cookie of a token."""
    client = httpx.Client(
        base_url=address, headers={"Origin": address}, timeout=60, verify=False
    )  # loading certificates takes longest
    assert client.post("/enter", data={"token": token}).status_code == 303
    return client


@contextmanager
def server(database: str | Path, names: Sequence[str], *options: str) -> Iterator[Server]:
    """`posttrain rank` on a free port."""
    annotators = [word for name in names for word in ("--annotator", name)]
    command = [sys.executable, "-m", "posttrain", "rank", "--database", str(database), "--port", "0", *annotators, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        links: dict[str, str] = {}
        said: list[str] = []
        assert process.stdout is not None
        while len(links) < max(1, len(names)):
            line = process.stdout.readline()
            said.append(line)
            assert line, f"the server ended: {said}"
            if "/enter#" in line:
                name, _, link = line.strip().partition(": ")
                links[name] = link
        yield Server(database, process, links, said)
    finally:
        process.kill()
        process.wait()
