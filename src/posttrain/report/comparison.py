"""The same problems before and after: which answers changed, and a fair choice of them to read.

Before is the model that the last stage started from; the first model, of the whole run, stands beside the two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report.statistics import Interval, paired_difference
from posttrain.report.summary import EvaluationSummary

Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model -> question id -> entry with `prompt`, `completion`, `reward`, `answer`."""

SHOWN = {"newly right": 3, "newly wrong": 2, "right before and after": 1, "wrong before and after": 2}
"""How many problems of each kind are shown: what was lost has its place beside what was gained."""

PASS_MARK = 1 - 1e-9
"""The reward from which an answer is right, where its entry does not say."""

STATES = ("right", "wrong", "not in the asked format", "cut off", "not judged")
"""What can be said of one answer.  All but the first count as wrong; the last three could not be read."""


@dataclass(frozen=True)
class Answer:
    """What one model wrote."""

    model: str
    completion: str
    reward: float | None
    state: str  # one of `STATES`

    @property
    def right(self) -> bool:
        """Does it count?"""
        return self.state == "right"


@dataclass(frozen=True)
class Problem:
    """One problem with the answers of several models."""

    id: str
    kind: str
    prompt: str
    answer: str | None  # the reference answer, where there is one
    answers: list[Answer]


@dataclass(frozen=True)
class Comparison:
    """How the last model differs from the one it started from, on the problems that both and the first model answered."""

    first: str
    start: str  # the same as `first` where the last stage started from it
    last: str
    total: int
    counts: dict[str, int]  # kind, from `start` to `last` -> problems; they add up to `total`
    since_first: dict[str, int]  # the same from `first` to `last`
    states: dict[str, dict[str, int]]  # model -> state of its answers -> problems, of the states that occur
    problems: list[Problem]


def compare(answers: Answers, starts: Mapping[str, str] | None = None) -> Comparison | None:
    """The problems that the first model, the last one and its start answered, counted by kind, with a few of each.

    The choice looks at the kind alone: within one, the problems are spread evenly over all of them in order of their ids.
    None when fewer than two models answered the same problem.

    Args:
        answers: Models in the order in which they were made.
        starts: See `lineage`.
    """
    if len(answers) < 2:
        return None
    first, *_, last = answers
    start = lineage(list(answers), starts or {})[last] or first
    models = list(dict.fromkeys((first, start, last)))
    common = [question for question in answers[first] if all(question in answers[model] for model in models)]
    if not common:
        return None
    kinds, since_first = (_by_kind(common, answers[before], answers[last]) for before in (start, first))
    problems = []
    for kind, questions in kinds.items():
        shown = min(SHOWN[kind], len(questions))
        for place in range(shown):
            question = questions[place * len(questions) // shown]
            problems.append(_problem(question, kind, models, answers))
    seen = {model: Counter(state(answers[model][question]) for question in common) for model in models}
    occurring = [name for name in STATES if any(seen[model][name] for model in models)]
    return Comparison(
        first=first,
        start=start,
        last=last,
        total=len(common),
        counts={kind: len(questions) for kind, questions in kinds.items()},
        since_first={kind: len(questions) for kind, questions in since_first.items()},
        states={model: {name: counts[name] for name in occurring} for model, counts in seen.items()},
        problems=problems,
    )


def lineage(models: Sequence[str], starts: Mapping[str, str]) -> dict[str, str | None]:
    """Model -> the nearest of the others that it was made from; None for one that was given.

    Args:
        models: In the order in which they were made.
        starts: Stage -> the model it started from, those in between included; where it is empty, each model is taken to
            come from the one before it.

    Example:
        >>> lineage(["base", "rl"], {"rl": "cold-start", "cold-start": "base"})
        {'base': None, 'rl': 'base'}
    """
    if not starts:
        return dict(zip(models, [None, *models], strict=False))
    found: dict[str, str | None] = {}
    for model in models:
        passed, start = {model}, starts.get(model)
        while start is not None and start not in models and start not in passed:
            passed.add(start)
            start = starts.get(start)
        found[model] = start if start in models and start != model else None
    return found


def path_to(model: str, parents: Mapping[str, str | None]) -> list[str]:
    """The models that led to one, it included, the first made first."""
    path = [model]
    while (start := parents.get(path[0])) is not None and start not in path:
        path.insert(0, start)
    return path


def state(entry: Mapping[str, Any]) -> str:
    """What can be said of an answer: one of `STATES`; "wrong" where its entry does not say whether it could be read."""
    if _right(entry):
        return "right"
    if entry.get("parsed", True):
        return "wrong"
    if _reward(entry) is None:
        return "not judged"
    return "cut off" if entry.get("finish") == "length" else "not in the asked format"


def paired(answers: Answers, before: EvaluationSummary, after: EvaluationSummary) -> Interval | None:
    """The difference of two evaluations on the same questions, from the answers; None unless they are what the two
    numbers speak of.

    They are when one way of scoring an answer gives each side as many scores as its `n`, on the same questions, with
    its value as their mean.  Of a few questions alone there is no interval.
    """
    for score in SCORES:
        sides = [_scored(answers, evaluation, score) for evaluation in (before, after)]
        if sides[0] and sides[1] and set(sides[0]) == set(sides[1]):
            return paired_difference(sides[0], sides[1]).worth_saying()
    return None


def _scored(answers: Answers, evaluation: EvaluationSummary, score: Score) -> dict[str, float]:
    """Question -> score of one model; {} when they are not what the evaluation's value speaks of."""
    task, value = evaluation["task"], evaluation["value"]
    entries = answers.get(evaluation["model"], {})
    found = {question: score(entry) for question, entry in entries.items() if entry.get("task", task) == task}
    scores = {question: number for question, number in found.items() if number is not None}
    if value is None or len(scores) < 2 or len(scores) != evaluation["n"]:
        return {}
    mean = math.fsum(scores.values()) / len(scores)
    return scores if math.isclose(mean, value, abs_tol=1e-6) else {}


def _share_right(entry: Mapping[str, Any]) -> float | None:
    """Of several answers to the question, drawn beside the first, the share that is right."""
    drawn = entry.get("sampled_right")
    return math.fsum(drawn) / len(drawn) if isinstance(drawn, list) and drawn else None


def _any_right(entry: Mapping[str, Any]) -> float | None:
    """Is any of several answers right: pass@k for as many answers as were drawn."""
    drawn = entry.get("sampled_right")
    return float(any(drawn)) if isinstance(drawn, list) and drawn else None


def _problem(question: str, kind: str, models: list[str], answers: Answers) -> Problem:
    entries = [(model, answers[model][question]) for model in models]
    reference = entries[0][1].get("answer")
    shown = [Answer(model, str(entry["completion"]), _reward(entry), state(entry)) for model, entry in entries]
    prompt = str(entries[0][1].get("prompt", ""))
    return Problem(question, kind, prompt, None if reference is None else str(reference), shown)


def _reward(entry: Mapping[str, Any]) -> float | None:
    reward = entry.get("reward")
    return float(reward) if isinstance(reward, (int, float)) else None


def _right(entry: Mapping[str, Any]) -> bool:
    """Its own word for it, `right`, or a reward that reaches the pass mark."""
    reward = _reward(entry)
    return bool(entry["right"]) if "right" in entry else reward is not None and reward >= PASS_MARK


def _by_kind(
    questions: Sequence[str], before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {kind: [] for kind in SHOWN}
    for question in questions:
        kinds[_kind(_right(before[question]), _right(after[question]))].append(question)
    return kinds


def _kind(before: bool, after: bool) -> str:
    if before:
        return "right before and after" if after else "newly wrong"
    return "newly right" if after else "wrong before and after"


def _number_right(entry: Mapping[str, Any]) -> float | None:
    return None if _reward(entry) is None else float(_right(entry))


Score = Callable[[Mapping[str, Any]], "float | None"]

SCORES: tuple[Score, ...] = (_number_right, _reward, _share_right, _any_right)
"""Ways in which an evaluation may have made a number of a question's entry."""
