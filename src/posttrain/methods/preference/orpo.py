"""ORPO: fine-tuning and preference in one loss, from the pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.preferences import log_odds, logistic, pairs
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_average
from posttrain.method import Method
from posttrain.methods.preference.dpo import pair_metrics
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class ORPO(Method):
    """Likelihood of the chosen answer, and the odds of the chosen over the rejected; no reference, no stage before it.

        L = NLL_chosen - lambda log sigmoid(lo(s_chosen) - lo(s_rejected)),   lo(a) = a - log(1 - exp(a))

    s and NLL are means over the answer's tokens.  Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.
    Left out: likelihood of the prompt's tokens, which some public code adds.

    Source: "ORPO: Monolithic Preference Optimization without Reference Model", arXiv:2403.07691, equations 6 and 7.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    lam: float = 0.1
    """Weight of the odds-ratio term (lambda)."""

    def __post_init__(self) -> None:
        if self.lam < 0:
            raise ConfigError(f"lam is {self.lam}; expected a number >= 0")

    def views(self) -> dict[str, View]:
        """The policy; there is no reference."""
        return {"policy": View(reads=(reads.logprob,))}

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over pairs."""
        return {"loss": Term(pair_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[P]`: the cost of each pair."""
        mean = sequence_average(seen.policy.logprob, batch.mask)  # [B]
        odds = log_odds(mean)
        chosen, rejected = pairs(odds)  # [B / 2] each
        nll, _ = pairs(-mean)
        ratio = logistic(chosen - rejected)
        metrics = pair_metrics(odds, seen.policy.logprob, batch.mask)
        return {"loss": nll + self.lam * ratio, "nll": nll, "odds_ratio": ratio, **metrics}
