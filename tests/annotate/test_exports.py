"""Exports: what the rows say, that they load as the library's own formats, and that a reward model learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranked import filled, person, rank_next, some_items
from small import lines, small_run
from sqlalchemy import Engine

from posttrain.annotate import exports, items, tables, turns
from posttrain.data.rows import load_rows
from posttrain.errors import ConfigError, DataError
from posttrain.methods import method
from posttrain.run import train


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Two items, ranked by three: one with a tie, one called bad by two."""
    engine = filled(tmp_path / "r.db", 2)
    said: dict[str, dict[int, tuple[list[int] | None, str]]] = {
        "ada": {1: ([0, 1, 2], "order"), 2: (None, "bad")},
        "ben": {1: ([0, 0, 1], "order"), 2: ([2, 1, 0], "order")},
        "chi": {1: ([1, 0, 2], "order"), 2: (None, "skip")},
    }
    for name, both in said.items():
        someone = person(engine, name)
        while (turn := turns.next_turn(engine, someone)) is not None:
            places, verdict = both[turn.item]
            rank_next(engine, someone, places, verdict=verdict)
    return engine


def test_pairs(engine: Engine, tmp_path: Path) -> None:
    # item 1: (0, 1): one vote each and a tie, left out; (0, 2) and (1, 2): three votes of three. Item 2: half call it bad.
    found = list(exports.pairs(engine))
    assert [row["id"] for row in found] == ["q0:0>2", "q0:1>2"]
    assert found[0]["columns"] == {"preference": 1.0}
    assert found[0]["votes"] == {"chosen": 3, "rejected": 0, "tied": 0}
    assert found[0]["models"] == ["model-0", "model-2"]
    assert exports.export(engine, "pairs", tmp_path / "pairs.jsonl") == 2
    loaded = load_rows(tmp_path / "pairs.jsonl")
    assert loaded[1]["chosen"] == [{"role": "assistant", "content": "Answer 0.1"}]
    assert loaded[1]["rejected"] == [{"role": "assistant", "content": "Answer 0.2"}]


def test_the_share_counts_a_tie_as_half(engine: Engine) -> None:
    for _ in range(2):
        rank_next(engine, person(engine, "dan"), [0, 1, 2])
    found = {row["id"]: row for row in exports.pairs(engine)}
    assert found["q0:0>1"]["columns"] == {"preference": 2.5 / 4}
    assert found["q0:0>1"]["votes"] == {"chosen": 2, "rejected": 1, "tied": 1}
    assert not any(name.startswith("q1") for name in found)  # one order each way: no majority


def test_rankings(engine: Engine, tmp_path: Path) -> None:
    assert exports.export(engine, "rankings", tmp_path / "k.jsonl") == 1
    row = load_rows(tmp_path / "k.jsonl")[0]
    assert row["ranking"][2] == 2
    assert row["places"] == [1 / 3, 1 / 3, 5 / 3]
    assert row["annotators"] == 3
    assert row["models"] == ["model-0", "model-1", "model-2"]
    assert row["responses"][0] == [{"role": "assistant", "content": "Answer 0.0"}]


def test_ties_are_broken_evenly_and_all_tied_says_nothing(tmp_path: Path) -> None:
    engine = filled(tmp_path / "t.db", 60, 2)
    both = [items.Item(i.prompt, i.responses, i.models, i.info, name, "order", [0, 1][:: 1 if name == "ada" else -1])
            for i in some_items(60, 2) for name in ("ada", "ben")]  # fmt: skip
    items.add(engine, both)
    assert list(exports.consensus_rankings(engine)) == []
    assert list(exports.pairs(engine)) == []
    with pytest.raises(DataError, match="no pairs to export"):
        exports.export(engine, "pairs", tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()
    engine = filled(tmp_path / "u.db", 60, 3)
    items.add(engine, [items.Item(i.prompt, i.responses, i.models, i.info, "ada", "order", [0, 0, 1]) for i in some_items(60)])
    first = [row["ranking"][0] for row in exports.consensus_rankings(engine)]
    assert 15 <= first.count(0) <= 45  # 30 expected, 3.9 standard deviations
    assert first.count(2) == 0


def test_the_data_set_is_everything_and_comes_back(engine: Engine, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "all.jsonl"
    assert exports.export(engine, "dataset", path) == 6
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 6
    assert loaded[1]["annotator"] == "ben"
    assert loaded[1]["places"] == [0, 0, 1]
    assert loaded[0]["responses"][2][0]["content"] == "Answer 0.2"
    assert {len(row) for row in load_rows(path)} == {11}  # the same columns in every row, and where it came from
    again = tables.opened(tmp_path / "again.db")
    assert items.add(again, items.read_items(path)) == items.Added(2, 6, 2)

    def told(engine: Engine) -> list[Any]:
        return [(i.name, s.annotator, s.verdict, s.places) for i in exports.ranked_items(engine) for s in i.said]

    assert told(again) == told(engine)


def test_a_reward_model_learns_from_the_pairs(engine: Engine, small_model: Path, tmp_path: Path) -> None:
    rank_next(engine, person(engine, "dan"), [0, 1, 2])
    rank_next(engine, person(engine, "dan"), [0, 1, 2])
    exports.export(engine, "pairs", tmp_path / "pairs.jsonl")
    rows = load_rows(tmp_path / "pairs.jsonl")
    train(
        small_run(method("bradley_terry")(), small_model, tmp_path / "run", data=rows, steps=12, prompts_per_step=3, save_every=0)
    )
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0] - 0.1


def test_what_cannot_be_exported(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nearest: 'pairs'"):
        exports.export(engine, "pair", tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match="ends in"):
        exports.export(engine, "pairs", tmp_path / "p.csv")
