"""The site: every route, what it lets in, what it escapes, and bad input."""

from __future__ import annotations

import json
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest
from ranked import all_rows, check_whole, filled, person, rank_next
from sqlalchemy import Engine
from starlette.testclient import TestClient

from posttrain.annotate import items, people, tables
from posttrain.annotate.web import COOKIE, application, text_of

SITE = "http://testserver"


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Three items of three responses."""
    return filled(tmp_path / "r.db", 3)


def visitor(engine: Engine) -> TestClient:
    """Somebody who is not signed in; a redirection is not followed."""
    return TestClient(application(engine), headers={"Origin": SITE}, follow_redirects=False)


def client(engine: Engine, name: str = "ada") -> TestClient:
    """An annotator."""
    found = visitor(engine)
    assert found.post("/enter", data={"token": people.new_token(engine, name)}).headers["location"] == "/"
    return found


def submission(**changes: Any) -> dict[str, Any]:
    """A ranking of item 1 as the page sends it."""
    return {"item": 1, "key": "0123456789abcdef", "verdict": "order", "places": [1, 2, 2], **changes}


def test_nothing_is_seen_without_a_token(engine: Engine) -> None:
    stranger = visitor(engine)
    for path in ("/", "/agreement"):
        answer = stranger.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/enter")
    for path in ("/rank", "/undo", "/leave"):
        assert stranger.post(path, json=submission()).status_code == 401
    stranger.cookies.set(COOKIE, "0123456789abcdef.wrong")
    assert stranger.get("/").status_code == 303
    assert "Question" not in stranger.get("/enter").text
    assert stranger.post("/enter", data={"token": "0123456789abcdef.wrong"}).status_code == 403
    assert stranger.post("/enter", content=b"\xff\xfe%%%").status_code == 403
    assert all_rows(engine, "events") == []


def test_the_cookie_is_out_of_reach(engine: Engine) -> None:
    token = people.new_token(engine, "ada")
    answer = visitor(engine).post("/enter", data={"token": token})
    cookie = SimpleCookie(answer.headers["set-cookie"])[COOKIE]
    assert (cookie.value, cookie["httponly"], cookie["samesite"], cookie["path"]) == (token, True, "strict", "/")
    safe = TestClient(application(engine), base_url="https://testserver", headers={"Origin": "https://testserver"})
    answer = safe.post("/enter", data={"token": token}, follow_redirects=False)
    assert SimpleCookie(answer.headers["set-cookie"])[COOKIE]["secure"]


def test_signing_out_and_revoking(engine: Engine) -> None:
    ada = client(engine)
    assert ada.get("/").status_code == 200
    assert ada.post("/leave").headers["location"] == "/enter"
    assert ada.get("/").status_code == 303
    ada = client(engine)
    people.revoke(engine, "ada")
    assert ada.get("/").status_code == 303


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://testserver.evil.example", "http://testserver:81"])
def test_other_sites_change_nothing(engine: Engine, origin: str | None) -> None:
    ada = client(engine)
    ada.headers.pop("Origin")
    headers = {} if origin is None else {"Origin": origin}
    for path in ("/rank", "/undo", "/leave", "/enter"):
        assert ada.post(path, json=submission(), headers=headers).status_code == 403
    assert all_rows(engine, "events") == []


def test_every_answer_has_the_policy(engine: Engine) -> None:
    ada = client(engine)
    answers = [ada.get(path) for path in ("/", "/agreement", "/enter", "/nowhere", "/page/rank.js", "/page/rank.css")]
    for answer in [*answers, ada.post("/rank", json={}), visitor(engine).get("/")]:
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 200, 200]
    assert ada.get("/page/../web.py").status_code == 404
    assert ada.get("/page/%2e%2e/rank.html.j2").status_code == 404


def test_pages_load_nothing_from_elsewhere(engine: Engine) -> None:
    folder = Path(people.__file__).parent / "page"
    for file in folder.rglob("*.*"):
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text, file
        assert "https://" not in text, file
        assert " style=" not in text, file
        assert "innerHTML" not in text, file
        assert "|safe" not in text.replace(" ", ""), file


def test_what_a_model_wrote_is_text(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</div>{{ 7 * 7 }}"
    engine = tables.opened(tmp_path / "r.db")
    answer = [{"role": "<b>assistant</b>", "content": nasty}, {"role": "tool", "content": None, "calls": ["<i>"]}]
    items.add(engine, [items.Item([{"role": "user", "content": nasty}], [answer, [{"role": "assistant", "content": "x"}]])])
    ada = client(engine, '<b id="me">ada</b>')
    for path in ("/", "/agreement"):
        page = ada.get(path).text
        for mark in ("<script>alert", "<img", "<b>assistant", '<b id="me">', '<i>"', "49"):
            assert mark not in page
    page = ada.get("/").text
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert "{{ 7 * 7 }}" in page


def test_ranking_through_the_site(engine: Engine) -> None:
    ada = client(engine)
    page = ada.get("/").text
    assert "0 of 3" in page
    assert 'data-item="1"' in page
    assert page.count('class="card"') == 3
    assert ada.get("/").text == page  # the item stays open
    assert "model-" not in page  # who wrote what is hidden
    for _ in range(2):  # sent again
        assert ada.post("/rank", json=submission()).json() == {"saved": True}
    assert 'data-item="2"' in ada.get("/").text
    assert ada.post("/rank", json=submission(key="another-key")).status_code == 409
    assert ada.post("/rank", json=submission(item=2, key="second-key", verdict="bad", places=None)).status_code == 200
    assert ada.post("/rank", json=submission(item=3, key="third-key-", verdict="skip")).status_code == 200
    assert "All done" in ada.get("/").text
    assert ada.post("/undo", json={"key": "undo-key-1"}).json()["verdict"] == "skip"
    assert ada.post("/undo", json={"key": "undo-key-2"}).json()["verdict"] == "bad"
    undone = ada.post("/undo", json={"key": "undo-key-3"}).json()
    assert undone["places"] == [0, 1, 1]
    assert undone["digest"] in ada.get("/").text
    assert ada.post("/undo", json={"key": "undo-key-4"}).status_code == 404
    check_whole(engine)


BAD: list[Any] = [
    {},
    [],
    "text",
    7,
    submission(key=None),
    submission(key="short"),
    submission(key="x" * 65),
    submission(key="with a blank"),
    submission(item="1"),
    submission(item=True),
    submission(item=-1),
    submission(item=2**40),
    submission(item=99),
    submission(verdict="best"),
    submission(verdict=["order"]),
    submission(places=None),
    submission(places=[1, 2]),
    submission(places=[1, 2, 3, 4]),
    submission(places=["1", "2", "3"]),
    submission(places=[1.5, 2, 3]),
    submission(places=[True, 1, 2]),
    submission(places={"0": 1}),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_submissions_are_refused_in_words(engine: Engine, number: int) -> None:
    answer = client(engine).post("/rank", json=BAD[number])
    assert answer.status_code == 400
    assert len(answer.json()["error"]) > 10
    assert all_rows(engine, "events") == []


def test_requests_that_are_no_submission(engine: Engine) -> None:
    ada = client(engine)
    assert ada.post("/rank", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert ada.post("/rank", content=b"[" * 9000, headers={"Content-Type": "application/json"}).status_code == 400
    assert ada.post("/rank", content=b"\xff\xff", headers={"Content-Type": "application/json"}).status_code == 400
    assert ada.post("/rank", data={"item": 1}).status_code == 415
    assert ada.post("/rank", content=json.dumps(submission()), headers={"Content-Type": "text/plain"}).status_code == 415
    assert ada.post("/rank", json=submission(more="x" * 20_000)).status_code == 413
    assert ada.post("/enter", data={"token": "x" * 20_000}).status_code == 413
    assert ada.get("/rank").status_code == 405
    assert ada.post("/undo", json=[]).status_code == 400


def test_the_agreement_page(engine: Engine) -> None:
    ada = client(engine)
    assert "There is no agreement to measure" in ada.get("/agreement").text
    for name in ("ben", "chi"):
        for _ in range(3):
            rank_next(engine, person(engine, name), [0, 1, 2])
    page = ada.get("/agreement").text
    assert "6 rankings of 3 items" in " ".join(page.split())
    assert "ben and chi" in page
    assert page.count('<p class="big">1.00</p>') == 2  # alpha, and the kappa of the two
    rank_next(engine, person(engine, "dan"), [2, 1, 0])
    page = ada.get("/agreement").text
    assert "Fleiss" in page
    assert page.count('<th scope="row">') == 3 + 3  # pairs of annotators, annotators


def test_an_empty_database_says_so(tmp_path: Path) -> None:
    assert "Nothing to rank yet" in client(tables.opened(tmp_path / "e.db")).get("/").text


def test_text_of_messages() -> None:
    assert text_of({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}) == "a\n[image]"
    assert '"name": "f"' in text_of({"role": "assistant", "tool_calls": [{"name": "f"}]})
