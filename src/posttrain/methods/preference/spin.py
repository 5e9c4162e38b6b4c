"""SPIN: the model learns to tell demonstrations from its own answers of the round before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import logistic, pairs
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics, referenced_views
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class SPIN(Method):
    """Self-play: the player prefers the demonstration to what its opponent, the player of the round before, wrote.

        L = l(beta (r_demonstration - r_opponent)),   r = sum_t log pi(y_t) - log opponent(y_t),   l(m) = log(1 + exp(-m))

    Rows come in pairs: row 2i is a demonstration, row 2i + 1 the opponent's answer to its prompt; the sample stage `opponents`
    writes them.  The opponent is the start of the round, which is what a reference that is not named is; with LoRA merge the
    adapter between rounds.  Rounds are a recipe with `repeat`: opponents, then spin, each from the round before.  The loss has the
    algebra of DPO; what differs is where the pairs and the reference come from, and that correct answers are pushed down too
    unless `opponents` drops them.  Left out: the last round's beta of 5 (`beta=5`).

    Source: "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models", arXiv:2401.01335, equation 4.7, as
    coded in uclaml/SPIN (the equation's number is from memory).
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 0.1
    """Weight of the implicit KL to the opponent (lambda); higher keeps the player nearer to it within a round."""
    cost: Callable[[Tensor], Tensor] = logistic
    """Cost of a margin, `[P] -> [P]`: `logistic`, or `hinge` for max(0, 1 - m)."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; expected a number > 0")

    def views(self) -> dict[str, View]:
        """The policy at every step, its opponent once."""
        return referenced_views()

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over pairs."""
        return {"loss": Term(pair_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[P]`: the cost of each pair."""
        reward = self.beta * sequence_sum(seen.policy.logprob - seen.reference.logprob, batch.mask)  # [B]
        real, written = pairs(reward)  # [B / 2] each
        return {"loss": self.cost(real - written), **pair_metrics(reward, seen.policy.logprob, batch.mask)}
