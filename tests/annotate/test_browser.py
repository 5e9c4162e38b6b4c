"""The page in a real browser: by keys alone, by mouse, with reloads in the middle; nothing is lost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, browser
from ranked import Server, all_rows, check_whole, rows, server
from small import jsonl

from posttrain.annotate import tables

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

READY = "document.readyState === 'complete' && document.querySelector('.card.marked')"
PLACES = "[...document.querySelectorAll('.card')].map(c => Number((c.querySelector('input:checked') || {value: 0}).value))"
NUMBERS = "[...document.querySelectorAll('.card .text')].map(t => Number(t.textContent.split('.').pop()))"
DRAFTS = "Object.keys(localStorage).filter(key => key.startsWith(draftName(''))).length"
ITEM = "document.getElementById('rank').dataset.item"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    with browser(tmp_path_factory.mktemp("browser")) as found:
        found.screen(1280, 800)
        yield found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server: twenty items of three responses, and an annotator for each test."""
    folder = tmp_path_factory.mktemp("site")
    data = rows(20)
    data[0]["responses"][0] = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">.0"
    options = ("--data", str(jsonl(folder / "rows.jsonl", data)))
    with server(folder / "r.db", ["keys", "undo", "mouse", "tab", "twice", "narrow"], *options) as found:
        yield found


@dataclass
class Site:
    """A site, and who is signed in."""

    server: Server
    name: str

    @property
    def rankings(self) -> list[dict[str, Any]]:
        """What this annotator ranked, in the order of the items."""
        engine = tables.opened(self.server.database, create=False)
        check_whole(engine)
        who = {row["name"]: row["id"] for row in all_rows(engine, "annotators")}[self.name]
        return sorted((row for row in all_rows(engine, "rankings") if row["annotator_id"] == who), key=lambda row: row["item_id"])


def enter(page: Browser, server: Server, name: str) -> Site:
    """Open the link of an annotator."""
    page.open(server.links[name])
    page.until(f"location.href === '{server.address}/' && {READY} && document.querySelector('.who').textContent === '{name}'")
    page.messages.clear()
    return Site(server, name)


def submit(page: Browser) -> None:
    """Enter, and wait for the next page."""
    before = page.value(ITEM)
    page.press("Enter")
    page.until(f"{ITEM} !== '{before}' && (document.querySelector('.card.marked') || document.body.innerText.includes('All done'))")


def test_twenty_items_by_keys_with_reloads_lose_nothing(running: Server, page: Browser) -> None:
    site = enter(page, running, "keys")
    assert page.value("location.href") == f"{running.address}/"  # the token is gone from the address
    assert page.value("document.title") == "Ranking · posttrain"
    for number in range(20):
        places = [1 + (answer + number) % 3 for answer in page.value(NUMBERS)]  # by the answer, whatever the page shows
        page.press(str(places[0]), str(places[1]))
        if number in (4, 12):  # in the middle of an item
            item = page.value(ITEM)
            page.call("Page.reload")
            page.until(f"performance.getEntriesByType('navigation')[0].type === 'reload' && {READY}")
            assert page.value(ITEM) == item
            assert page.value(PLACES) == [*places[:2], 0]
            assert page.value("document.querySelector('.card.marked').dataset.index") == "2"
        page.press(str(places[2]))
        assert page.value(PLACES) == places
        submit(page)
    assert "All done" in page.value("document.body.innerText")
    assert page.value("document.querySelector('progress').value") == 20
    assert page.value(DRAFTS) == 0
    found = [json.loads(row["places"]) for row in sorted(site.rankings, key=lambda row: row["id"])]
    assert found == [[(answer + number) % 3 for answer in range(3)] for number in range(20)]
    assert page.messages == []  # no error, and nothing that the content policy had to stop


def test_undo_ties_bad_skip_and_moving_by_keys(running: Server, page: Browser) -> None:
    site = enter(page, running, "undo")
    page.press("ArrowRight")
    assert page.value("document.activeElement.dataset.index") == "1"
    page.press("2", "c", "3", "c", "0", "1")
    assert page.value(PLACES) == [0, 2, 1]
    page.press("Enter")  # one has no place: nothing is sent, the mark goes there
    assert page.value("document.activeElement.dataset.index") == "0"
    assert "A has no place yet" in page.value("document.getElementById('status').textContent")
    page.press("1")
    item = page.value(ITEM)
    submit(page)
    page.press("u")
    page.until(f"{ITEM} === '{item}' && {READY}")
    assert page.value(PLACES) == [1, 2, 1]
    submit(page)
    for key in ("x", "s"):
        item = page.value(ITEM)
        page.press(key)
        page.until(f"{ITEM} !== '{item}' && {READY}")
    found = sorted(site.rankings, key=lambda row: row["id"])
    assert [row["verdict"] for row in found] == ["order", "bad", "skip"]
    assert sorted(json.loads(found[0]["places"])) == [0, 0, 1]


def test_the_mouse_drags_letters_to_places_and_out(running: Server, page: Browser) -> None:
    enter(page, running, "mouse")
    grip = "document.querySelectorAll('.grip')[{}]".format
    zone = "document.querySelectorAll('.zone')[{}]".format
    chips = "[...document.querySelectorAll('.zone')].map(z => [...z.querySelectorAll('.chip')].map(c => c.textContent).join(''))"
    for index, place in ((0, 2), (1, 0), (2, 0)):
        page.drag(grip(index), zone(place))
    assert page.value(chips) == ["BC", "", "A"]
    page.drag(zone(0) + ".querySelector('.chip')", zone(1))
    assert page.value(chips) == ["C", "B", "A"]
    assert page.value(PLACES) == [3, 2, 1]
    page.drag(zone(2) + ".querySelector('.chip')", "document.querySelector('.prompt')")
    assert page.value(chips) == ["C", "B", ""]
    assert page.value("document.getElementById('submit').disabled") is True
    page.value("document.querySelectorAll('.card')[0].querySelectorAll('input')[2].click()")
    assert page.value(PLACES) == [3, 2, 1]
    assert page.value("document.getElementById('submit').disabled") is False


def test_a_server_that_is_gone_keeps_the_order(page: Browser, tmp_path: Path) -> None:
    options = ("--data", str(jsonl(tmp_path / "rows.jsonl", rows(2))))
    with server(tmp_path / "r.db", ["gone"], *options) as running:
        site = enter(page, running, "gone")
        page.press("1", "2", "3")
        running.kill()
        page.press("Enter")
        page.until("document.getElementById('status').textContent.includes('Your order is kept')")
        assert page.value(PLACES) == [1, 2, 3]
        assert page.value(DRAFTS) == 1
        assert site.rankings == []


def test_everything_is_reached_by_tab_and_seen(running: Server, page: Browser) -> None:
    enter(page, running, "tab")
    name = "(e => e.id || e.name || e.ariaLabel || e.textContent.trim())(document.activeElement)"
    outlined = "(e => getComputedStyle(e.matches('input') ? e.nextElementSibling : e).outlineStyle)(document.activeElement)"
    seen = set()
    for _ in range(30):
        page.press("Tab")
        if page.value("document.activeElement === document.body"):  # past the end; the next is the first
            continue
        seen.add(page.value(name))
        assert page.value(outlined) == "solid", page.value(name)
    assert {"Response A", "place-A", "Response C", "bad", "skip", "undo", "Agreement", "Sign out"} <= seen


def test_a_second_window_cannot_rank_the_item_again(running: Server, page: Browser) -> None:
    site = enter(page, running, "twice")
    item = int(page.value(ITEM))
    with contextlib.closing(running.client("twice")) as other:
        body = {"item": item, "key": "other-window", "verdict": "order", "places": [1, 2, 3]}
        assert other.post("/rank", json=body).status_code == 200
    page.press("3", "2", "1", "Enter")
    page.until("document.getElementById('status').textContent.includes('ranked this item already')")
    page.until(f"{ITEM} !== '{item}' && {READY}")
    assert [row["key"] for row in site.rankings] == ["other-window"]


def test_pages_fit_narrow_screens(running: Server, page: Browser) -> None:
    enter(page, running, "narrow")
    try:
        for path in ("/", "/agreement"):
            page.open(running.address + path)
            page.screen(380, 800)
            assert page.value("document.documentElement.scrollWidth") <= 380
    finally:
        page.screen(1280, 800)
