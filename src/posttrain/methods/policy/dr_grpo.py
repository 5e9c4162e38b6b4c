"""Dr. GRPO: GRPO without the two divisions that bias it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.advantages import group_mean_centred
from posttrain.formulas.ratios import token_ratio
from posttrain.formulas.reductions import constant
from posttrain.formulas.surrogates import clipped, was_clipped
from posttrain.method import Method
from posttrain.methods.policy.grpo import check_clip, rollout_views, with_group_advantages
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class DrGRPO(Method):
    """Dividing by an answer's length favours long wrong answers, and by the group's deviation too easy and too hard prompts.

        c_t = -min(rho_t A, clip(rho_t) A) / L_max,   A = r - mean_G

    summed over an answer's tokens, averaged over answers.  Rows are prompts with at least 2 answers each.

    Source: "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv:2503.20783, section 3.2.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    max_tokens: int = 3000
    """The constant that token sums are divided by: the longest answer the run allows."""

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; expected at least 1")

    def views(self) -> dict[str, View]:
        """Policy and old policy; no reference."""
        return rollout_views()

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Rewards less their group's mean."""
        return with_group_advantages(batch, group_mean_centred)

    def terms(self, state: State) -> dict[str, Term]:
        """Token sums over a constant."""
        return {"loss": Term(constant(self.max_tokens))}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the surrogate of each token."""
        ratio = token_ratio(seen.policy.logprob, seen.old.logprob, batch.mask)
        low, high = self.clip_low, self.clip_high
        clip = was_clipped(ratio.detach(), batch.advantages, low=low, high=high)
        loss = clipped(ratio, batch.advantages, low=low, high=high)
        return {"loss": loss, "clip_fraction": clip, "entropy": seen.policy.entropy}
