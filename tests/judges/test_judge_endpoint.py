"""An endpoint that speaks the protocol, and one that does not: retries, deadlines, votes, and what is refused at once."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from posttrain.errors import ConfigError
from posttrain.judges import pairwise, rate, template_named
from posttrain.judges.endpoint import EndpointJudge, chosen_of, vote_in

KEY = "POSTTRAIN_TEST_JUDGE_KEY"
Reply = tuple[int, Any, dict[str, str]]


class Server:
    """A chat endpoint on this machine: `reply(number, body)` says what the request with that number gets."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.at_once = self.most_at_once = 0
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda number, body: (200, message("1"), {})
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.bodies)
                    outer.bodies.append({**body, "path": self.path})
                    outer.keys.append(self.headers.get("Authorization", ""))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    status, found, headers = outer.reply(number, body)
                    raw = found if isinstance(found, bytes) else json.dumps(found).encode()
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:  # the judge went away
                    pass
                finally:
                    with outer._lock:
                        outer.at_once -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(KEY, "secret-of-the-test")
    running = Server()
    yield running
    running.close()


def message(text: str, places: list[tuple[str, dict[str, float]]] | None = None) -> dict[str, Any]:
    """A completion as endpoints send it."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if places is not None:
        content = [
            {"token": token, "logprob": tops[token], "top_logprobs": [{"token": t, "logprob": x} for t, x in tops.items()]}
            for token, tops in places
        ]
        choice["logprobs"] = {"content": content}
    return {"model": "judge-2024-05", "system_fingerprint": "fp_1", "choices": [choice]}


def judge(server: Server, **more: Any) -> EndpointJudge:
    settings = {"key_variable": KEY, "wait_seconds": 0.01, "timeout_seconds": 2.0, "deadline_seconds": 5.0, **more}
    return EndpointJudge(server.url, "the-model", **settings)


def ask(text: str = "Which?") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_options_are_read_from_the_likeliest_tokens(server: Server) -> None:
    tops = {"1": math.log(0.5), " 1": math.log(0.1), "2": math.log(0.2), "The": math.log(0.1)}
    server.reply = lambda number, body: (200, message("1", [("1", tops)]), {})
    (reply,) = judge(server).choose([ask()], ("1", "2"))
    assert [math.exp(x) for x in reply.logprobs] == [pytest.approx(0.6), pytest.approx(0.2)]
    assert reply.version == "judge-2024-05 fp_1"
    (body,) = server.bodies
    assert (body["path"], body["model"], body["logprobs"], body["top_logprobs"]) == ("/v1/chat/completions", "the-model", True, 20)
    assert (body["messages"], body["temperature"]) == (ask(), 0.0)
    assert server.keys == ["Bearer secret-of-the-test"]


def test_a_whole_comparison_over_the_wire(server: Server) -> None:
    def reply(number: int, body: dict[str, Any]) -> Reply:
        first = body["messages"][0]["content"].index("good") < body["messages"][0]["content"].index("bad")
        p = 0.8 if first else 0.3
        return 200, message("1", [("1", {"1": math.log(p), "2": math.log(1 - p)})]), {}

    server.reply = reply
    (found,) = pairwise(judge(server), [("q", "good", "bad")])
    assert found.orders == (pytest.approx(0.8), pytest.approx(0.3))
    assert found.p == pytest.approx(0.75)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
def test_what_may_pass_is_asked_again(server: Server, status: int) -> None:
    server.reply = lambda number, body: (status, {"error": "busy"}, {}) if number < 2 else (200, message("fine"), {})
    assert judge(server).write([ask()], 8)[0].text == "fine"
    assert len(server.bodies) == 3


def test_retry_after_is_waited_for(server: Server) -> None:
    server.reply = lambda number, body: (429, {}, {"Retry-After": "0.4"}) if number == 0 else (200, message("fine"), {})
    began = time.monotonic()
    assert judge(server).write([ask()], 8)[0].text == "fine"
    assert time.monotonic() - began > 0.25


GARBAGE = [
    b"<html>busy</html>",
    b"",
    b'{"choices": []}',
    b'{"choices": "none"}',
    b"[1, 2]",
    b'{"error": {"message": "later"}}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_asked_again_and_then_an_error(server: Server, garbage: bytes) -> None:
    server.reply = lambda number, body: (200, garbage, {}) if number < 2 else (200, message("fine"), {})
    assert judge(server).write([ask()], 8)[0].text == "fine"
    server.reply = lambda number, body: (200, garbage, {})
    (reply,) = judge(server, attempts=2).write([ask()], 8)
    assert "gave no answer after 2 requests" in reply.error
    assert not reply.text


def test_a_broken_connection_is_asked_again(server: Server) -> None:
    short = {"Content-Length": "5000"}  # more is promised than is sent
    server.reply = lambda number, body: (200, message("cut"), short) if number == 0 else (200, message("fine"), {})
    assert judge(server, timeout_seconds=0.5).write([ask()], 8)[0].text == "fine"


def test_a_hanging_endpoint_costs_its_deadline_and_no_more(server: Server) -> None:
    def slow(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(3)
        return 200, message("late"), {}

    server.reply = slow
    began = time.monotonic()
    (reply,) = judge(server, timeout_seconds=0.2, deadline_seconds=0.7, attempts=50).write([ask()], 8)
    assert time.monotonic() - began < 2
    assert "within 0.7 s" in reply.error
    assert "imed out" in reply.error or "the deadline" in reply.error


def test_nobody_there_is_an_error_of_each_question() -> None:
    absent = EndpointJudge("http://127.0.0.1:9/v1", "m", attempts=2, wait_seconds=0.01)
    assert ["gave no answer" in reply.error for reply in absent.write([ask()] * 3, 8)] == [True] * 3


@pytest.mark.parametrize(("status", "said"), [(401, KEY), (403, KEY), (404, "check url and model"), (400, "bad request")])
def test_what_will_not_pass_stops_at_once(server: Server, status: int, said: str) -> None:
    server.reply = lambda number, body: (status, {"error": "bad request"}, {})
    with pytest.raises(ConfigError, match=said) as caught:
        judge(server).write([ask()], 8)
    assert len(server.bodies) == 1
    assert "secret-of-the-test" not in str(caught.value)


def test_a_redirect_does_not_take_the_key_elsewhere(server: Server) -> None:
    server.reply = lambda number, body: (302, {}, {"Location": "http://127.0.0.1:9/v1/chat/completions"})
    with pytest.raises(ConfigError, match="HTTP 302"):
        judge(server).write([ask()], 8)


def test_the_key_is_in_no_identity(server: Server) -> None:
    assert "secret" not in judge(server).identity + repr(judge(server))


def test_one_failure_leaves_the_others(server: Server) -> None:
    def reply(number: int, body: dict[str, Any]) -> Reply:
        return (500, {}, {}) if "bad" in body["messages"][0]["content"] else (200, message("fine"), {})

    server.reply = reply
    found = judge(server, attempts=2).write([ask("good"), ask("bad"), ask("good")], 8)
    assert [one.text for one in found] == ["fine", "", "fine"]
    assert "HTTP 500" in found[1].error


def test_questions_are_under_way_together_and_come_back_in_order(server: Server) -> None:
    def reply(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.05 * (3 - int(body["messages"][0]["content"]) % 3))
        return 200, message(body["messages"][0]["content"]), {}

    server.reply = reply
    found = judge(server, concurrency=4).write([ask(str(i)) for i in range(12)], 8)
    assert [one.text for one in found] == [str(i) for i in range(12)]
    assert 2 <= server.most_at_once <= 4


# ---------------------------------------------------------------------------------------------------------------- votes


def test_without_log_probabilities_answers_vote(server: Server) -> None:
    words = ["2", "(1)", "1.", "neither of them", "**1**", "1", "1 or 2", "[2]"]

    def reply(number: int, body: dict[str, Any]) -> Reply:
        return 200, message(words[body["seed"]] if "seed" in body else "1"), {}

    server.reply = reply
    asked = judge(server)
    (found,) = asked.choose([ask()], ("1", "2"))
    assert [math.exp(x) for x in found.logprobs] == [pytest.approx(4 / 8), pytest.approx(2 / 8)]  # two say nothing readable
    assert [body["temperature"] for body in server.bodies] == [0.0] + [1.0] * 8
    asked.choose([ask()], ("1", "2"))
    assert len(server.bodies) == 17  # the second time it votes at once


def test_an_endpoint_that_refuses_log_probabilities_is_asked_for_votes(server: Server) -> None:
    def reply(number: int, body: dict[str, Any]) -> Reply:
        return (400, {"error": "logprobs are not supported"}, {}) if "logprobs" in body else (200, message("2"), {})

    server.reply = reply
    (found,) = judge(server, votes=2).choose([ask()], ("1", "2"))
    assert found.logprobs == (-math.inf, 0.0)


def test_votes_that_say_nothing_are_an_error_of_the_question(server: Server) -> None:
    server.reply = lambda number, body: (200, message("I cannot tell."), {})
    (rating,) = rate(judge(server, top_logprobs=0, votes=3), [("q", "a")])
    assert rating.score is None
    assert "none of the options" in rating.error


def test_prefilled_answers_need_an_endpoint_that_goes_on(server: Server) -> None:
    template = template_named("word-problem-check")
    with pytest.raises(ConfigError, match="prefill=True"):
        rate(judge(server), [("q", "a")], template)
    server.reply = lambda number, body: (200, message("yes", [("yes", {"yes": math.log(0.75), "no": math.log(0.25)})]), {})
    (rating,) = rate(judge(server, prefill=True), [("q", "a")], template)
    assert rating.reward == pytest.approx(0.5)
    assert server.bodies[-1]["continue_final_message"] is True
    assert server.bodies[-1]["messages"][-1] == {"role": "assistant", "content": "<answer>"}


@pytest.mark.parametrize("settings", [{"votes": 0}, {"concurrency": 0}, {"attempts": 0}, {"timeout_seconds": 0.0}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EndpointJudge("http://host/v1", "m", **settings)
    with pytest.raises(ConfigError, match="write http"):
        EndpointJudge("host/v1", "m")


# ----------------------------------------------------------------------------------------------------- reading the tokens


def logs(**p: float) -> dict[str, float]:
    return {token.replace("_", " "): math.log(x) for token, x in p.items()}


def test_ten_as_one_token_and_as_two() -> None:
    options = tuple(str(i) for i in range(1, 11))
    one = {"1": math.log(0.1), "10": math.log(0.6), "9": math.log(0.2)}
    found = [math.exp(x) for x in chosen_of([("10", one)], options)]
    assert (found[0], found[8], found[9]) == (pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.6))
    first, second = {"1": math.log(0.7), "9": math.log(0.2)}, {"0": math.log(0.9), ".": math.log(0.1)}
    found = [math.exp(x) for x in chosen_of([("1", first), ("0", second)], options)]
    assert (found[0], found[8], found[9]) == (pytest.approx(0.07), pytest.approx(0.2), pytest.approx(0.63))


def test_white_space_before_an_option_is_followed() -> None:
    places = [(" ", {" ": math.log(0.8), "A": math.log(0.1)}), ("B", {"B": math.log(0.75), "A": math.log(0.25)})]
    found = [math.exp(x) for x in chosen_of(places, ("A", "B"))]
    assert found == [pytest.approx(0.1 + 0.2), pytest.approx(0.6)]


def test_what_follows_an_option_is_not_read() -> None:
    places = [("A", {"A": math.log(0.9), "B": math.log(0.1)}), (" because", {" because": 0.0}), ("B", {"B": 0.0})]
    assert [math.exp(x) for x in chosen_of(places, ("A", "B"))] == [pytest.approx(0.9), pytest.approx(0.1)]
    assert chosen_of([], ("A", "B")) == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("A", "A"),
        (" (B) ", "B"),
        ("[A].", "A"),
        ("**B**", "B"),
        ('"A"', "A"),
        ("A is better", None),
        ("a", None),
        ("", None),
        ("C", None),
    ],
)
def test_votes(text: str, vote: str | None) -> None:
    assert vote_in(text, ("A", "B")) == vote
