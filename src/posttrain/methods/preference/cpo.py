"""CPO: DPO with a flat reference, held up by likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.preferences import logistic, pairs
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_average, sequence_sum
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class CPO(Method):
    """No reference model: a term of plain likelihood keeps the chosen answer likely.

        L = -log sigmoid(beta (S_chosen - S_rejected)) + alpha NLL_chosen,   S the sum and NLL the mean over tokens

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.

    Source: "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    arXiv:2401.08417, equation 5.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 0.1
    """Scale of the log-probability."""
    alpha: float = 1.0
    """Weight of the chosen answer's negative log-likelihood."""

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
        reward = self.beta * sequence_sum(seen.policy.logprob, batch.mask)  # [B]
        chosen, rejected = pairs(reward)  # [B / 2] each
        nll, _ = pairs(-sequence_average(seen.policy.logprob, batch.mask))
        loss = logistic(chosen - rejected) + self.alpha * nll
        return {"loss": loss, "nll": nll, **pair_metrics(reward, seen.policy.logprob, batch.mask)}
