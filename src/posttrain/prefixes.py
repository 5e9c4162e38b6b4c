"""Rows that begin alike are laid out with that beginning once: a group's prompt, the prompt of chosen and rejected.

A causal model computes the same states for the same first tokens, so the answers to one prompt can stand behind a single
copy of it.  The trunk then reads P + n R tokens in place of n (P + R); readings and gradients are the same to rounding.

    rows      p p p a a | p p p b      ->      p p p | a a | b        segments; the last two stand behind the first
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from posttrain.layout import Behind, Layout
from posttrain.types import Batch

Numbers = npt.NDArray[np.int64]

SHORTEST = 4
"""Tokens that rows must have in common for it to pay."""
SAVED = 0.1
"""The share of tokens that must be saved for it to pay."""


def common_lengths(tokens: Numbers, lengths: Numbers, group: Numbers) -> tuple[Numbers, Numbers]:
    """How many first tokens all rows of a row's group have in common, and where each group begins.

    Every row keeps at least its last token to itself.

    Args:
        tokens: `[B, T]`, right-padded.
        lengths: `[B]`.
        group: `[B]`, equal within a group.

    Returns:
        `[B]`, 0 where the rows have too few in common; and `[B]`, the first row of each row's group.
    """
    rows, width = tokens.shape
    first = np.full(int(group.max()) + 1, rows)
    np.minimum.at(first, group, np.arange(rows))
    head = first[group]
    within = np.arange(width) < np.minimum(lengths, lengths[head])[:, None]
    unlike = (tokens != tokens[head]) | ~within
    alike = np.where(unlike.any(1), unlike.argmax(1), width)
    least = np.full(len(first), width)
    np.minimum.at(least, group, np.minimum(alike, lengths - 1))
    least[(np.bincount(group, minlength=len(first)) < 2) | (least < SHORTEST)] = 0
    return least[group], head


def shared_layout(batch: Batch) -> Layout | None:
    """The batch with common beginnings laid out once, or None where that would save too little.

    Segments are the distinct beginnings, in the order of their groups, then what is left of every row, in order.
    """
    group = batch.group.cpu().numpy()
    if len(np.unique(group)) >= batch.num_rows:
        return None
    tokens, lengths = batch.tokens.cpu().numpy(), batch.lengths.cpu().numpy()  # a dozen small operations: quicker than in torch
    common, head = common_lengths(tokens, lengths, group)
    heads = ((head == np.arange(len(head))) & (common > 0)).nonzero()[0]  # [F] a row of each group with a common beginning
    saved = common.sum() - common[heads].sum()
    if not saved or saved < SAVED * lengths.sum():
        return None
    place = np.arange(tokens.shape[1])
    before = place < common[heads][:, None]  # [F, T]
    own = (place < lengths[:, None]) & (place >= common[:, None])  # [B, T]
    number = np.full(int(group.max()) + 1, -1)
    number[group[heads]] = np.arange(len(heads))
    device = batch.tokens.device
    packed, positions, segment, length = (
        torch.from_numpy(values).to(device)
        for values in (
            np.concatenate((tokens[heads][before], tokens[own])),
            np.concatenate((before.nonzero()[1], own.nonzero()[1])),
            number[group],
            common,
        )
    )
    sizes = [*common[heads].tolist(), *(lengths - common).tolist()]
    return replace(Layout.of(packed, sizes), positions=positions, behind=Behind(segment, length, first=len(heads)))
