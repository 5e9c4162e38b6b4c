"""Attention of short rows as a few batched products: the query heads that share a key head are its rows.

torch's CPU kernel repeats keys and values for every query head and works in float32 throughout.  For rows of some hundred
tokens it is quicker to keep the probabilities: forward and backward are six batched products, of which five may have
bfloat16 factors; scores and softmax stay as wide as the tensors that come in.

Axes: `b` rows, `t` queries and `s` keys of a row, `H` query heads, `Kv` key heads, `Q = H / Kv`, `d` width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

LONGEST = 512
"""Keys of a row up to which keeping the probabilities pays, and takes less memory than the rest of a layer."""


def _fold(x: Tensor, kv: int) -> Tensor:
    """`[b, t, H, d] -> [b * Kv, Q * t, d]`, copied."""
    rows, tokens, heads, width = x.shape
    return x.view(rows, tokens, kv, heads // kv, width).permute(0, 2, 3, 1, 4).reshape(rows * kv, -1, width)


def _unfold(x: Tensor, tokens: int, kv: int, dtype: torch.dtype) -> Tensor:
    """The inverse, in another dtype: `[b * Kv, Q * t, d] -> [b, t, H, d]`."""
    width = x.shape[-1]
    parted = x.view(-1, kv, x.shape[1] // tokens, tokens, width).permute(0, 3, 1, 2, 4)
    return parted.to(dtype=dtype, memory_format=torch.contiguous_format).reshape(parted.shape[0], tokens, -1, width)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: Tensor, front: Tensor | None, scale: float, narrow: bool
    ) -> Tensor:
        kv = k.shape[2]
        queries, keys, values = _fold(q, kv), _fold(k, kv), _fold(v.to(torch.bfloat16) if narrow else v, kv)
        if front is None:
            scores = torch.baddbmm(causal, queries, keys.transpose(1, 2), alpha=scale)
        else:
            scores = torch.baddbmm(front.repeat_interleave(kv, 0), queries, keys.transpose(1, 2), alpha=scale).add_(causal)
        p = scores.softmax(-1)
        if narrow:
            queries, keys, p = (x.to(torch.bfloat16) for x in (queries, keys, p))
        ctx.save_for_backward(queries, keys, values, p)
        ctx.kv, ctx.tokens, ctx.scale, ctx.dtype = kv, q.shape[1], scale, q.dtype
        return _unfold(torch.bmm(p, values), q.shape[1], kv, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        queries, keys, values, p = ctx.saved_tensors
        grad = _fold(grads[0].to(p.dtype), ctx.kv)
        grad_v = torch.bmm(p.transpose(1, 2), grad)
        grad_scores = torch._softmax_backward_data(torch.bmm(grad, values.transpose(1, 2)), p, -1, p.dtype)
        grad_q = torch.bmm(grad_scores, keys).mul_(ctx.scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), queries).mul_(ctx.scale)
        length = keys.shape[1]
        found = (_unfold(grad_q, ctx.tokens, ctx.kv, ctx.dtype), *(_unfold(g, length, ctx.kv, ctx.dtype) for g in (grad_k, grad_v)))
        return *found, None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: Tensor, front: Tensor | None = None, scale: float, narrow: bool = False
) -> Tensor:
    """Attention of rows of one length.

    Args:
        q: `[b, t, H, d]`.
        k: `[b, s, Kv, d]`; `H` is a multiple of `Kv`.
        v: `[b, s, Kv, d]`.
        causal: `[1, Q * t, s]`, added to the scores: 0 where a query may look, -inf elsewhere.
        front: `[b, 1, s]`, added too, where rows differ in what all of their queries may look at.
        scale: Multiplies the scores.
        narrow: Sum over values, and all products of the backward pass, with bfloat16 factors.

    Returns:
        `[b, t, H, d]`.
    """
    return _Attention.apply(q, k, v, causal, front, scale, narrow)  # type: ignore[no-any-return]


__all__ = ["LONGEST", "attention"]
