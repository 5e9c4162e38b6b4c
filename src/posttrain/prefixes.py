"""Rows that begin alike are laid out with that beginning once: a group's prompt, the prompt of chosen and rejected.

A causal model computes the same states for the same first tokens, so the answers to one prompt can stand behind a single
copy of it.  The trunk then reads P + n R tokens in place of n (P + R); readings and gradients are the same to rounding.

    rows      p p p a a | p p p b      ->      p p p | a a | b        segments; the last two stand behind the first
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from posttrain.layout import Behind, Layout
from posttrain.types import Batch

SHORTEST = 4
"""Tokens that rows must have in common for it to pay."""
SAVED = 0.1
"""The share of tokens that must be saved for it to pay."""


def common_lengths(batch: Batch) -> tuple[Tensor, Tensor]:
    """How many first tokens all rows of a row's group have in common, and where each group begins.

    Every row keeps at least its last token to itself.

    Returns:
        `[B]` int64, 0 where the rows have too few in common; and `[B]` int64, the first row of each row's group.
    """
    groups, rows = int(batch.group.max()) + 1, torch.arange(batch.num_rows, device=batch.group.device)
    head = torch.full((groups,), batch.num_rows, device=rows.device).scatter_reduce_(0, batch.group, rows, "amin")[batch.group]
    width = batch.tokens.shape[1]
    within = torch.arange(width, device=rows.device) < torch.minimum(batch.lengths, batch.lengths[head])[:, None]
    alike = ((batch.tokens == batch.tokens[head]) & within).long().cumprod(1).sum(1)  # [B]
    mine = torch.minimum(alike, batch.lengths - 1)
    least = torch.full((groups,), width, device=rows.device).scatter_reduce_(0, batch.group, mine, "amin")
    alone = torch.bincount(batch.group, minlength=groups) < 2
    least[alone | (least < SHORTEST)] = 0
    return least[batch.group], head


def shared_layout(batch: Batch) -> Layout | None:
    """The batch with common beginnings laid out once, or None where that would save too little.

    Segments are the distinct beginnings, in the order of their groups, then what is left of every row, in order.
    """
    groups = int(batch.group.max()) + 1
    if groups >= batch.num_rows:
        return None
    common, head = common_lengths(batch)
    heads = ((head == torch.arange(batch.num_rows, device=head.device)) & (common > 0)).nonzero()[:, 0]  # [F] rows
    saved, total = int(common.sum() - common[heads].sum()), int(batch.lengths.sum())
    if not saved or saved < SAVED * total:
        return None
    place = torch.arange(batch.tokens.shape[1], device=common.device)
    before = place < common[heads][:, None]  # [F, T]
    own = (place < batch.lengths[:, None]) & (place >= common[:, None])  # [B, T]
    tokens = torch.cat((batch.tokens[heads][before], batch.tokens[own]))
    positions = torch.cat((before.nonzero()[:, 1], own.nonzero()[:, 1]))
    sizes = [*common[heads].tolist(), *(batch.lengths - common).tolist()]
    number = torch.full((groups,), -1, device=common.device)
    number[batch.group[heads]] = torch.arange(len(heads), device=common.device)
    behind = Behind(segment=number[batch.group], length=common, first=len(heads))
    return replace(Layout.of(tokens, sizes), positions=positions, behind=behind)
