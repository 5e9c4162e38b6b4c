"""Judging the embedded task: corruptions are wrong, verdicts are right and balanced, splits stay disjoint."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

import pytest

from posttrain.errors import ConfigError
from posttrain.judges import template_named, verdict_in
from posttrain.rewards.reward import Answer
from posttrain.tasks.word_problem_judging import CORRUPTIONS, corrupted, judged_right, rows, word_problem_judging
from posttrain.tasks.word_problems import LEVELS, Draw, problem, verify, worked_answer
from posttrain.types import Overlong, Score, Unparseable, Wrong

STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
OFF = re.compile(r"=(\d+)>>[^<]*It says (\d+), <<(\d+)-(\d+)=(-?\d+)>>(-?\d+) off\.")


def right(left: str, op: str, second: str, result: str) -> bool:
    a, b = int(left), int(second)
    return {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[op] == int(result)


def content(row: dict, key: str = "prompt") -> str:
    return row[key][0]["content"]


@pytest.mark.parametrize("level", ["easy", "demo", "hard"])
def test_a_corruption_is_wrong_from_one_step_on(level: str) -> None:
    kinds: Counter[str] = Counter()
    for index in range(400):
        item = problem("train", index, level=level)
        found = corrupted(item, Draw(f"test/{index}"), largest=LEVELS[level].largest)
        assert found is not None
        kinds[found.kind] += 1
        wrong = found.problem
        assert isinstance(verify(worked_answer(wrong), {"answer": item.answer}), Wrong)
        assert wrong.question == item.question
        assert wrong.steps[: found.step] == item.steps[: found.step]
        assert wrong.steps[found.step] != item.steps[found.step]
        for number, step in enumerate(wrong.steps):
            worked = right(str(step.left), step.op, str(step.right), str(step.result))
            assert worked == (number != found.step or found.kind != "digit")
            assert 0 < step.result <= LEVELS[level].largest
        before, after = item.steps[found.step], wrong.steps[found.step]
        changed = [name for name in ("left", "op", "right") if getattr(before, name) != getattr(after, name)]
        assert changed == {"digit": [], "operand": ["right"], "operation": ["op"]}[found.kind]
        if found.kind == "digit":
            pairs = zip(str(before.result), str(after.result), strict=True)
            assert sum(a != b for a, b in pairs) == 1
    assert set(kinds) == set(CORRUPTIONS)
    assert min(kinds.values()) > 40


@pytest.mark.parametrize("kind", ["check", "pair"])
def test_verdicts_are_right_balanced_and_end_the_critique(kind: str) -> None:
    made = rows("train", 400, kind=kind)
    assert Counter(row["answer"] for row in made) == dict.fromkeys(template_named(f"word-problem-{kind}").options, 200)
    for index, row in enumerate(made):
        item = problem("train", index)
        shown = [
            verify(f"<answer>{number}</answer>", {"answer": item.answer}) for number in re.findall(r"<answer>(\d+)", content(row))
        ]
        correct = [isinstance(verdict, Score) for verdict in shown]
        if kind == "check":
            assert correct == [row["answer"] == "yes"]
        else:
            assert sorted(correct) == [False, True]
            assert correct.index(True) == row["right_at"] == "AB".index(row["answer"])
        critique = content(row, "completion")
        assert verdict_in(critique, row["labels"]) == row["answer"]
        assert all(right(*found[:4]) and found[3] == found[4] for found in STEP.findall(critique))
        assert f"<<{item.steps[0].left}{item.steps[0].op}{item.steps[0].right}=" in critique
        if row["first_wrong"]:
            assert f"So step {row['first_wrong']} is wrong." in critique
        else:
            assert "No step is wrong." in critique


@pytest.mark.parametrize("kind", ["check", "pair"])
def test_a_critique_subtracts_and_only_the_wrong_step_is_off(kind: str) -> None:
    for row in rows("train", 200, kind=kind):
        critique = content(row, "completion")
        found = [tuple(map(int, one)) for one in OFF.findall(critique)]
        assert len(found) == critique.count("It says")
        for worked, said, first, second, off, again in found:
            assert (first, second, off, again) == (said, worked, said - worked, said - worked)
        assert sum(one[4] != 0 for one in found) == critique.count("So step") == (row["first_wrong"] > 0)


def test_nothing_but_the_solution_tells_right_from_wrong() -> None:
    """Right and wrong solutions are as long, and their answers as large: both come from the same code."""
    made = rows("train", 2000)
    of = {label: [row for row in made if row["answer"] == label] for label in ("yes", "no")}
    length = {label: sum(len(content(row)) for row in part) / len(part) for label, part in of.items()}
    assert length["yes"] == pytest.approx(length["no"], rel=0.02)
    steps = {label: sum(content(row).count("<<") for row in part) / len(part) for label, part in of.items()}
    assert steps["yes"] == pytest.approx(steps["no"], rel=0.05)


def test_splits_and_seeds_are_those_of_the_word_problems() -> None:
    questions = {split: {content(row).splitlines()[0] for row in rows(split, 300)} for split in ("train", "test", "demonstrations")}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["demonstrations"]
    assert rows("test", 5) == rows("test", 9)[:5]
    assert rows("test", 5) != rows("test", 5, seed=1)


def test_the_direct_prompt_asks_for_the_verdict_alone() -> None:
    (reasoned,), (direct,) = rows("train", 1), rows("train", 1, reasoned=False)
    assert reasoned["direct_prompt"] == direct["prompt"] == direct["direct_prompt"]
    assert content(reasoned) == content(direct) + "\nFind the steps."
    assert content(direct, "completion") == f"<answer>{direct['answer']}</answer>"


def test_prompts_fit_the_embedded_model() -> None:
    from transformers import AutoTokenizer

    from posttrain import tiny

    tokenizer = AutoTokenizer.from_pretrained(str(tiny.path()))
    for kind, task in ((kind, word_problem_judging(kind)) for kind in ("check", "pair")):
        for row in rows("train", 300, kind=kind):
            assert len(tokenizer(content(row))["input_ids"]) < 320
            assert len(tokenizer(content(row, "completion"))["input_ids"]) < task.max_tokens


def test_the_task_verifies_verdicts() -> None:
    task = word_problem_judging("pair")
    (row,) = task.rows("test", 1)
    assert isinstance(judged_right(Answer(text=content(row, "completion"), info=row)), Score)
    other = "AB".replace(row["answer"], "")
    assert isinstance(judged_right(Answer(text=f"<answer>{other}</answer>", info=row)), Wrong)
    assert isinstance(judged_right(Answer(text="A: Step 1", info=row)), Unparseable)
    assert isinstance(judged_right(Answer(text="A: Step 1", info=row, finish="length")), Overlong)
    with pytest.raises(ConfigError, match="nearest: 'pair'"):
        rows("train", 1, kind="pairs")
    with pytest.raises(ConfigError, match="no 'dmeo'"):
        word_problem_judging(level="dmeo")
