"""Dynamic fine-tuning: SFT whose tokens are weighed by their own probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain import reads
from posttrain.formulas.reductions import token_mean
from posttrain.method import Method
from posttrain.types import Batch, Readings, Reduction, State, Term, View


def rectified(logprob: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`-sg[p] log p` and the weight `sg[p]`, at trained tokens.  `[B, T], [B, T] -> [B, T]` twice."""
    safe = torch.where(mask, logprob, 0)
    weight = safe.detach().exp()
    return -weight * safe, weight


@dataclass(frozen=True, kw_only=True)
class DFT(Method):
    """SFT seen as a policy gradient divides by the token's probability; multiplying it back caps unlikely tokens.

        l_t = -sg[pi(y_t)] log pi(y_t)

    Its gradient is that of minus the mean probability of the demonstrated tokens, so its optimum is the data's mode,
    not its distribution.  Rows are demonstrations.

    Source: "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
    arXiv:2508.05629, equation 9 (the token form).
    """

    reduce: Reduction = token_mean
    """How token losses are averaged: a function of `formulas.reductions`."""

    def views(self) -> dict[str, View]:
        """The policy."""
        return {"policy": View(reads=(reads.logprob,))}

    def terms(self, state: State) -> dict[str, Term]:
        """The chosen reduction."""
        return {"loss": Term(self.reduce)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the rectified cost; `nll` and `weight` for the report."""
        loss, weight = rectified(seen.policy.logprob, batch.mask)
        return {"loss": loss, "nll": -seen.policy.logprob, "weight": weight}
