"""REINFORCE++: PPO's tricks without its critic, normalised over the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.advantages import group_mean_centred, rewards_less_kl, whiten
from posttrain.formulas.divergences import difference, k2
from posttrain.formulas.ratios import token_ratio
from posttrain.formulas.reductions import sequence_mean
from posttrain.formulas.sequences import reverse_discounted_sum
from posttrain.formulas.surrogates import clipped, was_clipped
from posttrain.method import Method
from posttrain.methods.policy.grpo import check_clip, rollout_views, with_group_advantages
from posttrain.types import Batch, Readings, State, Term, View


def discounted_returns(score: Tensor, kl: Tensor, mask: Tensor, *, beta: float, gamma: float) -> Tensor:
    """What is still to come from each trained token on: the row's score at its end, less beta times the KL.

    `[B, T]`.
    """
    rewards = rewards_less_kl(score, kl, mask, beta=beta)
    return torch.where(mask, reverse_discounted_sum(rewards, mask, gamma), 0)


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Method):
    """Every token's return is whitened over all tokens of the batch, then clipped as in PPO.

        A_t = (G_t - mean) / std,   G_t = sum_{u >= t} gamma^(u - t) R_u,   R_t = -beta k1_t, plus r at the end

    averaged over each answer's tokens, then over answers.  Rows are prompts; one answer each is enough.

    Source: "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models", arXiv:2501.03262,
    equation 1 (defaults from a secondary write-up).
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    beta: float = 0.001
    """Weight of the KL to the reference in the reward; at 0 no reference is read."""
    gamma: float = 1.0
    """Discount of later rewards, in [0, 1]."""

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)
        if self.beta < 0 or not 0 <= self.gamma <= 1:
            raise ConfigError(f"beta is {self.beta} and gamma {self.gamma}; expected beta >= 0 and gamma in [0, 1]")

    def views(self) -> dict[str, View]:
        """Policy and old policy; the reference where beta is above 0, and then credit looks at the old policy too."""
        views = rollout_views(reference=self.beta > 0)
        return {**views, "old": View(reads=views["old"].reads, once=True)} if self.beta > 0 else views

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Returns of every token, and the same whitened over the batch."""
        kl = torch.zeros_like(batch.logprobs)
        if self.beta > 0:
            kl = difference(seen.old.logprob, seen.reference.logprob, batch.mask)
        returns = discounted_returns(batch.rewards, kl, batch.mask, beta=self.beta, gamma=self.gamma)
        return batch.with_(returns=returns, advantages=whiten(returns, batch.mask)).with_columns(kl=kl)

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over answers of token means."""
        return {"loss": Term(sequence_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the surrogate of each token."""
        ratio = token_ratio(seen.policy.logprob, seen.old.logprob, batch.mask)
        low, high = self.clip_low, self.clip_high
        clip = was_clipped(ratio.detach(), batch.advantages, low=low, high=high)
        loss = clipped(ratio, batch.advantages, low=low, high=high)
        return {"loss": loss, "kl_per_answer": batch.columns["kl"], "clip_fraction": clip, "entropy": seen.policy.entropy}


@dataclass(frozen=True, kw_only=True)
class ReinforcePPBaseline(Method):
    """REINFORCE++ with the group's mean as a baseline: centred in the group, whitened over the batch, KL (k2) in the loss.

        A = whiten(r - mean_G)

    Rows are prompts with at least 2 answers each.

    Source: "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models", arXiv:2501.03262, the
    baseline variant, as coded in OpenRLHF (defaults from a secondary write-up).
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    beta: float = 0.001
    """Weight of the KL to the reference in the loss; at 0 no reference is read."""

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)

    def views(self) -> dict[str, View]:
        """Policy and old policy; the reference where beta is above 0."""
        return rollout_views(reference=self.beta > 0)

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Centred in the group, whitened over the batch's tokens; a batch of equal rewards stays at 0."""
        centred = with_group_advantages(batch, group_mean_centred)
        return centred.with_(advantages=whiten(centred.advantages, batch.mask))

    def terms(self, state: State) -> dict[str, Term]:
        """The surrogate, and the KL where it is on."""
        kl = {"kl": Term(sequence_mean, weight=self.beta)} if self.beta > 0 else {}
        return {"loss": Term(sequence_mean), **kl}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: surrogate and KL of each token."""
        ratio = token_ratio(seen.policy.logprob, seen.old.logprob, batch.mask)
        low, high = self.clip_low, self.clip_high
        values = {"loss": clipped(ratio, batch.advantages, low=low, high=high)}
        if self.beta > 0:
            values["kl"] = k2(difference(seen.policy.logprob, seen.reference.logprob, batch.mask))
        clip = was_clipped(ratio.detach(), batch.advantages, low=low, high=high)
        return {**values, "clip_fraction": clip, "entropy": seen.policy.entropy}
