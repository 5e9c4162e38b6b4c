"""How well a process reward model knows right steps from wrong ones, on labelled answers that it was not trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import DataError
from posttrain.evaluation.accuracy import Outcome
from posttrain.evaluation.examiner import Examiner, curve, entry
from posttrain.evaluation.reward_pairs import ranks
from posttrain.records import sample_from_json
from posttrain.report.statistics import Interval, proportion_interval
from posttrain.rewards.model import step_scores
from posttrain.synthesis.maker import Workshop

__all__ = ["StepLabelled", "auc", "first_wrong"]


@dataclass(frozen=True, kw_only=True)
class StepLabelled(Examiner):
    """Reads a process reward model at the steps of rows that `step_labels` made.

    Numbers: `auc` over all steps, the same up to the first wrong step of each answer (`auc_to_first_wrong`, what the model is
    trained on), `step_accuracy` at 0.5, and `first_error_found`, the share of answers whose first wrong step, or its absence,
    is found.  The AUC's interval resamples answers.

    Source: "Let's Verify Step by Step", arXiv:2305.20050; first errors as in ProcessBench, arXiv:2412.06559.
    """

    resamples: int = 500
    """Draws of the answers for the interval of the AUC."""

    def examine(self, shop: Workshop, *, model_name: str) -> Outcome:
        """The numbers, and one record an answer."""
        samples, ends, labels = [], [], []
        for number, row in enumerate(shop.rows):
            marks = row.get("columns", {}).get("step_label")
            if "sample" not in row or marks is None:
                raise DataError(f"row {number} has no steps with labels; expected rows of a step_labels stage")
            places = [place for place, mark in enumerate(marks) if mark is not None]
            samples.append(sample_from_json(row["sample"]))
            ends.append(places)
            labels.append([float(marks[place] > 0.5) for place in places])
        scores = step_scores(shop.model("start").model, samples, ends)
        seen = [_to_first_wrong(label) for label in labels]
        cut = [score[: len(label)] for score, label in zip(scores, seen, strict=True)]
        flat = [
            (s > 0.5) == (y > 0.5) for score, label in zip(scores, labels, strict=True) for s, y in zip(score, label, strict=True)
        ]
        found = [
            first_wrong([float(s > 0.5) for s in score]) == first_wrong(label) for score, label in zip(scores, labels, strict=True)
        ]
        values = {
            "auc": (len(flat), self._auc(scores, labels)),
            "auc_to_first_wrong": (sum(map(len, seen)), self._auc(cut, seen)),
            "step_accuracy": (len(flat), proportion_interval(sum(flat), len(flat))),
            "first_error_found": (len(found), proportion_interval(sum(found), len(found))),
        }
        numbers = [entry(model_name, "step labels", "held out", name, count, value) for name, (count, value) in values.items()]
        drawn = curve(
            f"Steps by {model_name}",
            x="share of right steps that are called wrong",
            y="share of wrong steps found",
            lines={model_name: _roc(scores, labels), "calibrated": [[0, 0], [1, 1]]},
            caption="the area under the line is the AUC; the diagonal is guessing",
        )
        return Outcome(
            numbers,
            [_record(model_name, sample.query, *pair) for sample, *pair in zip(samples, scores, labels, strict=True)],
            [drawn],
        )

    def _auc(self, scores: Sequence[Sequence[float]], labels: Sequence[Sequence[float]]) -> Interval:
        """With an interval from resampling answers, whose steps hang together."""
        draw = random.Random(0)
        pairs = list(zip(scores, labels, strict=True))
        value = auc([s for score in scores for s in score], [y for label in labels for y in label])
        drawn = []
        for _ in range(self.resamples):
            some = draw.choices(pairs, k=len(pairs))
            drawn.append(auc([s for score, _ in some for s in score], [y for _, label in some for y in label]))
        drawn.sort()
        low, high = (drawn[int(len(drawn) * share)] for share in (0.025, 0.975)) if drawn else (float("nan"),) * 2
        return Interval(value, low, high, len(pairs))


def auc(scores: Sequence[float], labels: Sequence[float]) -> float:
    """The chance that a right step scores above a wrong one, ties counting half; NaN where one kind is missing.

    >>> auc([0.9, 0.8, 0.4, 0.1], [1, 0, 1, 0])
    0.75
    """
    right = sum(label > 0.5 for label in labels)
    wrong = len(labels) - right
    if not right or not wrong:
        return float("nan")
    total = sum(rank for rank, label in zip(ranks(scores), labels, strict=True) if label > 0.5)
    return (total - right * (right + 1) / 2) / (right * wrong)


def first_wrong(labels: Sequence[float]) -> int:
    """The place of the first label that is not above one half; -1 where all are."""
    return next((place for place, label in enumerate(labels) if label <= 0.5), -1)


def _to_first_wrong(labels: Sequence[float]) -> Sequence[float]:
    place = first_wrong(labels)
    return labels if place < 0 else labels[: place + 1]


def _roc(scores: Sequence[Sequence[float]], labels: Sequence[Sequence[float]]) -> list[list[float]]:
    """Points of wrong steps found against false alarms, least score first."""
    flat = sorted((s, y) for score, label in zip(scores, labels, strict=True) for s, y in zip(score, label, strict=True))
    right = sum(y > 0.5 for _, y in flat) or 1
    wrong = len(flat) - sum(y > 0.5 for _, y in flat) or 1
    points, alarms, hits = [[0.0, 0.0]], 0, 0
    for place, (_, y) in enumerate(flat):
        alarms, hits = alarms + (y > 0.5), hits + (y <= 0.5)
        if place % max(1, len(flat) // 50) == 0 or place == len(flat) - 1:
            points.append([alarms / right, hits / wrong])
    return points


def _record(model: str, query: str, scores: Sequence[float], labels: Sequence[float]) -> dict[str, Any]:
    return {"kind": "steps", "model": model, "id": query, "scores": list(scores), "labels": list(labels)}
