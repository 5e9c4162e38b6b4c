"""True labels of steps: worked answers are right, every corrupted digit is found in its step, wrong operands too."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from posttrain.data.rows import need
from posttrain.tasks.word_problem_steps import solution_steps, stepped_row, written_steps
from posttrain.tasks.word_problems import LEVELS, SPLITS, rows, verify
from posttrain.types import Score

ROW = {
    "prompt": [{"role": "user", "content": "Mia has 4 boxes with 12 pens in each. She gives away 9. How many pens are left?"}],
    "completion": "<think>There are <<4*12=48>>48 pens. Then <<48-9=39>>39 pens are left.</think><answer>39</answer>",
    "answer": "39",
}


def text(row: dict) -> str:
    return row["completion"][0]["content"]


def right(written: str, row: dict = ROW) -> list[bool]:
    return [step.right for step in written_steps(written, row)]


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_every_worked_answer_is_right_in_every_step(level: str) -> None:
    for split in SPLITS:
        for row in rows(split, 200, level=level, seed=5):
            for judge in (written_steps, solution_steps):
                found = judge(text(row), row)
                assert len(found) == row["steps"] + 1
                assert all(step.right and not step.reason for step in found), (row, found)
                assert "".join(text(row)[step.start : step.end] for step in found) == text(row)


def test_every_corrupted_digit_is_found_in_the_step_that_holds_it() -> None:
    draw, tried = random.Random(0), 0
    for row in rows("test", 150, level="demo"):
        whole = text(row)
        checked = [m.span() for m in re.finditer(r"<<[^>]*>>\d+|<answer>\d+", whole)]
        for place in [i for a, b in checked for i in range(a, b) if whole[i].isdigit()]:
            other = draw.choice([d for d in "0123456789" if d != whole[place]])
            found = written_steps(whole[:place] + other + whole[place + 1 :], row)
            first = next(number for number, step in enumerate(found) if not step.right)
            assert found[first].start <= place < found[first].end, (row, place, other, found)
            tried += 1
    assert tried > 2000


def test_an_operand_that_nobody_gave_is_wrong_though_the_sum_is_right() -> None:
    assert right("<think>There are <<4*13=52>>52 pens. Then <<52-9=43>>43 pens are left.</think><answer>43</answer>") == [False] * 3
    found = written_steps("<think>There are <<4*12=48>>48 pens. Then <<48-8=40>>40 are left.</think><answer>40</answer>", ROW)
    assert [step.right for step in found] == [True, False, False]
    assert found[1].reason == "8 is neither in the question nor a result of a right step"


def test_an_operand_taken_from_another_word_problem() -> None:
    """The numbers of one worked answer in place of another's: the first step that uses a foreign number is wrong."""
    items, tried = rows("validation", 120, level="demo"), 0
    for row, other in itertools.pairwise(items):
        own = set(re.findall(r"\d+", row["prompt"][0]["content"]))
        foreign = next((n for n in re.findall(r"\d+", other["prompt"][0]["content"]) if n not in own and int(n) > 12), None)
        if foreign is None:
            continue
        _, op, second, _ = re.search(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", text(row)).groups()
        value = {"+": int(foreign) + int(second), "-": int(foreign) - int(second), "*": int(foreign) * int(second)}.get(op)
        if value is None or value < 0:
            continue
        changed = re.sub(r"<<.*?>>\d+", f"<<{foreign}{op}{second}={value}>>{value}", text(row), count=1)
        assert not written_steps(changed, row)[0].right, (row, changed)
        tried += 1
    assert tried > 30


def test_a_wrong_operation_on_known_numbers_is_seen_by_the_solution_alone() -> None:
    written = "<think>There are <<4+12=16>>16 pens. Then <<16-9=7>>7 pens are left.</think><answer>7</answer>"
    assert right(written) == [True, True, False]
    assert [step.right for step in solution_steps(written, ROW)] == [False, False, False]
    assert solution_steps(written, ROW)[0].reason == "the worked solution never reaches 16"
    other_order = "<think>Then <<48-9=39>>39 pens are left.</think><answer>39</answer>"
    assert right(other_order) == [False, True]  # 48 was never worked out; the answer is right all the same


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("<think>There are <<12*4=48>>48 pens. <<48-9=39>>39.</think><answer>39</answer>", [True, True, True]),
        ("<think>So we go. There are << 4 * 12 = 48 >> 48 pens.</think><answer>39</answer>", [True, True]),
        ("<think>It is <<4*12=48>>48, less <<48-9=39>>39.</think><answer>39</answer>", [True, True]),
        ("<think>There are <<4*12=48>>84 pens.</think><answer>39</answer>", [False, True]),
        ("<think>There are <<4*12=48>> pens.</think><answer>39</answer>", [False, True]),
        ("<think>There are <<4x12=48>>48 pens.</think><answer>39</answer>", [False, True]),
        ("<think>There are <<4*12=48>>48 pens. Then <<48/0=9>>9.</think><answer>39</answer>", [True, False, True]),
        ("<think>There are <<4*12=48>>48 pens. Then <<48-9=", [True, False]),  # cut off
        ("<think>There are <<4*12=48>>48 pens.", [True]),
        ("<answer>39</answer>", [True]),
        ("39", [False]),
        ("", []),
    ],
)
def test_other_texts(written: str, expected: list[bool]) -> None:
    assert right(written) == expected
    spans = [(step.start, step.end) for step in written_steps(written, ROW)]
    assert "".join(written[a:b] for a, b in spans) == written


def test_the_last_label_is_the_verifiers() -> None:
    for answer in ("39", "039", "40", "39 pens", ""):
        written = f"<think>There are <<4*12=48>>48 pens.</think><answer>{answer}</answer>"
        assert right(written)[-1] == (verify(written, ROW) == Score(1.0))


def test_rows_for_a_process_reward_model() -> None:
    for row in rows("train", 20):
        made = stepped_row(text(row), row, written_steps(text(row), row))
        need([made], "steps", "process_reward")
        assert "".join(made["steps"]) == text(row)
        assert made["labels"] == [1.0] * (row["steps"] + 1)
