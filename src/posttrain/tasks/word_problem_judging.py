"""Judging the embedded task: word problems with a right or a corrupted solution, and a short critique that ends in a verdict.

Three corruptions, each graded by the task's own verifier afterwards: one digit of a result, one number that is worked with, one
operation.  What follows the first wrong step goes on from its result, so that a corrupted solution reads like a right one; both
are written by the same code.  Problems come from the split that is asked for, so that splits are as disjoint as those of the task.

>>> row = rows("demonstrations", 2, reasoned=True)[1]
>>> print(row["prompt"][0]["content"].splitlines()[-2:], row["completion"][0]["content"][-20:], row["answer"])
['Is the answer right?', 'Find the steps.'] <answer>yes</answer> yes

Source of the recipe: "Foundational Automatic Evaluators", arXiv:2510.17793 (error injection, and generate then grade).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.errors import ConfigError, nearest
from posttrain.judges.templates import template_named
from posttrain.judges.verdicts import verdict_in
from posttrain.rewards.reward import Answer, Reward
from posttrain.tasks.task import Task, count_of, known_split
from posttrain.tasks.word_problems import LEVELS, SPLITS, Draw, Problem, Step, problem, verify, worked_answer
from posttrain.types import Overlong, Score, Unparseable, Verdict, Wrong

__all__ = ["KINDS", "Corrupted", "corrupted", "critique", "judged_right", "rows", "word_problem_judging"]

KINDS = ("check", "pair")
"""Is this answer right, and which of two is."""
CORRUPTIONS = ("digit", "operand", "operation")
_TRIES = 60  # draws before another problem is taken


@dataclass(frozen=True)
class Corrupted:
    """A wrong solution."""

    problem: Problem
    """The same question, other steps and answer."""
    step: int
    """The first wrong step, from 0."""
    kind: str
    """One of `CORRUPTIONS`."""


def corrupted(item: Problem, draw: Draw, *, largest: int = 999) -> Corrupted | None:
    """A wrong solution of a problem, or None where none was found in a few draws.

    Its answer differs from the right one by the verifier's word, and every result is a positive whole number up to `largest`.
    """
    for _ in range(_TRIES):
        kind, place = draw.one(CORRUPTIONS), draw.between(0, len(item.steps) - 1)
        step = _wrong(item, item.steps[place], kind, draw)
        steps = None if step is None else _carried(item.steps, place, step)
        if steps is None or max(each.result for each in steps) > largest:
            continue
        wrong = replace(item, steps=steps, answer=steps[-1].result)
        if isinstance(verify(worked_answer(wrong), {"answer": item.answer}), Wrong):
            return Corrupted(wrong, place, kind)
    return None


def _wrong(item: Problem, step: Step, kind: str, draw: Draw) -> Step | None:
    """One step gone wrong, or None where this draw does not suit."""
    if kind == "digit":
        digits = list(str(step.result))
        place = draw.between(0, len(digits) - 1)
        digits[place] = draw.one([digit for digit in "0123456789" if digit != digits[place]])
        return replace(step, result=int("".join(digits))) if digits[0] != "0" else None
    if kind == "operand":
        known = {number for other in item.steps for number in (other.left, other.right)}
        others = sorted((known | {step.right - 1, step.right + 1}) - {step.right})
        return _worked(replace(step, right=draw.one(others)))
    return _worked(replace(step, op=draw.one([op for op in "+-*/" if op != step.op])))


def _worked(step: Step) -> Step | None:
    """The step with the result that its numbers give; None where they are no task's, or change nothing."""
    left, right = step.left, step.right
    if right < 2 or (step.op == "/" and left % right):
        return None
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[step.op]
    return replace(step, result=result) if result > 0 and result != step.result else None


def _carried(steps: Sequence[Step], place: int, wrong: Step) -> tuple[Step, ...] | None:
    """The steps with one of them wrong, and those that use its result worked from it."""
    found, old, new = [*steps[:place], wrong], [steps[place].result], [wrong.result]
    for step in steps[place + 1 :]:
        left, right = (new[old.index(number)] if number in old else number for number in (step.left, step.right))
        if (left, right) == (step.left, step.right):
            found.append(step)
            continue
        moved = _worked(replace(step, left=left, right=right))
        if moved is None:
            return None
        old.append(step.result)
        new.append(moved.result)
        found.append(moved)
    return tuple(found)


def critique(item: Problem, wrong: Corrupted | None = None) -> str:
    """The right solution beside what a solution says, step by step, up to the first wrong step, which it names.

    Each step is worked before the number to compare it with is read off, as a small model copies where it may; and the two are
    compared by a subtraction, which the embedded model can do: it does not learn to see whether two numbers are the same.

    Args:
        item: The problem with its right steps.
        wrong: The solution that is judged; None: the right one.
    """
    said = wrong.problem.steps if wrong else item.steps
    last = wrong.step + 1 if wrong else len(item.steps)
    lines = []
    for step, other in zip(item.steps[:last], said[:last], strict=True):
        worked, off = step.text(calculation="<<{left}{op}{right}={result}>>{result}"), other.result - step.result
        lines.append(f"{worked} It says {other.result}, <<{other.result}-{step.result}={off}>>{off} off.")
    return " ".join([*lines, f"So step {last} is wrong." if wrong else "No step is wrong."])


def rows(
    split: str, n: int, *, kind: str = "check", level: str = "demo", seed: int = 0, reasoned: bool = True
) -> list[dict[str, Any]]:
    """The first `n` rows of a split: a question with solutions, and the verdict on them.

    Verdicts are balanced, every second row is "yes" (or "A"); the place of the right solution of a pair is in `right_at`.

    Args:
        split: A split of the word problems.
        n: How many.
        kind: "check" (one solution: yes or no) or "pair" (two: A or B).
        level: Of the word problems.
        seed: Other numbers give other problems and corruptions.
        reasoned: Ask for the steps first, and demonstrate them; otherwise the verdict alone.

    Returns:
        Rows of `id`, `prompt`, `direct_prompt` (that asks for the verdict alone), `completion`, `answer` (the gold verdict),
        `labels`, `corruption`, `first_wrong` (from 1, 0 for none), `right_at` (of a pair) and `task`.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"word problems are judged as {' or '.join(KINDS)}; there is no '{kind}'{nearest(kind, KINDS)}")
    return [_row(split, index, kind, level, seed, reasoned) for index in range(n)]


def _row(split: str, index: int, kind: str, level: str, seed: int, reasoned: bool) -> dict[str, Any]:
    draw = Draw(f"word-problem-judging/{kind}/{split}/{seed}/{level}/{index}")
    item = problem(split, index, level=level, seed=seed)
    largest = LEVELS[level].largest
    wrong, again = corrupted(item, draw, largest=largest), 0
    while wrong is None:  # nothing but another problem helps
        again += 1
        item = problem(split, index, level=level, seed=seed + 1000 * again)
        wrong = corrupted(item, draw, largest=largest)
    template = template_named(f"word-problem-{kind}")
    labels, first = template.options, index % 2 == 1
    right, bad = worked_answer(item), worked_answer(wrong.problem)
    if kind == "check":
        given = {"answer": right if first else bad}
        found = critique(item, None if first else wrong)
    else:
        given = {"first": right, "second": bad} if first else {"first": bad, "second": right}
        of_each = [critique(item), critique(item, wrong)]
        found = " ".join(f"{label}: {text}" for label, text in zip(labels, of_each if first else of_each[::-1], strict=True))
    question = template.messages(prompt=item.question, **given)[0]["content"]
    think = "\n" + template_named(f"word-problem-{kind}-reasoned").think if reasoned else ""
    verdict = labels[0] if first else labels[1]
    written = (f"<think>{found}</think>" if reasoned else "") + f"<answer>{verdict}</answer>"
    corrupt = kind == "pair" or not first
    return {
        "id": f"word-problem-judging/{kind}/{split}/{index}",
        "prompt": [{"role": "user", "content": question + think}],
        "direct_prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": written}],
        "answer": verdict,
        "labels": list(labels),
        "corruption": wrong.kind if corrupt else "",
        "first_wrong": wrong.step + 1 if corrupt else 0,
        "right_at": (0 if first else 1) if kind == "pair" else -1,
        "task": f"word-problem-{kind}",
    }


def judged_right(answer: Answer) -> Verdict:
    """Is the verdict that ends the text the gold one?  A text without one is `Unparseable`, or `Overlong` where it was cut."""
    found = verdict_in(answer.text, tuple(answer.info["labels"]))
    if found is None:
        return (Overlong if answer.finish == "length" else Unparseable)(reason="no verdict at the end")
    return Score(1.0) if found == answer.info["answer"] else Wrong()


def word_problem_judging(kind: str = "check", level: str = "demo", reasoned: bool = True, max_tokens: int | None = None) -> Task:
    """Judging as a task of its own: prompts with a gold verdict.

    Raises:
        ConfigError: There is no such kind or level.
    """
    if level not in LEVELS or kind not in KINDS:
        wrong, known = (level, tuple(LEVELS)) if level not in LEVELS else (kind, KINDS)
        raise ConfigError(f"task 'word-problem-judging' has no '{wrong}'{nearest(wrong, known)}")

    def some(split: str, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        known_split(split, tuple(SPLITS), task="word-problem-judging")
        count = count_of(n, task="word-problem-judging")
        return rows(split, count, kind=kind, level=level, seed=seed, reasoned=reasoned)

    return Task(
        name=f"word-problem-judging({kind})",
        rows=some,
        splits=tuple(SPLITS),
        rewards=(Reward("right", judged_right, where="inline"),),
        max_tokens=max_tokens or ((176 if kind == "check" else 320) if reasoned else 8),
    )
