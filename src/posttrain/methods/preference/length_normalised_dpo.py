"""Length-normalised DPO: DPO on means over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import logistic, pairs
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_average
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics, referenced_views
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class LengthNormalisedDPO(Method):
    """Long answers have large log-ratios; the mean over tokens takes that away.

        L = -log sigmoid(beta (r_chosen - r_rejected)),   r the mean over tokens of log pi - log ref

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.  Its beta is not that of DPO: 5 here is about 0.1 there.

    Source: "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", arXiv:2411.15124, equation 6.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 5.0
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
        reward = self.beta * sequence_average(seen.policy.logprob - seen.reference.logprob, batch.mask)  # [B]
        chosen, rejected = pairs(reward)  # [B / 2] each
        return {"loss": logistic(chosen - rejected), **pair_metrics(reward, seen.policy.logprob, batch.mask)}
