"""How far the policy is from a reference: estimators from one sampled token, and the exact sums over a vocabulary.

In the estimators `d = logprob - reference`, of tokens that the policy wrote.  As values, E[k1] = E[k3] = KL(policy ||
reference). As losses their expected gradients differ: k1 none at all, k2 that of KL(policy || reference), k3 that of
KL(reference || policy).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 20.0
"""Largest absolute log-ratio in nats that `k3` exponentiates."""


def difference(logprob: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """`logprob - reference` at trained tokens, 0 elsewhere; the reference carries no gradient.  `[B, T] -> [B, T]`."""
    return torch.where(mask, logprob - reference.detach(), 0)


def k1(d: Tensor) -> Tensor:
    """`d`: unbiased, often negative."""
    return d


def k2(d: Tensor) -> Tensor:
    """`d^2 / 2`: biased, small variance, the right gradient."""
    return d**2 / 2


def k3(d: Tensor) -> Tensor:
    """`exp(-d) + d - 1`: unbiased, never negative.  Source: J. Schulman, "Approximating KL divergence" (2020)."""
    return (-d).clamp(-LARGEST, LARGEST).exp() + d - 1


def full_kl(first: Tensor, second: Tensor) -> Tensor:
    """`KL(first || second)` of two rows of log-probabilities.  `[n, V], [n, V] -> [n]`; entries of probability 0 count 0."""
    possible = first > -torch.inf
    gap = torch.where(possible, first, 0) - torch.where(possible, second, 0)
    return (first.exp() * gap).sum(-1)


def forward_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """`KL(reference || policy)`: covers every mode of the reference.  Log-probabilities `[n, V] -> [n]`."""
    return full_kl(reference.detach(), policy)


def reverse_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """`KL(policy || reference)`: stays within the reference's modes.  Log-probabilities `[n, V] -> [n]`."""
    return full_kl(policy, reference.detach())
