"""Many annotators at once on a server of its own, and its sudden death: nothing is lost, nothing is doubled."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx
import pytest
from ranked import Server, all_rows, check_whole, filled, server

from posttrain.annotate import tables

ITEM = re.compile(r'data-item="(\d+)"')


def rank_until(server: Server, name: str, *, most: int, acknowledged: dict[str, tuple[int, str]], dead: threading.Event) -> None:
    """Rank like a person in a hurry: some submissions are sent twice, some are undone; ends when the server is gone."""
    draw = Random(name)
    try:
        with contextlib.closing(server.client(name)) as client:
            for _ in range(most):
                found = ITEM.search(client.get("/").text)
                if found is None:
                    return
                key, item = os.urandom(8).hex(), int(found[1])
                body = {"item": item, "key": key, "verdict": "order", "places": draw.sample((1, 2, 3), 3)}
                for _ in range(2 if draw.random() < 0.2 else 1):
                    answer = client.post("/rank", json=body)
                    assert answer.status_code == 200, answer.text
                acknowledged[key] = (item, name)
                if draw.random() < 0.1:
                    undone = os.urandom(8).hex()
                    assert client.post("/undo", json={"key": undone}).status_code == 200
                    acknowledged[undone] = (item, name)
    except httpx.TransportError:
        assert dead.is_set(), "the server stopped answering"


def crowd(server: Server, names: list[str], *, most: int, kill_after: int | None = None) -> dict[str, tuple[int, str]]:
    """All annotators at once; perhaps the server is killed when so many changes are acknowledged."""
    acknowledged: dict[str, tuple[int, str]] = {}
    dead, done = threading.Event(), threading.Event()

    def killer() -> None:
        while not done.wait(0.005):
            if kill_after is not None and len(acknowledged) >= kill_after:
                dead.set()
                server.kill()
                return

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            work = [pool.submit(rank_until, server, n, most=most, acknowledged=acknowledged, dead=dead) for n in names]
        for one in work:
            one.result()
    finally:
        done.set()
        thread.join()
    return acknowledged


def check(database: str | Path, acknowledged: dict[str, tuple[int, str]]) -> None:
    """Everything that was acknowledged is there, once."""
    engine = tables.opened(database, create=False)
    names = {row["id"]: row["name"] for row in all_rows(engine, "annotators")}
    events = {row["key"]: (row["item_id"], names[row["annotator_id"]]) for row in all_rows(engine, "events")}
    assert len(events) == len(all_rows(engine, "events"))
    assert acknowledged.items() <= events.items()
    check_whole(engine)


def all_at_once(database: str | Path, *, annotators: int, items: int, each: int) -> None:
    """Each annotator ranks `each` items; the items get as many rankings as they can share evenly."""
    names = [f"annotator {number}" for number in range(annotators)]
    filled(database, items)
    with server(database, names) as running:
        acknowledged = crowd(running, names, most=each)
    check(database, acknowledged)
    engine = tables.opened(database, create=False)
    labels = Counter(row["labels"] for row in all_rows(engine, "items"))
    total = sum(count * number for count, number in labels.items())
    undone = sum(row["what"] == "undone" for row in all_rows(engine, "events"))
    assert total == annotators * each - undone
    # even but for undone ones, whose annotators turn back to the same item, and the few that were open at the end
    assert max(labels) - min(labels) <= 2, labels


def killed_in_the_middle(database: str | Path, *, annotators: int, items: int, after: int) -> None:
    """Kill, start again on the same database, go on to the end of all items."""
    names = [f"annotator {number}" for number in range(annotators)]
    filled(database, items)
    with server(database, names) as running:
        before = crowd(running, names, most=items * 2, kill_after=after)
    assert len(before) >= after
    check(database, before)
    with server(database, names) as running:
        after_all = {**before, **crowd(running, names, most=items * 3)}
    check(database, after_all)
    engine = tables.opened(database, create=False)
    assert {row["labels"] for row in all_rows(engine, "items")} == {annotators}  # everyone ranked everything, once


def test_fifty_annotators_at_once(tmp_path: Path) -> None:
    all_at_once(tmp_path / "r.db", annotators=50, items=20, each=2)


def test_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    killed_in_the_middle(tmp_path / "r.db", annotators=6, items=6, after=15)


@pytest.mark.slow
def test_fifty_annotators_rank_hundreds_of_items(tmp_path: Path) -> None:
    all_at_once(tmp_path / "r.db", annotators=50, items=200, each=40)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 50, 400])
def test_a_server_that_fifty_use_is_killed(tmp_path: Path, after: int) -> None:
    killed_in_the_middle(tmp_path / "r.db", annotators=50, items=20, after=after)
