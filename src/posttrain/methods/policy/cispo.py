"""CISPO: clip the importance weight, never the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.advantages import group_zscore_sample
from posttrain.formulas.ratios import token_ratio
from posttrain.formulas.reductions import token_mean
from posttrain.formulas.surrogates import detached_weight
from posttrain.method import Method
from posttrain.methods.policy.grpo import Advantage, rollout_views, with_group_advantages
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class CISPO(Method):
    """Clipping the surrogate silences rare tokens that matter; clipping the detached weight keeps every token's gradient.

        c_t = -sg[min(rho_t, cap)] A log pi(y_t), averaged over all tokens

    There is no lower bound.  Rows are prompts with at least 2 answers each.

    Source: "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv:2506.13585, equation 4.
    The paper tunes the cap and does not print it; 5 is from later public recipes, recalled.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    cap: float = 5.0
    """Largest importance weight (not 1 plus it)."""
    advantage: Advantage = group_zscore_sample
    """Rewards to advantages within a group."""

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ConfigError(f"cap is {self.cap}; expected a number > 0")

    def views(self) -> dict[str, View]:
        """Policy and old policy; no reference."""
        return rollout_views()

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Group advantages."""
        return with_group_advantages(batch, self.advantage)

    def terms(self, state: State) -> dict[str, Term]:
        """Every token alike."""
        return {"loss": Term(token_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the weighted cost of each token."""
        logprob = torch.where(batch.mask, seen.policy.logprob, 0)
        ratio = token_ratio(seen.policy.logprob, seen.old.logprob, batch.mask).detach()
        loss = detached_weight(ratio.clamp(max=self.cap), batch.advantages, logprob)
        return {"loss": loss, "clip_fraction": (ratio > self.cap).to(ratio.dtype), "entropy": seen.policy.entropy}
