"""Turns: who ranks what next, each ranking once, undo, and what the database refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from ranked import all_rows, answer_number, check_whole, filled, person, rank_next, some_items
from sqlalchemy import Engine, text, update

from posttrain.annotate import items, people, tables, turns
from posttrain.errors import ConfigError, DataError


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Four items of three responses."""
    return filled(tmp_path / "r.db", 4)


def test_the_least_ranked_item_comes_first_and_open_ones_count(engine: Engine) -> None:
    ada, ben, chi = (person(engine, name) for name in ("ada", "ben", "chi"))
    assert rank_next(engine, ada, [0, 1, 2]) == 1
    assert rank_next(engine, ben, [0, 1, 2]) == 2  # item 1 has a ranking already
    opened = turns.next_turn(engine, ada)
    assert opened is not None
    assert opened.item == 3
    assert rank_next(engine, chi, [0, 1, 2]) == 4  # 3 is open with ada
    assert turns.next_turn(engine, ada) == opened  # an open item stays open


def test_an_item_that_lies_open_too_long_is_free_again(engine: Engine) -> None:
    ada, ben = person(engine, "ada"), person(engine, "ben")
    turn = turns.next_turn(engine, ada)
    assert turn is not None
    assert turn.item == 1
    with tables.changing(engine) as connection:
        connection.execute(update(tables.assignments).values(at=time.time() - turns.LEASE_SECONDS - 1))
    assert rank_next(engine, ben, [0, 1, 2]) == 1


def test_among_equals_the_most_disagreed_comes_first(engine: Engine) -> None:
    ada, ben, chi = (person(engine, name) for name in ("ada", "ben", "chi"))
    for _ in range(4):
        rank_next(engine, ada, [0, 1, 2])
    for _ in range(4):
        turn = turns.next_turn(engine, ben)
        assert turn is not None
        places = {1: [0, 1, 2], 2: [0, 2, 1], 3: [2, 1, 0], 4: [0, 1, 1]}[turn.item]  # apart: 0, 1/3, 1, 1/6
        rank_next(engine, ben, places)
    assert [row["disagreement"] for row in all_rows(engine, "items")] == pytest.approx([0, 1 / 3, 1, 1 / 6])
    assert [rank_next(engine, chi, [0, 1, 2]) for _ in range(4)] == [3, 2, 4, 1]
    assert turns.next_turn(engine, chi) is None
    check_whole(engine)


def test_places_come_back_by_the_response_whatever_the_page_showed(engine: Engine) -> None:
    for name in ("ada", "ben", "chi", "dan"):
        someone = person(engine, name)
        for _ in range(4):
            rank_next(engine, someone, [1, 0, 1])
    found = all_rows(engine, "rankings")
    assert len(found) == 16
    assert {row["places"] for row in found} == {"[1, 0, 1]"}
    shown = [tuple(json.loads(row["shown"])) for row in found]
    assert len(set(shown)) > 3  # of six orders
    assert all(sorted(order) == [0, 1, 2] for order in shown)


def test_the_order_of_the_page_is_even() -> None:
    first = [turns.shuffled(f"item {number}", "ada", 4)[0] for number in range(4000)]
    assert all(abs(first.count(response) - 1000) < 120 for response in range(4))  # 120 is 4.4 standard deviations


def test_a_submission_counts_once(engine: Engine) -> None:
    ada = person(engine, "ada")
    for _ in range(3):
        turns.submit(engine, ada, item=1, key="the-same-key", verdict="order", places=[1, 2, 3])
    assert len(all_rows(engine, "rankings")) == 1
    assert len(all_rows(engine, "events")) == 1
    with pytest.raises(turns.Conflict, match="ranked this item already"):
        turns.submit(engine, ada, item=1, key="another-key", verdict="bad")
    with pytest.raises(turns.Conflict, match="used for something else"):
        turns.submit(engine, ada, item=2, key="the-same-key", verdict="bad")
    with pytest.raises(turns.Conflict, match="used for something else"):
        turns.submit(engine, person(engine, "ben"), item=1, key="the-same-key", verdict="bad")
    check_whole(engine)


def test_undo_takes_back_one_after_another_and_is_recorded(engine: Engine) -> None:
    ada = person(engine, "ada")
    first, second = rank_next(engine, ada, [0, 1, 2]), rank_next(engine, ada, [2, 0, 0])
    undone = turns.undo(engine, ada, key="undo-key-1")
    assert undone == turns.undo(engine, ada, key="undo-key-1")  # sent again
    turn = turns.next_turn(engine, ada)
    assert turn is not None
    assert (turn.item, turn.digest) == (second, undone.digest if undone else None)
    assert undone is not None
    assert undone.places == [[1, 0, 0][answer_number(response)] for response in turn.responses]
    assert turns.progress(engine, ada) == turns.Progress(1, 4)
    assert turns.undo(engine, ada, key="undo-key-2") is not None
    turn = turns.next_turn(engine, ada)
    assert turn is not None
    assert turn.item == first
    assert turns.undo(engine, ada, key="undo-key-3") is None
    assert [row["what"] for row in all_rows(engine, "events")] == ["ranked", "ranked", "undone", "undone"]
    check_whole(engine)


def test_a_submission_that_comes_again_after_its_undo_stays_undone(engine: Engine) -> None:
    ada = person(engine, "ada")
    turns.submit(engine, ada, item=1, key="first-try", verdict="bad")
    turns.undo(engine, ada, key="undo-first-try")
    turns.submit(engine, ada, item=1, key="first-try", verdict="bad")
    assert all_rows(engine, "rankings") == []
    with pytest.raises(turns.Conflict):
        turns.undo(engine, ada, key="first-try")
    check_whole(engine)


def test_imported_comparisons_are_not_undone(engine: Engine) -> None:
    item = some_items(1)[0]
    said = items.Item(item.prompt, item.responses, item.models, item.info, "ada", "order", [0, 1, 2])
    assert items.add(engine, [said, said]) == items.Added(0, 1, 4)
    ada = person(engine, "ada")
    assert turns.undo(engine, ada, key="undo-key-1") is None
    assert rank_next(engine, ada, [0, 1, 2]) == 2
    check_whole(engine)


def test_skips_and_all_bad(engine: Engine) -> None:
    ada = person(engine, "ada")
    rank_next(engine, ada, None, verdict="skip")
    rank_next(engine, ada, None, verdict="bad")
    assert [row["labels"] for row in all_rows(engine, "items")] == [0, 1, 0, 0]
    assert [row["places"] for row in all_rows(engine, "rankings")] == [None, "[0, 0, 0]"]
    assert rank_next(engine, ada, [0, 0, 0]) == 3  # the skipped item does not come again
    undone = turns.undo(engine, ada, key="undo-key-1")
    assert undone is not None
    assert undone.places == [0, 0, 0]


@pytest.mark.parametrize("places", [None, [], [1, 2], [1, 2, 3, 4]])
def test_places_that_do_not_fit_are_refused(engine: Engine, places: list[int] | None) -> None:
    with pytest.raises(DataError, match="the item has 3 responses"):
        turns.submit(engine, person(engine, "ada"), item=1, key="some-key", verdict="order", places=places)
    with pytest.raises(DataError, match="there is no item 99"):
        turns.submit(engine, person(engine, "ada"), item=99, key="some-key", verdict="bad")
    assert all_rows(engine, "events") == []


def test_tokens(engine: Engine) -> None:
    one, two = people.new_token(engine, "ada"), people.new_token(engine, "ada")
    assert people.signed_in(engine, one) == people.signed_in(engine, two) == people.Annotator(1, "ada")
    for wrong in ("", ".", one[:-1], one + "x", one.partition(".")[0], one.partition(".")[0] + "." + two.partition(".")[2]):
        assert people.signed_in(engine, wrong) is None
    kept = json.dumps(all_rows(engine, "tokens"))
    assert one.partition(".")[2] not in kept  # the secret is not in the database
    assert people.revoke(engine, "ada") == 2
    assert people.signed_in(engine, one) is None
    assert not people.anybody(engine)
    with pytest.raises(ConfigError, match="no such annotator"):
        people.revoke(engine, "bob")
    for name in ("", " ada", "a" * 61, "a\nb"):
        with pytest.raises(ConfigError, match="expected 1 to 60"):
            people.new_token(engine, name)


def test_the_database_is_careful(engine: Engine) -> None:
    with engine.connect() as connection:
        found = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "foreign_keys", "synchronous")
        }
        assert found == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2}
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 30_000


def test_what_is_no_database_of_rankings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no database"):
        tables.opened(tmp_path / "none.db", create=False)
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "text.db").write_text("this is a text, and it is long enough to be no database\n" * 40)
    with pytest.raises(ConfigError, match="cannot be opened: file is not a database"):
        tables.opened(tmp_path / "text.db")
    (tmp_path / "empty.db").write_text("")
    with pytest.raises(ConfigError, match="holds no rankings"):
        tables.opened(tmp_path / "empty.db", create=False)
    with pytest.raises(ConfigError, match="expected a file in a folder that exists"):
        tables.opened(tmp_path / "no" / "such.db")
    with pytest.raises(ConfigError, match="expected a file"):
        tables.opened("mysql://root@localhost/x")
    engine = tables.opened(tmp_path / "newer.db")
    with tables.changing(engine) as connection:
        connection.execute(update(tables.turn).values(version=2))
    with pytest.raises(ConfigError, match="version 2"):
        tables.opened(tmp_path / "newer.db")
