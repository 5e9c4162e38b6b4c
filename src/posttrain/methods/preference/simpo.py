"""SimPO: the mean log-probability is the reward, and no reference is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.preferences import logistic, pairs
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_average
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class SimPO(Method):
    """Trains on what decoding maximises, and asks the chosen answer to win by a margin.

        L = -log sigmoid(beta (s_chosen - s_rejected) - gamma),   s the mean over tokens of log pi

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.

    Source: "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734, equation 6; the
    defaults are those of its Mistral-Base run, and the learning rate matters most.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 2.0
    """Scale of the mean log-probability.  Usual: 2 to 10."""
    gamma: float = 1.6
    """Margin by which the chosen answer must win (not divided by beta).  Usual: 0.1 to 0.8 times beta."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; expected a number > 0")

    def views(self) -> dict[str, View]:
        """The policy; there is no reference."""
        return {"policy": View(reads=(reads.logprob,))}

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over pairs."""
        return {"loss": Term(pair_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[P]`: the cost of each pair."""
        reward = self.beta * sequence_average(seen.policy.logprob, batch.mask)  # [B]
        chosen, rejected = pairs(reward)  # [B / 2] each
        return {"loss": logistic(chosen - rejected - self.gamma), **pair_metrics(reward, seen.policy.logprob, batch.mask)}
