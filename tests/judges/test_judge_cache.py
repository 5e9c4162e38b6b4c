"""Replies are kept by content: nothing is asked twice, whatever a kill left."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from posttrain.judges import CachedJudge, ScriptedJudge, judge_named, pairwise
from posttrain.judges.cache import key_of


class Counting:
    """A judge that counts what it is asked, and dies after so many questions."""

    def __init__(self, dies_after: int = 10**9) -> None:
        self.asked: list[str] = []
        self.dies_after = dies_after
        self.judge = ScriptedJudge(self.reply)

    def reply(self, text: str, options: tuple[str, ...]) -> object:
        if len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked.append(text)
        return [-0.5, -math.inf] if options else f"about {len(text)}"


def asks(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"question {i}"}] for i in range(count)]


def test_a_second_run_asks_nothing_and_hears_the_same(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    before = CachedJudge(first.judge, tmp_path)
    replies = before.choose(asks(5), ("a", "b")) + before.write(asks(2), 8)
    after = CachedJudge(second.judge, tmp_path)
    assert after.choose(asks(5), ("a", "b")) + after.write(asks(2), 8) == replies
    assert (len(first.asked), len(second.asked)) == (7, 0)
    assert (after.asked, after.kept) == (0, 7)
    assert replies[0].logprobs == (-0.5, -math.inf)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    killed = Counting(dies_after=70)  # replies are written 32 at a time
    with pytest.raises(KeyboardInterrupt):
        CachedJudge(killed.judge, tmp_path).choose(asks(100), ("a", "b"))
    resumed = Counting()
    found = CachedJudge(resumed.judge, tmp_path).choose(asks(100), ("a", "b"))
    assert len(found) == 100
    assert resumed.asked == [f"question {i}" for i in range(64, 100)]


def test_a_torn_last_line_is_passed_over_and_the_file_stays_readable(tmp_path: Path) -> None:
    CachedJudge(Counting().judge, tmp_path).choose(asks(3), ("a", "b"))
    file = tmp_path / "replies.jsonl"
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        file.write_bytes(whole[:-cut])
        again = Counting()
        CachedJudge(again.judge, tmp_path).choose(asks(3), ("a", "b"))
        assert len(again.asked) == (0 if cut == 1 else 1)  # a lost line end alone loses nothing
        third = Counting()
        CachedJudge(third.judge, tmp_path).choose(asks(3), ("a", "b"))
        assert third.asked == []


def test_another_judge_option_or_length_is_another_question(tmp_path: Path) -> None:
    judge = Counting()
    cached = CachedJudge(judge.judge, tmp_path)
    cached.choose(asks(1), ("a", "b"))
    cached.choose(asks(1), ("b", "a"))
    cached.write(asks(1), 8)
    cached.write(asks(1), 9)
    assert len(judge.asked) == 4
    other = ScriptedJudge(judge.reply, name="other")
    CachedJudge(other, tmp_path).choose(asks(1), ("a", "b"))
    assert len(judge.asked) == 5
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1}) != key_of("b", {"x": 1, "y": 2})


def test_failures_are_asked_again_and_equal_questions_once(tmp_path: Path) -> None:
    told: list[str] = []

    def script(text: str, options: tuple[str, ...]) -> object:
        told.append(text)
        return None if len(told) == 1 else [-0.5, -1.0]

    cached = CachedJudge(ScriptedJudge(script), tmp_path)
    assert cached.choose(asks(1) * 3, ("a", "b"))[2].error
    assert len(told) == 1
    assert not cached.choose(asks(1) * 3, ("a", "b"))[2].error
    assert len(told) == 2


def test_files_of_other_ranks_are_read(tmp_path: Path) -> None:
    CachedJudge(Counting().judge, tmp_path, "replies-1.jsonl").choose(asks(2), ("a", "b"))
    mine = Counting()
    CachedJudge(mine.judge, tmp_path, "replies-0.jsonl").choose(asks(3), ("a", "b"))
    assert mine.asked == ["question 2"]
    assert [json.loads(line)["logprobs"] for line in (tmp_path / "replies-0.jsonl").read_text().splitlines()] == [[-0.5, None]]


def test_judges_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(text, options):\n    return [-0.1, -2.5]\n")
    judge = judge_named(f"{file}:short")
    assert pairwise(judge, [("q", "a", "b")])[0].p == 0.5
    before = judge.identity
    file.write_text("def short(text, options):\n    return [-0.2, -2.5]\n")
    assert judge_named(f"{file}:short").identity != before  # other content, other answers
    for spec, said in {
        "judge": "write local:FOLDER, openai:URL#MODEL or file.py:function",
        "openai:http://localhost/v1": "write openai:URL#MODEL",
        "openai:localhost#m": "write openai:URL#MODEL",
        f"{tmp_path}/none.py:f": "there is no file",
        f"{file}:long": "no function 'long'",
        "local:./nowhere": "not a folder",
    }.items():
        with pytest.raises(ConfigError, match=said):
            judge_named(spec)
