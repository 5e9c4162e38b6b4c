"""What scorers make of several answers: best-of-n, majority and weighted vote, beside the chance that one of n is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.errors import ConfigError
from posttrain.evaluation.accuracy import Outcome
from posttrain.evaluation.examiner import Examiner, curve, entry
from posttrain.formulas import steps as formulas
from posttrain.formulas.steps import best_of_n, majority, weighted_vote
from posttrain.report.statistics import Interval, pass_at_k, share_interval
from posttrain.rewards.model import reward_scores, step_scores
from posttrain.rewards.parse import answer_in
from posttrain.synthesis.maker import Workshop
from posttrain.synthesis.step_labels import SPLITTERS, ends_of_steps
from posttrain.types import Sample

__all__ = ["BestOf"]

AGGREGATES = {"product": formulas.product, "min": formulas.minimum, "mean": formulas.mean, "last": formulas.last}
"""How the scores of an answer's steps become one."""


@dataclass(frozen=True)
class Question:
    """The answers to one question: are they right, what they say, and every scorer's scores."""

    name: str
    right: list[bool]
    said: list[str]
    scores: Mapping[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class BestOf(Examiner):
    """The model writes `samples` answers to each question; scorers choose among n of them.

    `best@n` is unbiased over all choices of n answers; votes go over as many blocks of n as there are.  The accuracy of
    one answer, the majority and the chance that any is right stand beside it.  Intervals are over questions.

    Source: "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168, section 4.2; "Let's Verify Step by Step",
    arXiv:2305.20050, section 3.
    """

    process: tuple[str, ...] = ()
    """Models of the evaluation that score steps; each gives one scorer for each way to make one number of them. The other
    models score whole answers at their last token."""
    split: str = "sentences"
    """Where steps end: 'sentences' of a worked word problem, or 'lines'."""
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """The n of the curves; those above the number of samples are left out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "process", tuple(self.process))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if self.split not in SPLITTERS:
            raise ConfigError(f"split is '{self.split}'; expected one of {', '.join(SPLITTERS)}")

    def examine(self, shop: Workshop, *, model_name: str) -> Outcome:
        """The numbers at the largest n, and the curves over n."""
        if not shop.rewards:
            raise ConfigError("best_of needs to know which answers are right; name rewards, or a task")
        answers = shop.scored(shop.answers(shop.rows))
        scores = self._scores(shop, answers)
        questions = _questions(shop, answers, scores)
        sizes = [n for n in self.sizes if n <= shop.samples]
        lines: dict[str, list[list[float]]] = {}
        top: dict[str, Interval] = {}
        for n in sizes:
            for name, values in _choices(questions, n, list(scores)).items():
                found = share_interval(values)
                lines.setdefault(name, []).append([n, found.value, found.low, found.high])
                top[name] = found
        n = sizes[-1]
        numbers = []
        for name, found in sorted(top.items(), key=lambda item: -item[1].value):
            metric = {"majority": f"maj@{n}", "any": f"pass@{n}"}.get(name, f"{name}@{n}")
            numbers.append(entry(model_name, "best of n", "test", metric, len(questions), found))
        first = share_interval([sum(q.right) / len(q.right) for q in questions])
        numbers.insert(0, entry(model_name, "best of n", "test", "mean@1", len(questions), first))
        shown = {name: [point[:2] for point in line] for name, line in lines.items() if name in _shown(lines)}
        drawn = curve("Best of n", x="answers, n", y="share right", lines=shown, caption="how much a scorer makes of n answers")
        return Outcome(numbers, [_record(question, model_name) for question in questions], [drawn])

    def _scores(self, shop: Workshop, answers: Sequence[Sample]) -> dict[str, list[float]]:
        """Every scorer's score of every answer."""
        found: dict[str, list[float]] = {}
        for name in shop.sources:
            if name == "start":
                continue
            model = shop.model(name).model
            if name not in self.process:
                found[name] = reward_scores(model, answers)
                continue
            ends = [ends_of_steps(sample, shop.model("start").renderer, SPLITTERS[self.split]) for sample in answers]
            steps = step_scores(model, answers, ends)
            for label, aggregate in AGGREGATES.items():
                one = [float(aggregate(torch.tensor(each, dtype=torch.float64))) if each else 0.0 for each in steps]
                found[f"{name} {label}"] = one
        return found


def _questions(shop: Workshop, answers: Sequence[Sample], scores: Mapping[str, Sequence[float]]) -> list[Question]:
    groups: dict[str, list[int]] = {}
    for place, sample in enumerate(answers):
        groups.setdefault(sample.group, []).append(place)
    found = []
    for places in groups.values():
        said = [answer_in(shop.text(answers[i])) or "" for i in places]
        right = [(answers[i].reward or 0.0) >= 1 - 1e-9 for i in places]
        mine = {name: [column[i] for i in places] for name, column in scores.items()}
        found.append(Question(answers[places[0]].query, right, said, mine))
    return found


def _choices(questions: Sequence[Question], n: int, scorers: Sequence[str]) -> dict[str, list[float]]:
    """For each way of choosing among n answers the share of right choices, one value a question."""
    found: dict[str, list[float]] = {}
    for question in questions:
        count = len(question.right)
        found.setdefault("any", []).append(pass_at_k(count, sum(question.right), n))
        found.setdefault("majority", []).append(_voted(question, n, None))
        for name in scorers:
            found.setdefault(f"best {name}", []).append(best_of_n(question.scores[name], question.right, n))
            found.setdefault(f"vote {name}", []).append(_voted(question, n, name))
    return found


def _voted(question: Question, n: int, scorer: str | None) -> float:
    """The share of blocks of n answers in which the vote is right; an answer that cannot be read has no vote."""
    right = {said: ok for said, ok in zip(question.said, question.right, strict=True) if said}
    blocks = range(0, len(question.said) - n + 1, n)
    won = 0.0
    for first in blocks:
        cut = slice(first, first + n)
        said = question.said[cut]
        weights = _positive(question.scores[scorer][cut]) if scorer else None
        live = [i for i, text in enumerate(said) if text]
        if live:
            voters = [said[i] for i in live]
            chosen = weighted_vote(voters, [weights[i] for i in live]) if weights else majority(voters)
            won += right[chosen]
    return won / len(blocks)


def _positive(scores: Sequence[float]) -> list[float]:
    """Scores as weights of a vote: probabilities as they are, other scores through a sigmoid."""
    if all(0 <= score <= 1 for score in scores):
        return list(scores)
    return torch.tensor(scores, dtype=torch.float64).sigmoid().tolist()


def _shown(lines: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    """The lines worth drawing: any, majority, and the three best scorers' choices."""
    best = sorted((name for name in lines if name.startswith("best ")), key=lambda name: -lines[name][-1][1])
    return ["any", "majority", *best[:3]]


def _record(question: Question, model_name: str) -> dict[str, Any]:
    named = {"kind": "best_of", "model": model_name, "id": question.name, "right": question.right, "said": question.said}
    return {**named, "scores": dict(question.scores)}
