"""DAPO: GRPO with room to explore, groups that teach, and every token alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.advantages import group_mean_centred, group_zscore_sample, soft_overlong
from posttrain.formulas.ratios import token_ratio
from posttrain.formulas.reductions import token_mean
from posttrain.formulas.surrogates import clipped, was_clipped
from posttrain.method import Method
from posttrain.methods.policy.grpo import Advantage, check_clip, rollout_views, with_group_advantages
from posttrain.types import Batch, Origin, Readings, State, Term, View


def instructive(rewards: Tensor, group: Tensor, live: Tensor) -> Tensor:
    """`[B]` bool: rows of groups whose rewards differ, the only ones with signal."""
    centred = group_mean_centred(rewards, group, live)
    members = group.unsqueeze(0) == group.unsqueeze(1)  # [B, B]
    return (members & (centred != 0).unsqueeze(0)).any(-1)


@dataclass(frozen=True, kw_only=True)
class DAPO(Method):
    """Clip-higher, dynamic sampling, token-level loss and soft overlong punishment, without a KL term.

        c_t = -min(rho_t A, clip(rho_t, 1 - low, 1 + high) A), averaged over all tokens,   A = (r' - mean_G) / (std_G
        + e)

    r' is the reward plus a penalty in [-1, 0] over the last `cache` tokens before `max_tokens`.  Groups whose rewards
    (before the penalty) are all equal are left out of the batch and its denominator.  Rows are prompts with at least
    2 answers each. Left out: sampling again until the batch is full; ask for more prompts a step instead.

    Source: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476, equations 8, 11 and 13.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above at 1 + clip_high; wider than below, so that unlikely tokens may rise."""
    max_tokens: int = 20480
    """The longest answer; the penalty is -1 beyond it."""
    cache: int = 4096
    """Width of the penalty's ramp before `max_tokens`, in tokens; 0 turns the penalty off."""
    drop_truncated: bool = False
    """Leave answers that were cut at the limit out of the loss (overlong filtering); they still count in their group."""
    advantage: Advantage = group_zscore_sample
    """Rewards to advantages within a group."""

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)
        if not 0 <= self.cache <= self.max_tokens:
            raise ConfigError(f"cache is {self.cache} and max_tokens {self.max_tokens}; expected 0 <= cache <= max_tokens")

    def views(self) -> dict[str, View]:
        """Policy and old policy; no reference."""
        return rollout_views()

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Penalised rewards, group advantages, and a mask without groups that teach nothing."""
        rewards = batch.rewards
        if self.cache:
            length = (batch.origin == int(Origin.POLICY)).sum(-1)  # [B]
            rewards = rewards + soft_overlong(length, max_tokens=self.max_tokens, cache=self.cache).to(rewards.dtype)
        credited = with_group_advantages(batch, self.advantage, rewards)
        keep = instructive(batch.rewards, batch.group, batch.mask.any(-1))
        if self.drop_truncated:
            keep = keep & ~batch.truncated
        mask = batch.mask & keep.unsqueeze(-1)
        return credited.with_(mask=mask, advantages=torch.where(mask, credited.advantages, 0))

    def terms(self, state: State) -> dict[str, Term]:
        """Every token alike."""
        return {"loss": Term(token_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the surrogate of each token."""
        ratio = token_ratio(seen.policy.logprob, seen.old.logprob, batch.mask)
        low, high = self.clip_low, self.clip_high
        clip = was_clipped(ratio.detach(), batch.advantages, low=low, high=high)
        loss = clipped(ratio, batch.advantages, low=low, high=high)
        return {"loss": loss, "clip_fraction": clip, "entropy": seen.policy.entropy}
