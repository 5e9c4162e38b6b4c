"""Robust DPO: an unbiased DPO loss under flipped labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import pairs, unbiased
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics, referenced_views
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class RobustDPO(Method):
    """In expectation over labels that flip with chance e it is the DPO loss of the true labels.

        L = [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2e),   m = beta (r_chosen - r_rejected)

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.

    Source: "Provably Robust DPO: Aligning Language Models with Noisy Feedback", arXiv:2403.00409, equation 12.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 0.1
    """Weight of the implicit KL to the reference; higher keeps the policy nearer."""
    flip: float = 0.1
    """Share of pairs whose label is taken to be wrong (epsilon), in [0, 0.5); 0 is DPO."""

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.flip < 0.5:
            raise ConfigError(f"beta is {self.beta} and flip {self.flip}; expected beta > 0 and flip in [0, 0.5)")

    def views(self) -> dict[str, View]:
        """The policy at every step, the reference once."""
        return referenced_views()

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over pairs."""
        return {"loss": Term(pair_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[P]`: the cost of each pair."""
        reward = self.beta * sequence_sum(seen.policy.logprob - seen.reference.logprob, batch.mask)  # [B]
        chosen, rejected = pairs(reward)  # [B / 2] each
        return {"loss": unbiased(chosen - rejected, self.flip), **pair_metrics(reward, seen.policy.logprob, batch.mask)}
