"""Policy-gradient costs of one token (or one sequence): to be minimised, never averaged here."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """`-min(ratio A, clip(ratio, 1 - low, 1 + high) A)`.  Any shape.  Source: PPO, arXiv:1707.06347, equation 7."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dual_clipped(ratio: Tensor, advantage: Tensor, *, low: float, high: float, ceiling: float = 3.0) -> Tensor:
    """As `clipped`, and never above `-ceiling A` where `A < 0`.  Any shape.  Source: arXiv:1912.09729, equation 5."""
    cost = clipped(ratio, advantage, low=low, high=high)
    return torch.where(advantage < 0, torch.minimum(cost, -ceiling * advantage), cost)


def was_clipped(ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """1.0 where the clip binds, so that no gradient flows; 0.0 elsewhere.  Any shape."""
    binds = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    return binds.to(ratio.dtype)


def detached_weight(weight: Tensor, advantage: Tensor, logprob: Tensor) -> Tensor:
    """`-sg[weight] A logprob`: the weight scales the gradient and is never differentiated, so no token is dropped.

    `[B, T]` each.  Source: CISPO in MiniMax-M1, arXiv:2506.13585, equation 4.
    """
    return -weight.detach() * advantage * logprob


def clipped_value_loss(value: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """`0.5 max((v - ret)^2, (old + clip(v - old, -c, c) - ret)^2)`.  `[B, T]`.  Source: openai/lm-human-preferences."""
    near = old.detach() + (value - old.detach()).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2)
