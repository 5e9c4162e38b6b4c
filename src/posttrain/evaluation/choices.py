"""What a judge's choices by a principle are worth, on pairs of which one answer is known to be better."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.constitution import Principle
from posttrain.constitution.choice import Case, choose
from posttrain.evaluation.accuracy import Outcome
from posttrain.evaluation.examiner import Examiner, entry, need_columns
from posttrain.judges.templates import template_named
from posttrain.report.statistics import Interval, proportion_interval
from posttrain.synthesis.maker import Workshop

__all__ = ["Choices"]


@dataclass(frozen=True, kw_only=True)
class Choices(Examiner):
    """The model chooses among the `responses` of rows that say which is `best`, by their `choice_question`, in every rotation.

    Numbers: `choice_accuracy` (the response with the most averaged probability is the best one) and `consistency` (the same
    choice in every order) with Wilson intervals, the mean probability of the best response, and of none of the letters.
    """

    template: str = "multiple-choice"
    """The question: a template with letters, by name or as `FILE.yaml:NAME`."""
    task: str = "forbidden-words"
    """How the pairs are called in the summary."""
    split: str = "test-choices"
    """How their split is called in the summary."""

    def examine(self, shop: Workshop, *, model_name: str) -> Outcome:
        """The numbers, and one record a pair."""
        need_columns(shop.rows, ("prompt", "responses", "best", "choice_question"), kind="choices")
        cases = []
        for row in shop.rows:
            principle = Principle(name="asked", critique="-", revision="-", choice=row["choice_question"])
            cases.append(Case(row["prompt"], tuple(row["responses"]), principle))
        choices = choose(shop.judge("start"), cases, template_named(self.template))
        read = [(row, choice) for row, choice in zip(shop.rows, choices, strict=True) if choice.p]
        n = len(read)
        right = sum(max(choice.p) == choice.p[row["best"]] > 1 / len(choice.p) for row, choice in read)
        same = sum(len({max(range(len(r)), key=r.__getitem__) for r in choice.rotations}) == 1 for _, choice in read)
        nan = float("nan")
        found = {
            "choice_accuracy": proportion_interval(right, n),
            "consistency": proportion_interval(same, n),
            "best_probability": Interval(sum(choice.p[row["best"]] for row, choice in read) / max(1, n), nan, nan, n),
            "neither": Interval(sum(choice.neither for _, choice in read) / max(1, n), nan, nan, n),
        }
        numbers = [entry(model_name, self.task, self.split, metric, n, interval) for metric, interval in found.items()]
        records = [
            {
                "kind": "choices",
                "model": model_name,
                "id": row.get("id"),
                "responses": row["responses"],
                "best": row["best"],
                "probabilities": list(choice.p),
                "rotations": [list(rotation) for rotation in choice.rotations],
                "error": choice.error,
            }
            for row, choice in zip(shop.rows, choices, strict=True)
        ]
        return Outcome(numbers, records)
