"""ssToken: imitate the tokens that the model is already learning and that look back at the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.reductions import sequence_mean
from posttrain.method import Method
from posttrain.types import Batch, Readings, Reduction, State, Term, View


def normalised(values: Tensor, mask: Tensor) -> Tensor:
    """`(x - min) / (max - min + 1e-8)` along each row, over trained tokens; a constant row gives 0.

    `[B, T] -> [B, T]`.
    """
    low = torch.where(mask, values, torch.inf).amin(-1, keepdim=True)
    high = torch.where(mask, values, -torch.inf).amax(-1, keepdim=True)
    return torch.where(mask, (values - low) / (high - low + 1e-8), 0)


def kept(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    """The `ceil(share * n)` best trained tokens of each row, at least 1; ties go to the earlier.

    `[B, T] -> [B, T]` bool.
    """
    count = (mask.sum(-1).double() * share - 1e-9).ceil().clamp(min=1)  # [B]
    order = torch.where(mask, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return mask & (rank < count.unsqueeze(-1))


@dataclass(frozen=True, kw_only=True)
class SsToken(Method):
    """Keeps in every row the tokens that have improved since the start and that attend to the prompt; imitates only those.

        score_t = gamma N(log pi(y_t) - log pi_history(y_t)) + (1 - gamma) attention_t

    The history model is the run's `reference` (the start).  Attention is the mass that token t as query gives to
    untrained tokens before it, mean over heads of one layer.  Dropped tokens stay in the context.  Rows are
    demonstrations. Left out: a moving-average history; see jianke0604/ssToken.

    Source: "ssToken: Self-modulated and Semantic-aware Token Selection for LLM Fine-tuning", arXiv:2510.18250,
    equations 3 to 11.
    """

    gamma: float = 0.5
    """Weight of improvement against attention, in [0, 1]."""
    rho: float = 0.6
    """Share of each row's trained tokens that is kept, in (0, 1]."""
    layer: int = -1
    """Layer whose attention is read; -1 is the last."""
    warmup_rows: int = 0
    """Rows during which gamma counts as 0 (the public code: 10000; the paper: none)."""
    reduce: Reduction = sequence_mean
    """How kept tokens are averaged: `sequence_mean` is the paper's, `token_mean` the public code's."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1 or not 0 < self.rho <= 1:
            raise ConfigError(f"gamma is {self.gamma} and rho {self.rho}; expected them in [0, 1] and (0, 1]")

    def views(self) -> dict[str, View]:
        """History and present once, then the policy on what is kept."""
        look = reads.attention_to_prompt(self.layer)
        return {
            "history": View("reference", (reads.logprob,), once=True),
            "present": View(reads=(reads.logprob, look), once=True),
            "policy": View(reads=(reads.logprob,)),
        }

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """The mask keeps the best share of each row."""
        warm = int(state.memory.get("rows", 0)) >= self.warmup_rows
        gamma = self.gamma if warm else 0.0
        improved = torch.where(batch.mask, seen.present.logprob - seen.history.logprob, 0)
        scores = gamma * normalised(improved, batch.mask) + (1 - gamma) * seen.present.attention_to_prompt
        return batch.with_(mask=kept(scores, batch.mask, self.rho))

    def terms(self, state: State) -> dict[str, Term]:
        """The chosen reduction."""
        return {"loss": Term(self.reduce)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the cost of each token."""
        return {"loss": -seen.policy.logprob}

    def begin(self) -> dict[str, Any]:
        """No row seen."""
        return {"rows": 0}

    def remember(self, state: State, batch: Batch, metrics: Mapping[str, float]) -> dict[str, Any]:
        """How many rows were seen."""
        return {"rows": int(state.memory.get("rows", 0)) + batch.num_rows}
