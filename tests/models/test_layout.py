"""Packed tokens and back."""

from __future__ import annotations

import pytest
import torch

from posttrain.errors import DataError
from posttrain.layout import Layout, layout
from posttrain.types import Batch


def batch_of(tokens: torch.Tensor, lengths: list[int], **columns: torch.Tensor) -> Batch:
    rows, width = tokens.shape
    zeros, row = torch.zeros(rows, width), torch.zeros(rows)
    return Batch(
        tokens=tokens,
        lengths=torch.tensor(lengths),
        mask=zeros.bool(),
        origin=zeros.to(torch.int8),
        turn=zeros.to(torch.int16),
        group=row.long(),
        index=row.long(),
        temperature=row,
        logprobs=zeros,
        sampled_logprobs=zeros,
        rewards=row,
        truncated=row.bool(),
        advantages=zeros,
        returns=zeros,
        columns=columns,
    )


def test_a_batch_by_hand() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]])
    here = layout(batch_of(tokens, [3, 1], image=tokens * 10), extra=("image",))
    assert here.tokens.tolist() == [5, 6, 7, 8]
    assert here.positions.tolist() == [0, 1, 2, 0]
    assert here.lengths.tolist() == [3, 1]
    assert here.starts.tolist() == [0, 3, 4]
    assert here.row.tolist() == [0, 0, 0, 1]
    assert here.sizes == (3, 1)
    assert here.offsets == (0, 3, 4)
    assert here.width == 4
    assert here.extra["image"].tolist() == [50, 60, 70, 80]
    assert here.scatter(here.tokens).tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert here.scatter(here.tokens, fill=-1).tolist() == [[5, 6, 7, -1], [8, -1, -1, -1]]
    assert here.gather(tokens).tolist() == [5, 6, 7, 8]


def test_scatter_and_gather_are_differentiable_inverses() -> None:
    here = Layout.of(torch.zeros(6, dtype=torch.int64), [2, 4], width=5)
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(here.gather(here.scatter(values)), values)
    assert torch.autograd.gradcheck(here.scatter, (values,))


def test_refusals() -> None:
    with pytest.raises(DataError, match="do not make 3 tokens"):
        Layout.of(torch.zeros(3, dtype=torch.int64), [1, 1])
    with pytest.raises(DataError, match="every row needs at least 1"):
        Layout.of(torch.zeros(3, dtype=torch.int64), [3, 0])
    with pytest.raises(DataError, match="does not fit a width of 2"):
        Layout.of(torch.zeros(3, dtype=torch.int64), [3], width=2)
    with pytest.raises(DataError, match=r"no column 'imag' .nearest: 'image'"):
        layout(batch_of(torch.zeros(1, 2, dtype=torch.int64), [2], image=torch.zeros(1, 2)), extra=("imag",))
