"""Rankings of the start's answers by a scripted annotator: the task's verifier with a taste for short answers, and a noisy hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from posttrain.errors import ConfigError
from posttrain.random import uniform
from posttrain.synthesis.maker import Made, Maker, Workshop, grouped
from posttrain.types import Sample

ANNOTATOR = 41
"""Stream of random numbers that the annotator's mistakes are drawn from."""


@dataclass(frozen=True, kw_only=True)
class Rankings(Maker):
    """K answers to each prompt, ordered by a stand-in for a person: better score first, then the shorter.

    Of answers between which the annotator sees no difference the first is kept, so a ranking may hold fewer than K, and a
    prompt whose answers are all alike is left out.  What a labeller does in InstructGPT, with an annotator whose mistakes are
    counted: with chance `noise` a neighbouring pair of the order is swapped, for each neighbouring pair in turn.  For K = 2
    that is the chance that a comparison is wrong.

    Source: Ouyang et al., "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.4.
    """

    noise: float = 0.1
    """Chance that two neighbours of the order are swapped, in [0, 0.5]."""
    shorter: bool = True
    """Of two answers with the same score, is the shorter one better?  Else they are alike."""
    notices: int = 1
    """Lengths in the same stretch of so many tokens look alike to the annotator."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 0.5:
            raise ConfigError(f"noise is {self.noise}; expected a chance in [0, 0.5]")
        if self.notices < 1:
            raise ConfigError(f"notices is {self.notices}; expected at least 1 token")

    def needs(self) -> tuple[str, ...]:
        """Somebody must say which answer is better."""
        return ("rewards",)

    def make(self, shop: Workshop) -> Made:
        """Answer, score, order, and err as often as the annotator does."""
        shop.need_several("rankings order")
        groups = grouped(sample for sample in shop.scored(shop.answers(shop.rows)) if sample.reward is not None)
        rows, swapped, compared, flat = [], 0, 0, 0
        for number, answers in enumerate(groups):
            answers = list({self._place(sample): sample for sample in reversed(answers)}.values())[::-1]
            if len(answers) < 2:
                continue
            places = [self._place(sample) for sample in answers]
            order, swaps = self.noisy(sorted(range(len(answers)), key=places.__getitem__), seed=shop.seed, number=number)
            swapped, compared = swapped + swaps, compared + len(order) - 1
            flat += len({sample.reward for sample in answers}) == 1
            rows.append(shop.ranking(answers, order, scores=[sample.reward for sample in answers]))
        share = {"swapped": swapped / max(1, compared), "one_score": flat / max(1, len(rows))}
        return Made(rows, {"prompts": float(len(groups)), "rankings": float(len(rows)), **share})

    def _place(self, sample: Sample) -> tuple[float, int]:
        """What answers are ordered by, least first; equal ones look alike to the annotator."""
        return (-(sample.reward or 0.0), len(sample.completion) // self.notices if self.shorter else 0)

    def noisy(self, order: Sequence[int], *, seed: int, number: int) -> tuple[list[int], int]:
        """The order as the annotator gives it, and how many neighbours are swapped in it."""
        drawn = uniform(seed, 0, torch.full((len(order),), number), torch.arange(len(order)), stream=ANNOTATOR).tolist()
        given, swaps = list(order), 0
        for place in range(len(given) - 1):
            if drawn[place] < self.noise:
                given[place], given[place + 1] = given[place + 1], given[place]
                swaps += 1
        return given, swaps
