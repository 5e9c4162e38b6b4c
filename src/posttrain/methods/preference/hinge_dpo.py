"""Hinge DPO: the margin of DPO with the loss of SLiC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import hinge, pairs
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics, referenced_views
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class HingeDPO(Method):
    """A pair that is apart by more than 1 costs nothing more.

        L = max(0, 1 - m),   m = beta (r_chosen - r_rejected)

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.

    Source: "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", arXiv:2305.10425, equation 1, on DPO's margin
    as in "Statistical Rejection Sampling Improves Preference Optimization" (arXiv:2309.06657).
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 0.1
    """Weight of the implicit KL to the reference; higher keeps the policy nearer."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; expected a number > 0")

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
        return {"loss": hinge(chosen - rejected), **pair_metrics(reward, seen.policy.logprob, batch.mask)}
