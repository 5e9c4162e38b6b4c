"""The word problems: splits are disjoint by construction, solutions are right, and the verifier is exact."""

from __future__ import annotations

import re

import pytest

from posttrain import tiny
from posttrain.tasks.word_problem_rare import RARE
from posttrain.tasks.word_problems import LEVELS, SPLITS, problem, rows, split_of, verify
from posttrain.tiny.corpus import document
from posttrain.types import Score, Unparseable, Wrong

ANNOTATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
TASK_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>", re.DOTALL)
FACTS = {"2", "3", "4", "6", "7", "8", "12", "60"}  # "half" speaks of 2, a week of 7, a spider of 8
COUNTS = {"pretrain": 6000, "train": 6000, "demonstrations": 2000, "validation": 3000, "test": 3000}


def text(row: dict) -> str:
    return row["completion"][0]["content"]


def test_no_template_meets_the_same_numbers_in_two_splits() -> None:
    owner: dict[str, str] = {}
    for split, count in COUNTS.items():
        for level in ("demo", "hard"):
            for index in range(count):
                key = problem(split, index, level=level).key
                assert owner.setdefault(key, split) == split == split_of(key)
    assert len(owner) > 30_000


def test_every_bucket_belongs_to_one_split() -> None:
    assert sorted(bucket for buckets in SPLITS.values() for bucket in buckets) == list(range(100))


def test_another_seed_gives_other_problems_of_the_same_split() -> None:
    first = [problem("test", index).key for index in range(200)]
    other = [problem("test", index, seed=1).key for index in range(200)]
    assert len(set(first) & set(other)) < 20
    assert {split_of(key) for key in other} == {"test"}


def test_a_problem_depends_on_its_index_alone() -> None:
    assert rows("train", 50)[30:] == rows("train", 60)[30:50]
    assert problem("train", 7) == problem("train", 7)


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_worked_solutions_are_right_and_end_in_the_answer(level: str) -> None:
    rare = {len(template.steps) for template in RARE} if LEVELS[level].rare else set()
    allowed = {count for count, _ in LEVELS[level].steps} | rare
    for row in rows("validation", 1500, level=level, seed=3):
        steps = ANNOTATION.findall(text(row))
        assert len(steps) == row["steps"] == text(row).count("<<")
        assert row["steps"] in allowed
        for left, op, right, result, repeated in steps:
            a, b = int(left), int(right)
            expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]
            assert expected == int(result) == int(repeated) > 0
        assert steps[-1][-1] == row["answer"]
        assert text(row).endswith(f"</think><answer>{row['answer']}</answer>")
        assert verify(text(row), row) == Score(1.0)


def test_numbers_of_the_solution_stand_in_the_question_or_were_worked_out() -> None:
    for row in rows("test", 500, seed=5):
        known = set(re.findall(r"\d+", row["prompt"][0]["content"])) | FACTS
        for left, _, right, result, _ in ANNOTATION.findall(text(row)):
            assert {left, right} <= known
            known.add(result)


@pytest.mark.slow
def test_lengths_in_tokens_stay_within_the_demo_limits() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.path())
    for row in rows("train", 3000, level="demo", seed=9):
        assert len(tokenizer(row["prompt"][0]["content"])["input_ids"]) <= 60
        assert len(tokenizer(text(row))["input_ids"]) < 64  # and the closing <|end|>


def test_the_pretraining_text_never_has_the_task_format() -> None:
    for index in range(4000):
        written = document(index)
        assert TASK_FORMAT.search(written) is None
        assert not ("<<" in written and ("<answer>" in written or "?" in written))  # annotations in bare drills alone
        assert re.search(r"<answer>[^<]*\d", written) is None


@pytest.mark.parametrize(
    "written", ["<answer>24</answer>", "<answer> 24.0 </answer>", "<think>1</think><answer>24.00</answer> done",
                "<answer>7</answer> no: <answer>24</answer>", "<answer>24</answer><|end|>"]
)  # fmt: skip
def test_the_verifier_accepts(written: str) -> None:
    assert verify(written, {"answer": "24"}) == Score(1.0)


def test_the_verifier_reads_thousands() -> None:
    assert verify("<answer>1,024</answer>", {"answer": "1024"}) == Score(1.0)
    assert verify("<answer>1024.0</answer>", {"answer": "1,024"}) == Score(1.0)
    assert isinstance(verify("<answer>10,24</answer>", {"answer": "1024"}), Unparseable)


@pytest.mark.parametrize("written", ["<answer>25</answer>", "<answer>-24</answer>", "<answer>24.1</answer>",
                                     "<answer>24</answer><answer>25</answer>", "<answer>240</answer>"])  # fmt: skip
def test_the_verifier_rejects_other_numbers(written: str) -> None:
    assert isinstance(verify(written, {"answer": "24"}), Wrong)


@pytest.mark.parametrize(
    "written",
    ["", "24", "<answer></answer>", "<answer>24", "24</answer>", "<answer>24</answer><answer>24",
     "<answer>24 25</answer>", "<answer>２４</answer>", "<answer>٢٤</answer>", "<answer>2 4</answer>",
     "<answer>24 apples</answer>",
     "<answer>24.</answer>", "<answer>1e3</answer>", "<answer>" + "9" * 5000 + "</answer>", "<answer>nan</answer>",
     "<answer>0x18</answer>", "<answer>48/2</answer>", "<answer>2_4</answer>"],
)  # fmt: skip
def test_the_verifier_cannot_read(written: str) -> None:
    assert isinstance(verify(written, {"answer": "24"}), Unparseable)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="found split 'dev'"):
        rows("dev", 1)
    with pytest.raises(ValueError, match="level 'x'"):
        rows("test", 1, level="x")
