"""How values per element become one number: weights shaped like the value, and the count they are divided by.

A reduction looks at the batch's data alone, so that counts can be summed over micro-batches and ranks before the first
backward pass.  Rows without a trained token count nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.types import Batch, Reduction


def _live(batch: Batch) -> Tensor:
    """`[B]` float: 1 for rows with a trained token."""
    return batch.mask.any(-1).to(batch.logprobs.dtype)


def token_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """Every trained token weighs the same.  Weights `[B, T]`, count the number of trained tokens."""
    weights = batch.mask.to(batch.logprobs.dtype)
    return weights, weights.sum()


def sequence_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over rows of each row's token mean.  Weights `[B, T]`, count the number of rows with a trained token."""
    mask = batch.mask.to(batch.logprobs.dtype)
    return mask / mask.sum(-1, keepdim=True).clamp(min=1), _live(batch).sum()


def sequence_sum_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over rows of each row's token sum.  Weights `[B, T]`, count the number of rows with a trained token."""
    return batch.mask.to(batch.logprobs.dtype), _live(batch).sum()


def constant(length: float) -> Reduction:
    """The token sum over rows x `length` (Dr. GRPO).

    Weights `[B, T]`, count rows with a trained token times `length`.
    """

    def reduce(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.mask.to(batch.logprobs.dtype), _live(batch).sum() * length

    return reduce


def sum_of_row_means(rows: float) -> Reduction:
    """The sum of the token means of `rows` rows: `rows` times `sequence_mean`, whatever the number of rows in an update.

    Weights `[B, T]`, count rows with a trained token over `rows`.

    Source: the KL term of openfeedback/superhf, where `rows` is the size of its minibatches.
    """

    def reduce(batch: Batch) -> tuple[Tensor, Tensor]:
        weights, count = sequence_mean(batch)
        return weights, count / rows

    return reduce


def row_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """One value a row.  Weights `[B]`, count the number of rows with a trained token."""
    live = _live(batch)
    return live, live.sum()


def ranking_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """One value a group, in rising order of `batch.group`.  Weights `[G]`, count the groups with two rows alive at least."""
    live = _live(batch)
    names, member = torch.unique(batch.group, return_inverse=True)  # [G], [B]
    weights = (live.new_zeros(len(names)).index_add(0, member, live) >= 2).to(live.dtype)
    return weights, weights.sum()


def pair_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """One value a pair (rows 2i, 2i + 1).  Weights `[B / 2]`, count the number of pairs with both rows alive."""
    live = _live(batch).view(-1, 2).prod(-1)
    return live, live.sum()
