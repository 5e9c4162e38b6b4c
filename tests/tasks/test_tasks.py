"""Tasks by name: rows, splits and rewards that verify their own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.rewards import Answer, RewardRunner
from posttrain.tasks import Task, task
from posttrain.tasks.gsm8k import read_answer
from posttrain.tasks.gym import pack, unpack
from posttrain.types import Overlong, Score, Unparseable, Wrong

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"


def judge(made: Task, rows: list[dict[str, object]], texts: list[str], finish: str = "stop") -> list[object]:
    answers = [Answer(text=text, info=row, finish=finish) for row, text in zip(rows, texts, strict=True)]
    with RewardRunner() as runner:
        return list(runner.judge(made.rewards[0], answers)[0])


def test_unknown_names_and_options_are_refused_with_the_nearest() -> None:
    for name, options, words in [
        ("word-problem", {}, "nearest: 'word-problems'"),
        ("gsm-8k", {}, "nearest: 'gsm8k'"),
        ("word-problems", {"lvl": "easy"}, "nearest: 'level'"),
        ("word-problems", {"level": "esy"}, "nearest: 'easy'"),
        ("gsm8k", {}, "needs path"),
        ("gsm8k", {"path": "/no/such/folder"}, "train.jsonl"),
    ]:
        with pytest.raises(ConfigError, match=words):
            task(name, **options)


def test_word_problems_verify_their_own_demonstrations() -> None:
    made = task("word-problems")
    rows = made.rows("demonstrations", 20)
    texts = [row["completion"][0]["content"] for row in rows]
    assert judge(made, rows, texts) == [Score(1.0)] * 20
    assert all(isinstance(v, Wrong) for v in judge(made, rows, ["<answer>100000</answer>"] * 20))
    assert all(isinstance(v, Unparseable) for v in judge(made, rows, ["<think>3"] * 20))
    assert all(isinstance(v, Overlong) for v in judge(made, rows, ["<think>3"] * 20, finish="length"))
    assert [made.parse(text) for text in texts] == [row["answer"] for row in rows]
    assert made.rows("test", 3, 1) == made.rows("test", 5, 1)[:3]
    with pytest.raises(ConfigError, match="nearest: 'test'"):
        made.rows("tset", 3)
    with pytest.raises(ConfigError, match="how many"):
        made.rows("test")


# ---------------------------------------------------------------------------------------------- gsm8k


@pytest.fixture
def small(tmp_path: Path) -> Path:
    lines = [
        {
            "question": f"Ann has {i} eggs and buys 1,000. How many?",
            "answer": f"{i}+1000=<<{i}+1000={i + 1000}>>{i + 1000} eggs\n#### 1,{i:03d}",
        }
        for i in range(200)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_gsm8k_rows(small: Path) -> None:
    made = task("gsm8k", path=str(small))
    row = made.rows("test", 8)[7]
    assert row == {
        "id": "gsm8k/test/8",
        "prompt": [{"role": "user", "content": "Ann has 7 eggs and buys 1,000. How many?"}],
        "completion": [{"role": "assistant", "content": "<think>7+1000=1007 eggs</think><answer>1007</answer>"}],
        "answer": "1007",
        "steps": 1,
    }
    kept = task("gsm8k", path=str(small), calculator=True, system="Think.").rows("test", 8)[7]
    assert "<<7+1000=1007>>1007" in kept["completion"][0]["content"]
    assert kept["prompt"][0] == {"role": "system", "content": "Think."}
    assert judge(made, [row] * 4, [f"<answer>{a}</answer>" for a in ("1,007", "$1007.00", "1007 eggs", "1008")]) == [
        Score(1.0), Score(1.0), Unparseable(reason="the answer is not one plain number"), Wrong(),
    ]  # fmt: skip


def test_gsm8k_splits_are_disjoint_whole_and_seeded(small: Path) -> None:
    made = task("gsm8k", path=str(small))
    parts = {split: {row["id"] for row in made.rows(split)} for split in ("demonstrations", "train", "validation")}
    whole = {row["id"] for row in made.rows("train-file")}
    assert set.union(*parts.values()) == whole
    assert sum(map(len, parts.values())) == len(whole) == 200
    assert len(parts["train"]) > 120
    alone = task("gsm8k", path=str(small / "train.jsonl"))
    pieces = [{row["id"] for row in alone.rows(split)} for split in ("demonstrations", "train", "validation", "test")]
    assert sum(map(len, pieces)) == len(set.union(*pieces)) == 200
    assert all(pieces)
    assert made.rows("train", 20, 1) == made.rows("train", 30, 1)[:20] != made.rows("train", 20, 2)
    with pytest.raises(DataError, match="holds 200 rows; 201"):
        made.rows("test", 201)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"question": "q"}', '{"question": "q", "answer": "7"}', '{"question": "q", "answer": "#### x"}'],
)
def test_gsm8k_bad_lines_are_named(small: Path, line: str) -> None:
    file = small / "test.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"test\.jsonl, line 201: expected"):
        task("gsm8k", path=str(small)).rows("test", 1)


def test_gsm8k_annotations() -> None:
    assert read_answer("a <<3*4=12>>12 << b\n#### -1,200.5") == ("a 12 << b", "-1200.5")


def test_gsm8k_real_files() -> None:
    if not (GSM8K / "test.jsonl").is_file():
        pytest.skip("the GSM8K files are not here")
    made = task("gsm8k", path=str(GSM8K))
    rows = made.rows("test")
    assert len(rows) == 1319
    assert len(made.rows("train-file")) == 7473
    assert rows[0]["answer"] == "18"
    texts = [row["completion"][0]["content"] for row in rows]
    assert not any("<<" in text or "####" in text for text in texts)
    assert judge(made, rows, texts) == [Score(1.0)] * 1319
    found = judge(made, rows, [texts[-1], *texts[:-1]])
    assert sum(verdict == Score(1.0) for verdict in found) < 40  # neighbours with the same answer


# ---------------------------------------------------------------------------------------------- reasoning-gym


def test_packing_keeps_what_json_does_not() -> None:
    value = {"a": (1, [2, (3,)]), 4: {5, 6}, "n": None, "s": "x", "t": {"__kind__": "tuple"}, "f": 0.5, "b": True}
    assert unpack(json.loads(json.dumps(pack(value)))) == value
    with pytest.raises(TypeError, match="object has no JSON"):
        pack({"a": object()})


@pytest.mark.parametrize(
    ("dataset", "options"), [("chain_sum", {"max_terms": 3}), ("word_ladder", {}), ("prime_factorization", {})]
)
def test_gym_sets_verify_their_own_answers(dataset: str, options: dict[str, object]) -> None:
    pytest.importorskip("reasoning_gym", reason="needs posttrain[gym]")
    made = task(f"gym:{dataset}", **options)
    rows = made.rows("train", 4)
    assert [row["id"] for row in rows] == [f"gym:{dataset}/train/0/{i}" for i in range(4)]
    assert json.loads(json.dumps(rows)) == rows
    if dataset == "word_ladder":  # what it writes depends on the hash seed
        assert rows == made.rows("train", 4)
    if dataset == "chain_sum":
        assert rows[0]["prompt"][-1]["content"] != made.rows("test", 1)[0]["prompt"][-1]["content"]
    own = [row["completion"][0]["content"] for row in rows]
    wrong = ["<answer>(](</answer>", "no tags", "<answer></answer>", "<answer>-1\n2</answer>"]
    found = judge(made, rows * 2, own + wrong)
    assert found[:4] == [Score(1.0)] * 4
    junk = found[4:]
    assert not any(isinstance(verdict, Score) and verdict.value > 0.5 for verdict in junk)
    assert isinstance(junk[1], Unparseable)


def test_gym_names_and_options_are_refused_with_the_nearest() -> None:
    pytest.importorskip("reasoning_gym", reason="needs posttrain[gym]")
    for name, options, words in [
        ("gym:chain_sums", {}, "nearest: 'chain_sum'"),
        ("gym:chain_sum", {"max_term": 3}, "nearest: 'max_terms'"),
        ("gym:chain_sum", {"max_terms": 0}, "refuses"),
    ]:
        with pytest.raises(ConfigError, match=words):
            task(name, **options)


def test_gym_full_marks() -> None:
    pytest.importorskip("reasoning_gym", reason="needs posttrain[gym]")
    made = task("gym:chain_sum", full_marks=True)
    row = made.rows("validation", 1)[0]
    right, more = row["answer"], f"{row['answer']} or so"
    assert made.metric == "accuracy"
    assert judge(made, [row, row], [f"<answer>{right}</answer>", f"<answer>{more}</answer>"]) == [Score(1.0), Wrong()]
