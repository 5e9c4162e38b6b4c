"""What each reward makes of a model's greedy answers, one number a reward: format, consistency, length, beside accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from posttrain.errors import ConfigError
from posttrain.evaluation.accuracy import Outcome
from posttrain.evaluation.examiner import Examiner, entry
from posttrain.report.statistics import Interval, mean_interval, share_interval
from posttrain.synthesis.maker import Workshop

__all__ = ["RewardMeans"]


@dataclass(frozen=True, kw_only=True)
class RewardMeans(Examiner):
    """The mean of every reward over greedy answers to the rows' prompts, before weights and gates.

    Numbers: one a reward, by its name, then `tokens` (of an answer, the one that ends it included) and `truncated`.  Intervals are
    over prompts.  An answer that a reward has nothing to say of, or fails on, is left out of that reward's mean.
    """

    task: str = ""
    """What the rows are called in the summary; by default 'rewards'."""
    split: str = "test"
    """What part of the task they are, for the summary."""

    def examine(self, shop: Workshop, *, model_name: str) -> Outcome:
        """Answer, judge, average."""
        if not shop.rewards:
            raise ConfigError("evaluate reward_means: found no rewards; name some, for instance [right, format]")
        answers = shop.answers(shop.rows, samples=1, sampling=replace(shop.sampling, greedy=True))
        scored = shop.scored(answers)
        columns = {
            reward.name: [s.info["rewards"][reward.name] for s in scored if reward.name in s.info["rewards"]]
            for reward in shop.rewards
        }
        columns["tokens"] = [float(len(sample.completion)) for sample in scored]
        columns["truncated"] = [float(sample.finish == "length") for sample in scored]
        numbers = [
            entry(model_name, self.task or "rewards", self.split, name, len(values), _interval(values))
            for name, values in columns.items()
        ]
        records = [
            {
                "kind": "judged",
                "model": model_name,
                "question": sample.query,
                "answer": shop.text(sample),
                "rewards": sample.info["rewards"],
                "finish": sample.finish,
            }
            for sample in scored
        ]
        return Outcome(numbers, records)


def _interval(values: Sequence[float]) -> Interval:
    """Of shares inside [0, 1], of other numbers as it is."""
    shares = all(0 <= value <= 1 for value in values if math.isfinite(value))
    return share_interval(values) if shares else mean_interval(values)
