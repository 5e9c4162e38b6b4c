"""IPO: a squared loss that cannot run away from its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import pairs, squared_margin
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_average
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics, referenced_views
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class IPO(Method):
    """DPO drives a certain preference to infinity; IPO drives it to a margin of 1 / (2 beta).

        L = (h - 1 / (2 beta))^2,   h = r_chosen - r_rejected,   r the mean over tokens of log pi - log ref

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.  The mean over tokens is what the authors
    confirmed for public code; their equation, taken as printed, has the sum: `score=sequence_sum`.

    Source: "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv:2310.12036, equation 17.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 0.1
    """Weight of the KL to the reference (tau in the paper): the target margin is 1 / (2 beta)."""
    score: Callable[[Tensor, Tensor], Tensor] = sequence_average
    """Log-ratio of an answer from those of its tokens: `sequence_average` or `sequence_sum`."""

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
        ratio = self.score(seen.policy.logprob - seen.reference.logprob, batch.mask)  # [B]
        chosen, rejected = pairs(ratio)  # [B / 2] each
        metrics = pair_metrics(self.beta * ratio, seen.policy.logprob, batch.mask)
        return {"loss": squared_margin(chosen - rejected, 1 / (2 * self.beta)), **metrics}
