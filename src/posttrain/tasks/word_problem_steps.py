"""The steps of a worked answer to a word problem, and which of them are right: true labels, from text and row alone.

A **step** is a sentence of the thinking: it ends with the first full stop behind a calculation (`<<12*4=48>>48 apples.`) that is
followed by white space, a tag or the end.  A sentence without a calculation belongs to the step after it.  Everything behind the
last sentence, the answer's tags with it, is the last step.  The steps, one after another, are the text to the character.

A sentence is **right** when all of this holds for each of its calculations `<<a op b=c>>c`:

1. it can be read, and nothing else in the sentence looks like one (`<<`);
2. `a op b` is `c`, exactly, and the number behind `>>` is `c`;
3. `a` and `b` are known: each is a number of the question, a number that a word of the question stands for (`half` is 2, a
   `week` 7, a `spider` 8 legs: `FACTS`), or a result of an earlier calculation in a right step.

The last step is right when the task's verifier gives the answer 1, whatever came before.  So a number that comes out of a wrong
step makes the steps that use it wrong, and known numbers put together in a senseless way pass: `written_steps` cannot tell
that an addition should have been a subtraction.  `solution_steps` can, from the row's own worked solution: its sentences must
besides reach a result that the solution reaches; a right way of its own, over other results, is wrong there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from posttrain.tasks.word_problems import verify
from posttrain.types import Score

__all__ = ["FACTS", "WrittenStep", "solution_steps", "step_ends", "stepped_row", "written_steps"]

FACTS: dict[str, tuple[int, ...]] = {
    "half": (2,), "third": (3,), "quarter": (4,), "average": (2, 3), "twins": (2,), "pairs": (2,), "back": (2,), "fence": (2,),
    "square": (4,), "cows": (4,), "hens": (2,), "spiders": (8,), "beetles": (6,), "dozen": (12,), "weeks": (7,), "hours": (60,),
    "years": (12,),
}  # fmt: skip
"""A word of the question -> numbers that a step may use because of it, though they are not written there."""

_NUMBER = r"\d+(?:\.\d+)?"
_CALCULATION = re.compile(rf"<<\s*({_NUMBER})\s*([-+*/])\s*({_NUMBER})\s*=\s*({_NUMBER})\s*>>\s*({_NUMBER})?")
_STOP = re.compile(r"\.(?=\s|<|\Z)")


@dataclass(frozen=True)
class WrittenStep:
    """One step of an answer: characters `[start, end)` of its text, and whether it is right."""

    start: int
    end: int
    right: bool
    reason: str = ""
    """Why it is wrong; empty where it is right."""


def _ends(text: str) -> list[int]:
    """One past the last character of each sentence with a calculation."""
    thinking = text.rpartition("<answer>")[0] or text
    ends: list[int] = []
    calculated = [match.end() for match in re.finditer(r">>", thinking)]
    for stop in _STOP.finditer(thinking):
        if any((ends[-1] if ends else 0) < place <= stop.start() for place in calculated):
            ends.append(stop.end())
    return ends


def step_ends(text: str) -> list[int]:
    """One past the last character of each step of an answer, rising; the last is the text's end.

    Example:
        >>> step_ends("<think>Then he has <<3+4=7>>7 pens.</think><answer>7</answer>")
        [35, 61]
    """
    ends = _ends(text)
    if text[ends[-1] if ends else 0 :].strip():
        return [*ends, len(text)]
    return [*ends[:-1], len(text)] if ends else []


def _question(row: Mapping[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else " ".join(str(message.get("content", "")) for message in prompt)


def _known(question: str) -> set[Fraction]:
    """The numbers that the question states or a word of it stands for."""
    words = set(re.findall(r"[a-z]+", question.lower()))
    found = {Fraction(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", question)}
    return found | {Fraction(number) for word, numbers in FACTS.items() if word in words for number in numbers}


def _fault(left: Fraction, op: str, right: Fraction, result: Fraction, known: set[Fraction]) -> str:
    """What is wrong with one calculation, or nothing."""
    for number in (left, right):
        if number not in known:
            return f"{number} is neither in the question nor a result of a right step"
    if op == "/" and right == 0:
        return "a division by 0"
    value = {"+": left + right, "-": left - right, "*": left * right}[op] if op != "/" else left / right
    return "" if value == result else f"{left}{op}{right} is {value}, not {result}"


def _judged(sentence: str, known: set[Fraction]) -> tuple[str, set[Fraction]]:
    """Why a sentence is wrong (nothing where it is right), and its results."""
    found = list(_CALCULATION.finditer(sentence))
    if len(found) != max(sentence.count("<<"), sentence.count(">>")):
        return "a calculation that cannot be read", set()
    results: set[Fraction] = set()
    for match in found:
        left, right, result = (Fraction(match[part]) for part in (1, 3, 4))
        if match[5] is None or Fraction(match[5]) != result:
            return f"{match[5] or 'nothing'} is written behind a result of {result}", set()
        fault = _fault(left, match[2], right, result, known | results)
        if fault:
            return fault, set()
        results.add(result)
    return "", results


def _labelled(text: str, row: Mapping[str, Any], allowed: set[Fraction] | None) -> list[WrittenStep]:
    known, steps, start = _known(_question(row)), [], 0
    for end in _ends(text):
        fault, results = _judged(text[start:end], known)
        stray = sorted(results - allowed) if allowed is not None and not fault else []
        if stray:
            fault, results = f"the worked solution never reaches {stray[0]}", set()
        known |= results
        steps.append(WrittenStep(start, end, not fault, fault))
        start = end
    if text[start:].strip():
        verdict = verify(text, row)
        right = isinstance(verdict, Score) and verdict.value == 1
        steps.append(WrittenStep(start, len(text), right, "" if right else verdict.reason or "the answer is another number"))
    elif steps:
        steps[-1] = replace(steps[-1], end=len(text))
    return steps


def written_steps(text: str, row: Mapping[str, Any]) -> list[WrittenStep]:
    """The steps of an answer, each right or wrong by the rules above.

    Args:
        text: The answer as it was written, `<think>...</think><answer>...</answer>`; any other text has one step.
        row: With `prompt` (text or messages) and `answer`.

    Example:
        >>> row = {"prompt": "Tom has 3 pens and buys 4 more. How many pens does he have now?", "answer": "7"}
        >>> [step.right for step in written_steps("<think>Then he has <<3+4=7>>7 pens.</think><answer>7</answer>", row)]
        [True, True]
        >>> written_steps("<think>Then he has <<3+5=8>>8 pens.</think><answer>8</answer>", row)[0].reason
        '5 is neither in the question nor a result of a right step'
    """
    return _labelled(text, row, None)


def solution_steps(text: str, row: Mapping[str, Any]) -> list[WrittenStep]:
    """As `written_steps`, where a sentence is right only when the row's own `completion` reaches its results too."""
    solution = row["completion"]
    worked = solution if isinstance(solution, str) else " ".join(str(message.get("content", "")) for message in solution)
    return _labelled(text, row, {Fraction(match[4]) for match in _CALCULATION.finditer(worked)})


def stepped_row(text: str, row: Mapping[str, Any], steps: Sequence[WrittenStep]) -> dict[str, Any]:
    """An answer as a row of `process_reward`: prompt, steps and labels, with nothing between two steps.

    Example:
        >>> row = {"prompt": "Tom has 3 pens and buys 4 more. How many pens does he have now?", "answer": "7"}
        >>> text = "<think>Then he has <<3+4=7>>7 pens.</think><answer>8</answer>"
        >>> made = stepped_row(text, row, written_steps(text, row))
        >>> made["steps"], made["labels"]
        (['<think>Then he has <<3+4=7>>7 pens.', '</think><answer>8</answer>'], [1.0, 0.0])
    """
    kept = {key: row[key] for key in ("id", "answer") if key in row}
    pieces = [text[step.start : step.end] for step in steps]
    labels = [float(step.right) for step in steps]
    return {**kept, "prompt": row["prompt"], "steps": pieces, "labels": labels, "separator": ""}
