"""R-DPO: DPO that expects longer answers to be preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import pairs, smoothed
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_length, sequence_sum
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics, referenced_views
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class RDPO(Method):
    """What length alone explains earns no push: the gradient is smaller for long winners, larger for short ones.

        L = -log sigmoid(m + alpha (n_chosen - n_rejected)),   m = beta (r_chosen - r_rejected),   n tokens of the answer

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.

    Source: "Disentangling Length from Quality in Direct Preference Optimization", arXiv:2403.19159, equation 9 (its number
    and the default of alpha are from memory).
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 0.1
    """Weight of the implicit KL to the reference; higher keeps the policy nearer."""
    alpha: float = 0.05
    """Log-odds that a token more is taken to bring; 0 is DPO."""
    flip: float = 0.0
    """Share of pairs whose label is taken to be wrong, in [0, 0.5): the whole argument is flipped, length term included."""

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
        more, fewer = pairs(sequence_length(batch.mask, like=reward))
        loss = smoothed(chosen - rejected + self.alpha * (more - fewer), 1 - self.flip)
        return {"loss": loss, **pair_metrics(reward, seen.policy.logprob, batch.mask)}
