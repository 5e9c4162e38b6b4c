"""Sums, means and recursions along a row, over trained tokens only.

Masked positions are taken out, not multiplied by zero: a NaN or an infinity there changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum over trained tokens.  `values [B, T], mask [B, T] bool -> [B]`."""
    return torch.where(mask, values, 0).sum(-1)


def sequence_average(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over trained tokens; 0 for a row without one.  `[B, T], [B, T] -> [B]`."""
    return sequence_sum(values, mask) / mask.sum(-1).clamp(min=1).to(values.dtype)


def sequence_length(mask: Tensor, *, like: Tensor) -> Tensor:
    """How many tokens of each row are trained, in the dtype of `like`.  `[B, T] -> [B]`."""
    return mask.sum(-1).to(like.dtype)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over all trained tokens of the batch; 0 where there is none.  `[B, T], [B, T] -> []`."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1).to(values.dtype)


def last_trained(mask: Tensor) -> Tensor:
    """`[B, T] bool -> [B, T] bool`: True at the last trained token of each row, and nowhere in a row without one."""
    after = mask.flip(-1).cumsum(-1).flip(-1)  # trained tokens from here on
    return mask & (after == 1)


def reverse_discounted_sum(values: Tensor, mask: Tensor, discount: float) -> Tensor:
    """`y_t = values_t + discount * y_u`, where u is the next *trained* token of the row; untrained tokens cost no discount.

    Args:
        values: `[B, T]`.
        mask: `[B, T]` bool.  Values of untrained tokens are not read.
        discount: Applied once for each trained token that is left behind.

    Returns:
        `[B, T]`; at an untrained position the sum of the next trained one, 0 after the last.

    A scan by doubling: log2(T) steps instead of T.
    """
    total = torch.where(mask, values, 0)
    decay = torch.where(mask, torch.full_like(total, discount), torch.ones_like(total))
    step, length = 1, total.shape[-1]
    while step < length:
        ahead = torch.nn.functional.pad(total[:, step:], (0, step))
        total = total + decay * ahead
        decay = decay * torch.nn.functional.pad(decay[:, step:], (0, step))
        step *= 2
    return total


def next_trained(values: Tensor, mask: Tensor) -> Tensor:
    """The value at the next trained token of the row, strictly after t; 0 after the last.

    `[B, T], [B, T] -> [B, T]`.
    """
    here_or_later = reverse_discounted_sum(values, mask, 0.0)
    return torch.nn.functional.pad(here_or_later[:, 1:], (0, 1))
