"""The same problems before and after: which answers changed, and a fair choice of them to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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

COLUMNS = 4
"""Models side by side at most: the first and the latest ones."""


@dataclass(frozen=True)
class Answer:
    """What one model wrote."""

    model: str
    completion: str
    reward: float | None
    right: bool


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
    """How the last model differs from the first on the problems that both answered."""

    first: str
    last: str
    total: int
    counts: dict[str, int]  # kind -> problems; they add up to `total`
    problems: list[Problem]


def compare(answers: Answers) -> Comparison | None:
    """The problems that every model answered, counted by kind, with a few of each in order of their ids.

    The choice looks at the kind alone: within one, the problems are spread evenly over all of them.  None when fewer
    than two models answered the same problem.
    """
    models = list(answers)
    if len(models) > COLUMNS:
        models = [models[0], *models[1 - COLUMNS :]]
    if len(models) < 2:
        return None
    common = [question for question in answers[models[0]] if all(question in answers[model] for model in models)]
    kinds: dict[str, list[str]] = {kind: [] for kind in SHOWN}
    for question in common:
        kinds[_kind(_right(answers[models[0]][question]), _right(answers[models[-1]][question]))].append(question)
    if not common:
        return None
    problems = []
    for kind, questions in kinds.items():
        shown = min(SHOWN[kind], len(questions))
        for place in range(shown):
            question = questions[place * len(questions) // shown]
            problems.append(_problem(question, kind, models, answers))
    counts = {kind: len(questions) for kind, questions in kinds.items()}
    return Comparison(models[0], models[-1], len(common), counts, problems)


def paired(answers: Answers, before: EvaluationSummary, after: EvaluationSummary) -> Interval | None:
    """The difference of two evaluations on the same questions, from the answers; None unless they are what the two
    numbers speak of.

    They are when one way of scoring an answer gives each side as many scores as its `n`, on the same questions, with
    its value as their mean.
    """
    for score in SCORES:
        sides = [_scored(answers, evaluation, score) for evaluation in (before, after)]
        if sides[0] and sides[1] and set(sides[0]) == set(sides[1]):
            return paired_difference(sides[0], sides[1])
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
    shown = [Answer(model, str(entry["completion"]), _reward(entry), _right(entry)) for model, entry in entries]
    prompt = str(entries[0][1].get("prompt", ""))
    return Problem(question, kind, prompt, None if reference is None else str(reference), shown)


def _reward(entry: Mapping[str, Any]) -> float | None:
    reward = entry.get("reward")
    return float(reward) if isinstance(reward, (int, float)) else None


def _right(entry: Mapping[str, Any]) -> bool:
    """Its own word for it, `right`, or a reward that reaches the pass mark."""
    reward = _reward(entry)
    return bool(entry["right"]) if "right" in entry else reward is not None and reward >= PASS_MARK


def _kind(before: bool, after: bool) -> str:
    if before:
        return "right before and after" if after else "newly wrong"
    return "newly right" if after else "wrong before and after"


def _number_right(entry: Mapping[str, Any]) -> float | None:
    return None if _reward(entry) is None else float(_right(entry))


Score = Callable[[Mapping[str, Any]], "float | None"]

SCORES: tuple[Score, ...] = (_number_right, _reward, _share_right, _any_right)
"""Ways in which an evaluation may have made a number of a question's entry."""
