"""Intuitive fine-tuning: imitate after a prefix that is partly the model's own guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.reductions import sequence_mean
from posttrain.formulas.sequences import reverse_discounted_sum, sequence_length, sequence_sum
from posttrain.method import Method
from posttrain.types import Batch, Embed, Readings, Reduction, State, Term, View

Relation = Callable[[Tensor, Tensor, float], Tensor]
"""`(nll [B, T], mask [B, T], decay) -> weights [B, T]`."""


def _reshaped(nll: Tensor, mask: Tensor, decay: float, shape: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights of mean 1 along each row from the discounted cost of what follows; all ones at decay 0, as in the code."""
    if decay == 0:
        return mask.to(nll.dtype)
    count = sequence_length(mask, like=nll).unsqueeze(-1)  # [B, 1]
    later = reverse_discounted_sum(nll / count.clamp(min=1), mask, decay)
    y = torch.where(mask, shape(later), 0)
    total = y.sum(-1, keepdim=True)
    return torch.where(mask, count * y / torch.where(total > 0, total, 1), 0)


def propagated(nll: Tensor, mask: Tensor, decay: float) -> Tensor:
    """`w_t = N y_t / sum y`, `y_t = sum_{k >= t} decay^(k - t) nll_k / N`; carries a gradient, as in the public code."""
    return _reshaped(nll, mask, decay, lambda y: y)


def propagated_detached(nll: Tensor, mask: Tensor, decay: float) -> Tensor:
    """As `propagated`, without the gradient through the weights."""
    return propagated(nll.detach(), mask, decay)


def propagated_squared(nll: Tensor, mask: Tensor, decay: float) -> Tensor:
    """As `propagated`, from `y^2`."""
    return _reshaped(nll, mask, decay, lambda y: y**2)


def propagated_softmax(nll: Tensor, mask: Tensor, decay: float) -> Tensor:
    """As `propagated`, from `softmax(y)`."""
    return _reshaped(nll, mask, decay, lambda y: torch.where(mask, y, -torch.inf).softmax(-1).nan_to_num(0.0))


def propagated_log(nll: Tensor, mask: Tensor, decay: float) -> Tensor:
    """As `propagated`, from `log(y + 1)`."""
    return _reshaped(nll, mask, decay, torch.log1p)


def literal(nll: Tensor, mask: Tensor, decay: float) -> Tensor:
    """The paper's double sum taken as printed, times N: `w_i = N sum_{j <= i} decay^j`; later tokens weigh more."""
    ones = mask.to(nll.dtype).flip(-1)
    count = sequence_sum(mask.to(nll.dtype), mask).unsqueeze(-1)
    return torch.where(mask, count * reverse_discounted_sum(ones, mask.flip(-1), decay).flip(-1), 0)


def mixed_embeddings(embed: Embed, batch: Batch, seen: Readings, *, lam: float) -> Tensor:
    """`(1 - lambda) E[x_t] + lambda E[guess_t]` at trained tokens, `E[x_t]` elsewhere; no gradient to E.

    `[B, T, D]`.
    """
    gold = embed(batch.tokens).detach()
    if not batch.training:
        return gold
    guess = embed(torch.where(batch.mask, seen.guess.argmax, batch.tokens)).detach()
    return torch.where(batch.mask.unsqueeze(-1), (1 - lam) * gold + lam * guess, gold)


@dataclass(frozen=True, kw_only=True)
class IFT(Method):
    """The model's own guess of each token is mixed into the prefix, and tokens whose future goes badly weigh more.

        e_t = (1 - lambda) E[y_t] + lambda E[argmax pi(. | y_<t)],   l_t = w_t (-log pi(y_t | e_<t))

    Two forwards, one of them without gradients; the input embeddings get no gradient (tied weights still learn
    through the head).  The weights are those of the public code; the paper's printed double sum is
    `relation=literal`. Left out: the mask and log-probability variants of the weights, and the schedule and
    disturbance of lambda; see TsinghuaC3I/Intuitive-Fine-Tuning.  Rows are demonstrations.

    Source: "Intuitive Fine-Tuning: Towards Simplifying Alignment into a Single Process", arXiv:2405.11870, section 4.
    """

    lam: float = 0.2
    """Share of the guess in the input embedding (lambda), in [0, 1]."""
    decay: float = 0.95
    """How much of a later token's cost an earlier one bears (gamma); 0 weighs all tokens the same."""
    relation: Relation = propagated
    """How weights follow from token costs: a function of `methods.sft.ift`."""
    reduce: Reduction = sequence_mean
    """How token losses are averaged: a function of `formulas.reductions`."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1 or not 0 <= self.decay <= 1:
            raise ConfigError(f"lam is {self.lam} and decay {self.decay}; expected both in [0, 1]")

    def views(self) -> dict[str, View]:
        """A guess without gradients, then the policy on mixed embeddings."""
        return {
            "guess": View(reads=(reads.argmax,), grad=False),
            "policy": View(reads=(reads.logprob,), embeddings=partial(mixed_embeddings, lam=self.lam)),
        }

    def terms(self, state: State) -> dict[str, Term]:
        """The chosen reduction."""
        return {"loss": Term(self.reduce)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: weighted costs; the share of right guesses and the plain cost for the report."""
        nll = torch.where(batch.mask, -seen.policy.logprob, 0)
        right = (seen.guess.argmax == batch.tokens).to(nll.dtype)
        return {"loss": self.relation(nll, batch.mask, self.decay) * nll, "nll": nll, "guessed": right}
