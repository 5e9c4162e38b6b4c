"""Reward modelling from rankings of K answers to one prompt, best first; K may differ between prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain import reads
from posttrain.formulas.preferences import all_pairs, best_of, plackett_luce, ranked
from posttrain.formulas.reductions import ranking_mean
from posttrain.method import Method
from posttrain.types import Batch, Readings, State, Term, View


def lines(batch: Batch, seen: Readings) -> tuple[Tensor, Tensor]:
    """Rewards of each prompt's answers, best first, `[G, K]`, and which entries are real."""
    return ranked(seen.policy.reward, batch.group, batch.mask.any(-1))


def report(rewards: Tensor, there: Tensor) -> dict[str, Tensor]:
    """`[G]` each: the share of pairs in the right order and whether the best is first (ties are wrong), reward, and its width."""
    rewards = rewards.detach()
    better, worse = torch.triu_indices(rewards.shape[-1], rewards.shape[-1], offset=1, device=rewards.device)
    real = there[..., better] & there[..., worse]  # [G, K (K - 1) / 2]
    right = real & (rewards[..., better] > rewards[..., worse])
    number = there.sum(-1).clamp(min=1).to(rewards.dtype)
    beaten = (rewards[..., :1] > rewards[..., 1:]) | ~there[..., 1:]
    highest = torch.where(there, rewards, -torch.inf).amax(-1)
    lowest = torch.where(there, rewards, torch.inf).amin(-1)
    return {
        "accuracy": right.sum(-1).to(rewards.dtype) / real.sum(-1).clamp(min=1).to(rewards.dtype),
        "best_first": beaten.all(-1).to(rewards.dtype),
        "reward": torch.where(there, rewards, 0).sum(-1) / number,
        "width": torch.where(there.any(-1), highest - lowest, 0),
    }


@dataclass(frozen=True, kw_only=True)
class AllPairs(Method):
    """Of every two answers in a ranking the better scores higher; all pairs of a prompt are one element of the batch.

        L = 1 / C(K, 2) sum_{i < j in the order of the ranking} -log sigmoid(r_i - r_j),   one value a prompt

    Rows are rankings of K >= 2 answers (`prompt`, `responses`, `ranking` best first).  Each answer is read once, and a prompt
    weighs the same whatever its K.  The reward is that of the reward head at the last token.

    Source: "Training language models to follow instructions with human feedback", arXiv:2203.02155, equation 1.
    """

    rows: ClassVar[Literal["rankings"]] = "rankings"
    unit: ClassVar[Literal["group"]] = "group"
    imitates: ClassVar[bool] = False

    def views(self) -> dict[str, View]:
        """The reward head of the model that learns."""
        return {"policy": View(reads=(reads.reward,))}

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over prompts."""
        return {"loss": Term(ranking_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[G]`: the cost of each ranking."""
        rewards, there = lines(batch, seen)
        return {"loss": all_pairs(rewards, there), **report(rewards, there)}


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(Method):
    """The order of a ranking is the likeliest: the best is drawn first, then the best of the rest, and so on.

        L = -log P(ranking) = sum_k [log sum_{j >= k} exp(r_j) - r_k],   one value a prompt

    Rows are rankings of K >= 2 answers (`prompt`, `responses`, `ranking` best first).  Each answer is read once; the sum grows
    with K, so longer rankings weigh more.  For K = 2 it is `bradley_terry`.

    Source: "Principled Reinforcement Learning with Human Feedback from Pairwise or K-wise Comparisons", arXiv:2301.11270,
    section 4.
    """

    rows: ClassVar[Literal["rankings"]] = "rankings"
    unit: ClassVar[Literal["group"]] = "group"
    imitates: ClassVar[bool] = False

    def views(self) -> dict[str, View]:
        """The reward head of the model that learns."""
        return {"policy": View(reads=(reads.reward,))}

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over prompts."""
        return {"loss": Term(ranking_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[G]`: minus the log-probability of each ranking."""
        rewards, there = lines(batch, seen)
        return {"loss": plackett_luce(rewards, there), **report(rewards, there)}


@dataclass(frozen=True, kw_only=True)
class BestOfK(Method):
    """The best of K answers is told from the others, whose order among themselves does not matter.

        L = log sum_j exp(r_j) - r_best,   one value a prompt

    Rows are rankings of K >= 2 answers (`prompt`, `responses`, `ranking` best first); only the first of the ranking is looked
    at.  It is the first term of `plackett_luce`.

    Source: "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, equation 1.
    """

    rows: ClassVar[Literal["rankings"]] = "rankings"
    unit: ClassVar[Literal["group"]] = "group"
    imitates: ClassVar[bool] = False

    def views(self) -> dict[str, View]:
        """The reward head of the model that learns."""
        return {"policy": View(reads=(reads.reward,))}

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over prompts."""
        return {"loss": Term(ranking_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[G]`: the cost of choosing the best."""
        rewards, there = lines(batch, seen)
        return {"loss": best_of(rewards, there), **report(rewards, there)}
