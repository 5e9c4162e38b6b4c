"""GSPO: GRPO whose ratio and clip are those of the whole answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.formulas.advantages import group_zscore_sample
from posttrain.formulas.ratios import sequence_ratio
from posttrain.formulas.reductions import row_mean
from posttrain.formulas.sequences import sequence_average
from posttrain.formulas.surrogates import clipped, was_clipped
from posttrain.method import Method
from posttrain.methods.policy.grpo import Advantage, check_clip, rollout_views, with_group_advantages
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class GSPO(Method):
    """Rewards are given to answers, so the importance ratio is an answer's too: the geometric mean of its tokens' ratios.

        c = -min(s A, clip(s, 1 - low, 1 + high) A),   s = exp(mean_t log pi(y_t) - log old(y_t))

    One value an answer.  Rows are prompts with at least 2 answers each.  Left out: the token variant.

    Source: "Group Sequence Policy Optimization", arXiv:2507.18071, equations 5 and 7.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    clip_low: float = 3e-4
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 4e-4
    """The ratio is clipped above at 1 + clip_high."""
    advantage: Advantage = group_zscore_sample
    """Rewards to advantages within a group."""

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)

    def views(self) -> dict[str, View]:
        """Policy and old policy; no reference."""
        return rollout_views()

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Group advantages."""
        return with_group_advantages(batch, self.advantage)

    def terms(self, state: State) -> dict[str, Term]:
        """Every answer alike."""
        return {"loss": Term(row_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B]`: the surrogate of each answer."""
        ratio = sequence_ratio(seen.policy.logprob, seen.old.logprob, batch.mask)  # [B]
        advantage = sequence_average(batch.advantages, batch.mask)  # [B]; all its tokens hold the same
        low, high = self.clip_low, self.clip_high
        clip = was_clipped(ratio.detach(), advantage, low=low, high=high)
        loss = clipped(ratio, advantage, low=low, high=high)
        return {"loss": loss, "clip_fraction": clip, "entropy": seen.policy.entropy}
