"""Conservative DPO: DPO with smoothed labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import pairs, smoothed
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics, referenced_views
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class ConservativeDPO(Method):
    """DPO for labels that are wrong now and then: the margin has a finite optimum, logit(1 - e) / beta.

        L = -(1 - e) log sigmoid(m) - e log sigmoid(-m),   m = beta (r_chosen - r_rejected)

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.

    Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv:2305.18290, with the
    label smoothing of E. Mitchell, "A note on DPO with noisy preferences" (2023), equation 3.
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
        return {"loss": smoothed(chosen - rejected, 1 - self.flip), **pair_metrics(reward, seen.policy.logprob, batch.mask)}
