"""Word problems in the style of GSM8K, written procedurally, with worked solutions, a verifier and disjoint splits.

A problem is a template, a few numbers, and a surface (names, things, wording). Its key, `template(numbers)`, is hashed
into one of a hundred buckets and every bucket belongs to one split, so no template meets the same numbers in two
splits, whatever the wording, the level or the seed. Problem i of a split depends only on (split, seed, level, i).

    >>> row = rows("test", 1)[0]
    >>> sorted(row)
    ['answer', 'completion', 'id', 'prompt', 'steps']
    >>> verify(row["completion"][0]["content"], row).value
    1.0
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from posttrain.tasks.word_problem_rare import RARE
from posttrain.tasks.word_problem_templates import (
    CLOSINGS,
    CONTAINERS,
    EVENTS,
    FIXED,
    OPENINGS,
    PEOPLE,
    PRONOUNS,
    THINGS,
    Template,
)
from posttrain.types import Score, Unparseable, Verdict, Wrong

__all__ = ["LEVELS", "SPLITS", "Level", "Problem", "Step", "problem", "rows", "split_of", "verify", "worked_answer"]

Item = TypeVar("Item")

SPLITS: dict[str, range] = {
    "pretrain": range(0, 60),
    "demonstrations": range(60, 68),
    "train": range(68, 84),
    "validation": range(84, 92),
    "test": range(92, 100),
}
"""Split -> its hash buckets, out of a hundred. `pretrain` feeds the text that the embedded base model reads."""


@dataclass(frozen=True)
class Level:
    """How hard the problems are."""

    steps: tuple[tuple[int, float], ...]
    """(number of steps, share) pairs; the shares add up to 1."""
    ranges: Mapping[str, tuple[int, int]]
    """Kind of number -> its least and greatest value."""
    largest: int
    """No result of a step is greater than this."""
    chained: float = 0.4
    """Share of problems that are chained stories; the others follow a fixed template."""
    rare: float = 0.0
    """Share of problems of rare kinds, which have their own number of steps."""
    longest: tuple[int, int] | None = None
    """Most pieces of a question and of a worked answer: words, digits, marks and tags, about the model's tokens."""


LEVELS: dict[str, Level] = {
    "easy": Level(
        steps=((1, 0.5), (2, 0.5)), ranges={"small": (2, 5), "big": (3, 20), "huge": (10, 60)}, largest=100
    ),
    "medium": Level(
        steps=((2, 0.5), (3, 0.5)), ranges={"small": (2, 9), "big": (4, 50), "huge": (20, 200)}, largest=300
    ),
    "demo": Level(
        steps=((2, 0.5), (3, 0.5)),
        ranges={"small": (2, 9), "big": (4, 50), "huge": (20, 200)},
        largest=600,
        longest=(60, 64),
    ),
    "wide": Level(
        steps=((1, 0.15), (2, 0.35), (3, 0.35), (4, 0.15)),
        ranges={"small": (2, 9), "big": (3, 50), "huge": (10, 200)},
        largest=300,
        rare=0.1,
    ),
    "hard": Level(
        steps=((3, 0.5), (4, 0.5)),
        ranges={"small": (2, 12), "big": (10, 99), "huge": (50, 400)},
        largest=999,
        rare=0.1,
    ),
}
"""Name -> level. `wide` and `hard` are what the embedded model's pre-training text draws from."""


@dataclass(frozen=True)
class Step:
    """One calculation of a worked solution: `left op right = result`."""

    left: int
    op: str
    right: int
    result: int
    sentence: str
    """What it means; `#` is the place of the calculation."""

    def text(self, *, calculation: str) -> str:
        """The sentence with `calculation`, a format string of left, op, right and result, put in its place."""
        worked = calculation.format(left=self.left, op=self.op, right=self.right, result=self.result)
        return self.sentence.replace("#", worked)


@dataclass(frozen=True)
class Problem:
    """A question with its worked solution."""

    key: str
    """`template(numbers)`, what the split is decided by, for instance `times-total(12,3)`."""
    question: str
    steps: tuple[Step, ...]
    answer: int


def split_of(key: str) -> str:
    """The one split that the key `template(numbers)` belongs to."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


class Draw:
    """Random choices that depend only on the name they were opened with, on every Python version."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")).random

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items, all equally likely."""
        return items[int(self._random() * len(items))]

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return self._random() < share

    def weighed(self, shares: Sequence[tuple[Item, float]]) -> Item:
        """One of the items, with the probability beside it."""
        point = self._random()
        for item, share in shares:
            point -= share
            if point < 0:
                return item
        return shares[-1][0]


def _people_and_things(draw: Draw) -> dict[str, str]:
    """Fill the holes for people, pronouns, things and containers."""
    name, he = draw.one(PEOPLE)
    friend, other = name, name
    while friend == name:
        friend = draw.one(PEOPLE)[0]
    while other in (name, friend):
        other = draw.one(PEOPLE)[0]
    things = draw.one(THINGS)
    others = things
    while others == things:
        others = draw.one(THINGS)
    containers, container = draw.one(CONTAINERS)
    him, his = PRONOUNS[he]
    return {
        "N": name, "F": friend, "G": other, "he": he, "He": he.capitalize(), "him": him, "his": his,
        "T": things, "U": others, "C": containers, "c": container,
    }  # fmt: skip


def _chain(draw: Draw, num_steps: int) -> Template:
    """A story of `num_steps` events that each change how many things there are."""
    sentences, steps, numbers, ops = [draw.one(OPENINGS)], [], [("a", "big")], ""
    before = "a"
    for index in range(num_steps):
        event = draw.one(EVENTS)
        while ops and ops[-1] == event.op and event.op in "*/":
            event = draw.one(EVENTS)
        hole = f"v{index}"
        sentences.append(draw.one(event.wordings).replace("{v}", "{" + hole + "}"))
        numbers.append((hole, event.kind))
        steps.append((f"r{index}", before, event.op, hole, event.sentence))
        before, ops = f"r{index}", ops + event.op
    sentences.append(draw.one(CLOSINGS))
    return Template(name="chain" + ops, numbers=tuple(numbers), wordings=(" ".join(sentences),), steps=tuple(steps))


def _value(left: int, op: str, right: int) -> int:
    """The result of one step, or 0 where it is not a positive integer."""
    if op == "+":
        return left + right
    if op == "-":
        return max(left - right, 0)
    if op == "*":
        return left * right
    return left // right if left % right == 0 and left > right else 0


def _work(template: Template, numbers: Mapping[str, int], largest: int) -> list[tuple[int, str, int, int, str]] | None:
    """(left, op, right, result, sentence) of each step, or None where the numbers do not suit."""
    known, worked = dict(numbers), []
    for name, left, op, right, sentence in template.steps:
        first = known[left]
        second = known[right] if right in known else int(right)
        result = _value(first, op, second)
        if not 0 < result <= largest:
            return None
        known[name] = result
        worked.append((first, op, second, result, sentence))
    return worked


def _template(draw: Draw, num_steps: int, rules: Level) -> Template:
    """A chained story or a fixed template."""
    if rules.rare and draw.chance(rules.rare):
        return draw.one(RARE)
    return _chain(draw, num_steps) if draw.chance(rules.chained) else draw.one(FIXED[num_steps])


def problem(split: str, index: int, *, level: str = "demo", seed: int = 0) -> Problem:
    """Problem `index` of a split. It depends on nothing but the arguments.

    Candidates are drawn until one belongs to the split and its worked answer is short enough.
    """
    if split not in SPLITS or level not in LEVELS:
        raise ValueError(f"found split {split!r}, level {level!r}; write one of {list(SPLITS)} and {list(LEVELS)}")
    draw, rules = Draw(f"word-problems/{split}/{seed}/{level}/{index}"), LEVELS[level]
    while True:
        item = _candidate(draw, split, rules)
        if rules.longest is None:
            return item
        pieces = [len(_PIECES.findall(text)) for text in (item.question, worked_answer(item))]
        if pieces[0] <= rules.longest[0] and pieces[1] < rules.longest[1]:  # with room for the token that ends it
            return item


def _candidate(draw: Draw, split: str, rules: Level) -> Problem:
    """A problem of the split, drawn until its results are whole and positive and its key hashes into the split."""
    num_steps = draw.weighed(rules.steps)
    template, tries = _template(draw, num_steps, rules), 0
    while True:
        if tries == _TRIES:  # few or none of this template's keys are in this split
            template, tries = _template(draw, num_steps, rules), 0
        tries += 1
        numbers = {hole: draw.between(*rules.ranges[kind]) for hole, kind in template.numbers}
        worked = _work(template, numbers, rules.largest)
        key = f"{template.name}({','.join(map(str, numbers.values()))})"
        if worked is not None and split_of(key) == split:
            break
    holes: dict[str, Any] = {**_people_and_things(draw), **numbers}
    question = draw.one(template.wordings).format(**holes)
    steps = tuple(
        Step(left=left, op=op, right=right, result=result, sentence=sentence.format(**holes))
        for left, op, right, result, sentence in worked
    )
    return Problem(key=key, question=question[0].upper() + question[1:], steps=steps, answer=steps[-1].result)


def worked_answer(item: Problem) -> str:
    """The worked solution as a demonstration writes it, with calculator annotations."""
    worked = " ".join(step.text(calculation="<<{left}{op}{right}={result}>>{result}") for step in item.steps)
    return f"<think>{worked}</think><answer>{item.answer}</answer>"


def rows(split: str, n: int, *, level: str = "demo", seed: int = 0) -> list[dict[str, Any]]:
    """The first `n` problems of a split as rows of prompt, completion, answer and number of steps.

    Two rows of one split may repeat a problem; rows of two splits never do.
    """
    made = []
    for index in range(n):
        item = problem(split, index, level=level, seed=seed)
        made.append(
            {
                "id": f"word-problems/{split}/{index}",
                "prompt": [{"role": "user", "content": item.question}],
                "completion": [{"role": "assistant", "content": worked_answer(item)}],
                "answer": str(item.answer),
                "steps": len(item.steps),
            }
        )
    return made


_PIECES = re.compile(r"</?[a-z]+>|\$?<<|>>| (?=[0-9])|[0-9]|[A-Za-z]+|[^\w\s]")
_TRIES = 1000  # draws of numbers before another template is taken
_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_LONGEST = 32  # characters of an answer; longer ones are not read as numbers


def verify(text: str, row: Mapping[str, object]) -> Verdict:
    """Compare the number in the last `<answer>...</answer>` with the row's answer, exactly.

    `24.0` equals 24 and `1,024` equals 1024. A last `<answer>` that is not closed, or that holds anything but one
    number in plain digits, is `Unparseable`; another number is `Wrong`.
    """
    _, opened, rest = text.rpartition("<answer>")
    if not opened:
        return Unparseable(reason="no <answer>")
    found, closed, _ = rest.partition("</answer>")
    if not closed:
        return Unparseable(reason="<answer> is not closed")
    found = found.strip()
    if len(found) > _LONGEST or _NUMBER.fullmatch(found) is None:
        return Unparseable(reason="what stands in <answer> is not one number")
    if Fraction(found.replace(",", "")) == Fraction(str(row["answer"]).replace(",", "")):
        return Score(1.0)
    return Wrong()
