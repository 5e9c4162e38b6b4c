"""How much likelier a token is now than when it was written: importance ratios from log-probabilities.

Untrained positions get a ratio of 1 and no gradient.  Log-ratios are clamped to +-20 before `exp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.formulas.sequences import sequence_average, sequence_sum

LARGEST = 20.0
"""Largest absolute log-ratio, in nats."""


def log_ratio(logprob: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """`logprob - old` at trained tokens, 0 elsewhere; `old` carries no gradient.  `[B, T] -> [B, T]`."""
    return torch.where(mask, logprob - old.detach(), 0)


def token_ratio(logprob: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """`exp(logprob_t - old_t)`.  `[B, T] -> [B, T]`."""
    return log_ratio(logprob, old, mask).clamp(-LARGEST, LARGEST).exp()


def sequence_ratio(logprob: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """`exp(mean over trained tokens of logprob_t - old_t)`.  `[B, T] -> [B]`.

    Source: GSPO, arXiv:2507.18071, equation 7.
    """
    return sequence_average(log_ratio(logprob, old, mask), mask).clamp(-LARGEST, LARGEST).exp()


def truncated_importance(trainer: Tensor, sampler: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """`min(exp(trainer_t - sampler_t), cap)`, without gradient: corrects for a sampler that is not quite the trainer.

    `[B, T] -> [B, T]`.  Source: truncated importance sampling as in volcengine/verl, `rollout_corr_helper.py`.
    """
    return token_ratio(trainer.detach(), sampler, mask).clamp(max=cap)


def sequence_importance(trainer: Tensor, sampler: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """`min(exp(sum over trained tokens of trainer_t - sampler_t), cap)`, without gradient.  `[B, T] -> [B]`."""
    total = sequence_sum(log_ratio(trainer.detach(), sampler, mask), mask)
    return total.clamp(-LARGEST, LARGEST).exp().clamp(max=cap)
