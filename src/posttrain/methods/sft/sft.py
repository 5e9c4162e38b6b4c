"""Supervised fine-tuning: imitate the demonstrated tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.reductions import token_mean
from posttrain.method import Method
from posttrain.random import NOISE, uniform
from posttrain.types import Batch, Embed, Readings, Reduction, State, Term, View


def noisy_embeddings(embed: Embed, batch: Batch, seen: Readings, *, alpha: float) -> Tensor:  # noqa: ARG001
    """`E + alpha / sqrt(L d) * U(-1, 1)`, L the real length of each row; no noise on padding or in evaluation.

    `[B, T, D]`.  The noise is keyed by (seed, step, index, position): cutting or padding the batch changes nothing.
    """
    clean = embed(batch.tokens)  # [B, T, D]
    if not batch.training:
        return clean
    rows, width, depth = clean.shape
    position = torch.arange(width, device=clean.device)
    index = batch.index.unsqueeze(-1).expand(rows, width)
    noise = 2 * uniform(batch.seed, batch.step, index, position, draws=depth, stream=NOISE).view(clean.shape) - 1
    half_width = alpha / (batch.lengths.to(clean.dtype) * depth).sqrt()  # [B]
    real = position < batch.lengths.unsqueeze(-1)  # [B, T]
    return clean + torch.where(real.unsqueeze(-1), noise.to(clean.dtype) * half_width[:, None, None], 0)


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """Maximise the likelihood of demonstrated completions, token by token.

        l_t = -(1 - e) log pi(y_t) - e mean_v log pi(v)

    Rows are demonstrations; only trained tokens (completions, with the token that ends them) cost anything.
    The reduction says who weighs the same: tokens (`token_mean`), rows (`sequence_mean`) or likelihoods
    (`sequence_sum_mean`).

    Source: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5;
    noise: "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv:2310.05914, algorithm 1; label smoothing as
    in Szegedy et al., arXiv:1512.00567, equation 7, the true class included in the uniform part.
    """

    reduce: Reduction = token_mean
    """How token losses are averaged: a function of `formulas.reductions`."""
    label_smoothing: float = 0.0
    """Share of the target spread over the whole vocabulary, in [0, 1); off in evaluation.  Usual: 0 or 0.1."""
    neftune_alpha: float = 0.0
    """Strength of the noise on input embeddings (NEFTune); 0 is off, off in evaluation.  Usual: 5 to 15."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; expected a number in [0, 1)")
        if not 0 <= self.neftune_alpha < math.inf:
            raise ConfigError(f"neftune_alpha is {self.neftune_alpha}; expected a finite number >= 0")

    def views(self) -> dict[str, View]:
        """The policy, on noisy embeddings where noise is on."""
        wanted = (reads.logprob, reads.mean_logprob) if self.label_smoothing else (reads.logprob,)
        noisy = partial(noisy_embeddings, alpha=self.neftune_alpha) if self.neftune_alpha else None
        return {"policy": View(reads=wanted, embeddings=noisy)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the smoothed cost of each token, and its plain negative log-likelihood."""
        nll = -seen.policy.logprob
        if not self.label_smoothing or not batch.training:
            return {"loss": nll}
        smooth = (1 - self.label_smoothing) * nll - self.label_smoothing * seen.policy.mean_logprob
        return {"loss": smooth, "nll": nll}

    def terms(self, state: State) -> dict[str, Term]:
        """The chosen reduction."""
        return {"loss": Term(self.reduce)}
