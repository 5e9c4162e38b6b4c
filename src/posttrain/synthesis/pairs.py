"""Preference pairs of the start's own answers: the best scored of each prompt against a worse one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.formulas.preferences import best_and_worst
from posttrain.random import single
from posttrain.synthesis.maker import Made, Maker, Workshop, grouped
from posttrain.types import Sample

PAIRING = 42
"""Stream of random numbers that a random rejected answer is drawn from."""


@dataclass(frozen=True, kw_only=True)
class Pairs(Maker):
    """K answers to each prompt, scored; the best one is chosen, a worse one rejected.  With `repeat`, iterative DPO.

    A row has the texts to read, and `chosen_sample` and `rejected_sample` with the very tokens that were written, which is what
    methods on pairs train on.  Of equal scores the first counts; a prompt whose answers score within 1e-8 makes no pair.

    Source: the pair rule of CheXalign, arXiv:2410.07025; a random lower answer as rejected as in Tulu 3, arXiv:2411.15124.
    """

    rejected: Literal["worst", "random"] = "worst"
    """The rejected answer: the worst, or one drawn among all that score lower than the best."""
    truncated: bool = True
    """Are answers that were cut at the limit used?  Without a verifier they look rejected for their cut alone."""

    def needs(self) -> tuple[str, ...]:
        """Somebody must say which answer is better."""
        return ("rewards",)

    def make(self, shop: Workshop) -> Made:
        """Answer, score, pair."""
        shop.need_several("pairs compare")
        groups = grouped(shop.scored(shop.answers(shop.rows, step=shop.draw)))
        rows: list[dict[str, Any]] = []
        gaps, longer = 0.0, 0
        for number, group in enumerate(groups):
            answers = [one for one in group if one.reward is not None and (self.truncated or one.finish != "length")]
            found = self.pair(answers, seed=shop.seed, number=number)
            if found is None:
                continue
            chosen, rejected = found
            gaps += (chosen.reward or 0.0) - (rejected.reward or 0.0)
            longer += len(chosen.completion) > len(rejected.completion)
            rows.append(shop.pair(chosen, rejected, scores=[chosen.reward, rejected.reward]))
        number = max(1, len(rows))
        shares = {"kept": len(rows) / max(1, len(groups)), "gap": gaps / number, "chosen_longer": longer / number}
        return Made(rows, {"prompts": float(len(groups)), "pairs": float(len(rows)), **shares})

    def pair(self, answers: Sequence[Sample], *, seed: int, number: int) -> tuple[Sample, Sample] | None:
        """Chosen and rejected of the scored answers to one prompt (the `number`-th), or None."""
        scores = [sample.reward or 0.0 for sample in answers]
        found = best_and_worst(scores)
        if found is None:
            return None
        best, worst = found
        if self.rejected == "random":
            lower = [i for i, score in enumerate(scores) if score < scores[best] - 1e-8]
            worst = lower[int(single(seed, number, stream=PAIRING) * len(lower))]
        if answers[best].completion == answers[worst].completion:  # a judge of two minds
            return None
        return answers[best], answers[worst]
