"""Group relative policy optimisation: the other answers to a prompt are the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.advantages import group_zscore_sample
from posttrain.formulas.divergences import difference, k3
from posttrain.formulas.ratios import token_ratio
from posttrain.formulas.reductions import sequence_mean
from posttrain.formulas.surrogates import clipped, was_clipped
from posttrain.method import Method
from posttrain.types import Batch, Readings, Reduction, State, Term, View

Advantage = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(rewards [B], group [B], live [B]) -> advantages [B]`."""


def rollout_views(*, reference: bool = False, read_entropy: bool = True) -> dict[str, View]:
    """The policy at every step, its log-probabilities before the first one, and the reference where it is asked for."""
    live = (reads.logprob, reads.watched_entropy) if read_entropy else (reads.logprob,)
    views = {"old": View(reads=(reads.logprob,), once=True, credit=False), "policy": View(reads=live)}
    return {**views, "reference": View("reference", (reads.logprob,), once=True)} if reference else views


def need_groups(batch: Batch) -> None:
    """Refuse a batch in which no prompt has two answers.

    Raises:
        ConfigError: Every group is of size 1, so that every advantage would be 0.
    """
    if batch.num_rows and int(torch.unique(batch.group, return_counts=True)[1].max()) < 2:
        raise ConfigError("every prompt has one answer, and a group method compares answers; set samples_per_prompt to 2 or more")


def with_group_advantages(batch: Batch, advantage: Advantage, rewards: Tensor | None = None) -> Batch:
    """The batch with one advantage a row, spread over its trained tokens.  Rows without one were not scored."""
    need_groups(batch)
    scores = batch.rewards if rewards is None else rewards
    rows = advantage(scores, batch.group, batch.mask.any(-1))  # [B]
    return batch.with_(advantages=torch.where(batch.mask, rows.unsqueeze(-1), 0).to(batch.advantages.dtype))


def check_clip(low: float, high: float) -> None:
    """Refuse negative clip widths.

    Raises:
        ConfigError: One of them is below 0.
    """
    if low < 0 or high < 0:
        raise ConfigError(f"clip_low is {low} and clip_high {high}; expected numbers >= 0 (the ratio is 1 -low +high)")


@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """No critic: an answer's advantage is its reward against the mean of its group, in standard deviations.

        c_t = -min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) + beta k3(pi || ref),   A = (r - mean_G) / (std_G + e)

    averaged over each answer's tokens, then over answers.  Rows are prompts with at least 2 answers each.  The paper
    gives neither e nor the divisor of the deviation: `advantage` is a function of `formulas.advantages` (default: G -
    1 and 1e-6). Left out: process rewards and iterated reward models.

    Source: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv:2402.03300,
    equation 3.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low.  The paper does not state it; 0.2 is what implementations use."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    beta: float = 0.04
    """Weight of the KL to the reference in the loss; at 0 no reference is read."""
    advantage: Advantage = group_zscore_sample
    """Rewards to advantages within a group."""
    reduce: Reduction = sequence_mean
    """How token costs are averaged: a function of `formulas.reductions`."""

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)

    def views(self) -> dict[str, View]:
        """Policy and old policy; the reference where beta is above 0."""
        return rollout_views(reference=self.beta > 0)

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Group advantages."""
        return with_group_advantages(batch, self.advantage)

    def terms(self, state: State) -> dict[str, Term]:
        """The surrogate, and the KL where it is on."""
        kl = {"kl": Term(self.reduce, weight=self.beta)} if self.beta > 0 else {}
        return {"loss": Term(self.reduce), **kl}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: surrogate and KL of each token."""
        ratio = token_ratio(seen.policy.logprob, seen.old.logprob, batch.mask)
        low, high = self.clip_low, self.clip_high
        values = {"loss": clipped(ratio, batch.advantages, low=low, high=high)}
        if self.beta > 0:
            values["kl"] = k3(difference(seen.policy.logprob, seen.reference.logprob, batch.mask))
        clip = was_clipped(ratio.detach(), batch.advantages, low=low, high=high)
        return {**values, "clip_fraction": clip, "entropy": seen.policy.entropy}
