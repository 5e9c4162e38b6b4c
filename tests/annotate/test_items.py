"""Items: rows of every kind, what is refused, and what models write on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranked import all_rows, rows, some_items
from small import assistant, jsonl, pairs, user

from posttrain.annotate import items, sampling, tables
from posttrain.errors import ConfigError, DataError
from posttrain.types import Sampling


def test_rows_of_responses(tmp_path: Path) -> None:
    found = items.read_items(jsonl(tmp_path / "r.jsonl", rows(3)))
    assert found == some_items(3)
    engine = tables.opened(tmp_path / "r.db")
    assert items.add(engine, found) == items.Added(3, 0, 3)
    assert items.add(engine, found) == items.Added(0, 0, 3)  # the same file again
    assert items.add(engine, some_items(5)) == items.Added(2, 0, 5)


def test_pairs_and_rankings_are_comparisons(tmp_path: Path) -> None:
    found = items.read_items(jsonl(tmp_path / "p.jsonl", pairs(2)))
    assert [(item.annotator, item.verdict, item.places) for item in found] == [("imported", "order", [0, 1])] * 2
    assert found[0].responses[1] == assistant("No idea.")
    row = {"prompt": "Q", "responses": ["x", "y", "z"], "ranking": [2, 0, 1], "annotator": "ada", "source": 7}
    found += items.read_items(jsonl(tmp_path / "k.jsonl", [row]))
    assert (found[2].annotator, found[2].places, found[2].info) == ("ada", [1, 2, 0], {"source": 7})
    engine = tables.opened(tmp_path / "r.db")
    assert items.add(engine, found) == items.Added(3, 3, 3)
    assert items.add(engine, found) == items.Added(0, 0, 3)
    assert [row["labels"] for row in all_rows(engine, "items")] == [1, 1, 1]
    assert [row["what"] for row in all_rows(engine, "events")] == ["imported"] * 3


def test_places_with_ties_and_verdicts() -> None:
    base = {"prompt": user("Q"), "responses": ["x", "y", "z"]}
    assert items.as_item({**base, "places": [3, 1, 3]}).places == [1, 0, 1]
    assert items.as_item({**base, "verdict": "bad"}).places == [0, 0, 0]
    assert items.as_item({**base, "verdict": "skip"}).verdict == "skip"
    assert items.as_item(base).verdict is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q"}, "nothing to rank"),
        ({"prompt": "Q", "responses": "x"}, "'responses' is a str"),
        ({"prompt": "Q", "responses": ["x"]}, "1 responses; expected 2 to 8"),
        ({"prompt": "Q", "responses": list("abcdefghi")}, "9 responses; expected 2 to 8"),
        ({"prompt": "Q", "responses": ["x", ""]}, r"'responses'\[1\] is ''"),
        ({"prompt": "Q", "responses": ["x", 7]}, r"'responses'\[1\] is '7'"),
        ({"prompt": "Q", "responses": ["x", "y"], "models": ["a"]}, "1 models for 2 responses"),
        ({"prompt": "Q", "responses": ["x", "y"], "places": [1]}, "expected 2 numbers"),
        ({"prompt": "Q", "responses": ["x", "y"], "verdict": "good"}, "expected order, bad or skip"),
        ({"prompt": "Q", "responses": ["x", "y"], "ranking": [0, 0]}, "the numbers 0 to 1"),
        ({"prompt": "Q", "completion": "x"}, "nothing to rank"),
    ],
)
def test_what_cannot_be_ranked_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"r.jsonl:1: .*{message}"):
        items.read_items(jsonl(tmp_path / "r.jsonl", [row]))


def test_models_write_the_responses(small_model: Path) -> None:
    asked = [{"id": f"q{n}", "prompt": user(f"What is {n} + 1?"), "answer": str(n + 1)} for n in range(3)]
    options: dict[str, Any] = {"samples": 2, "sampling": Sampling(max_tokens=6)}
    found = sampling.written_items(asked, [str(small_model), str(small_model)], **options)
    assert len(found) == 3
    for number, item in enumerate(found):
        texts = [response[0]["content"] for response in item.responses]
        assert 2 <= len(texts) <= 4
        assert len(set(texts)) == len(texts)
        assert all(texts)
        assert item.models == [str(small_model)] * len(texts)
        assert item.info == {"id": f"q{number}", "answer": str(number + 1)}
    assert sampling.written_items(asked, [str(small_model), str(small_model)], **options) == found


def test_equal_answers_are_one_and_prompts_without_two_are_left_out(small_model: Path) -> None:
    asked = [{"prompt": user("What is 1 + 1?")}]
    with pytest.raises(DataError, match="no prompt got two different answers"), pytest.warns(UserWarning, match="1 of 1 prompts"):
        sampling.written_items(asked, [str(small_model)], samples=3, sampling=Sampling(max_tokens=4, greedy=True))
    with pytest.raises(ConfigError, match="are 9 responses an item; expected 2 to 8"):
        sampling.written_items(asked, [str(small_model)] * 3, samples=3, sampling={})
    with pytest.raises(DataError, match="no 'prompt' to answer"):
        sampling.written_items([{"messages": []}], [str(small_model)], samples=2, sampling={})
