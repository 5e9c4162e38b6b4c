"""RLOO: plain REINFORCE, the other answers to the prompt being the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.advantages import leave_one_out
from posttrain.formulas.divergences import difference
from posttrain.formulas.reductions import sequence_sum_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.method import Method
from posttrain.methods.policy.grpo import with_group_advantages
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class RLOO(Method):
    """The whole answer is one action, and neither clipping nor a critic is needed.

        L = -A sum_t log pi(y_t),   A = r' - mean of the others' r',   r' = r - beta sum_t (log old(y_t) - log ref(y_t))

    averaged over answers.  Rows are prompts with at least 2 answers each.  There is no importance ratio: make one
    update a batch.

    Source: "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
    arXiv:2402.14740, equation 9.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    beta: float = 0.03
    """Weight of the KL to the reference in the reward; at 0 no reference is read.  The paper: 0.03 or 0.10."""

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ConfigError(f"beta is {self.beta}; expected a number >= 0")

    def views(self) -> dict[str, View]:
        """The policy; where beta is above 0, also its log-probabilities before the update and the reference's."""
        views = {"policy": View(reads=(reads.logprob, reads.watched_entropy))}
        if self.beta > 0:
            views["old"] = View(reads=(reads.logprob,), once=True)
            views["reference"] = View("reference", (reads.logprob,), once=True)
        return views

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Rewards less the KL, against the mean of the others."""
        if self.beta == 0:
            return with_group_advantages(batch, leave_one_out)
        kl = sequence_sum(difference(seen.old.logprob, seen.reference.logprob, batch.mask), batch.mask)  # [B]
        return with_group_advantages(batch, leave_one_out, batch.rewards - self.beta * kl).with_columns(kl=kl)

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over answers of token sums."""
        return {"loss": Term(sequence_sum_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the cost of each token."""
        loss = -batch.advantages * torch.where(batch.mask, seen.policy.logprob, 0)
        kl = {"kl_per_answer": batch.columns["kl"]} if "kl" in batch.columns else {}
        return {"loss": loss, **kl, "entropy": seen.policy.entropy}
