"""Pieces of a layer by compiled kernels, forward and backward: for float32 on a CPU thread, in the quick precisions.

Values and gradients are those of `fused` and of `attention` to rounding.  Where a product reads with bfloat16 factors, the piece
before it writes bfloat16.  Axes: `N` tokens, `D` width, `I` inner width, `H` query heads, `Kv` key heads, `d` width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from posttrain.compiled import THREADS, kernels

WIDEST = 256
"""Of a head."""
QUERIES = 4
"""The attention kernel rounds the queries of a row up to a multiple of this: it takes them by eights, and the last by fours."""


def suits(*tensors: Tensor) -> bool:
    """Can the kernels have these: float32 or bfloat16 on a CPU, with as many threads as they have?"""
    kinds = (torch.float32, torch.bfloat16)
    if not all(x.device.type == "cpu" and x.dtype in kinds for x in tensors):
        return False
    return torch.get_num_threads() <= THREADS and kernels() is not None


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Can `attention` have these heads?"""
    wide = all(x.dtype == torch.float32 for x in (q, k, v))
    return wide and suits(q, k, v) and q.shape[-1] % 16 == 0 and q.shape[-1] <= WIDEST


def _called(name: str, *given: Any) -> None:
    """Call a kernel; tensors are given by where they are."""
    getattr(kernels(), name)(*(one.data_ptr() if isinstance(one, Tensor) else one for one in given))


def _is_narrow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float, kind: torch.dtype) -> Any:
        x, y = x.contiguous(), None if y is None else y.contiguous()
        rows, width = x.shape
        total = x if y is None else torch.empty_like(x)
        normed, scales, scratch = x.new_empty(rows, width, dtype=kind), x.new_empty(rows), x.new_empty(width)
        narrow = y is not None and _is_narrow(y)
        _called("norm_forward", x, y, narrow, total, weight, normed, _is_narrow(normed), scales, rows, width, eps, scratch)
        ctx.save_for_backward(total, weight, scales)
        ctx.kind = None if y is None else y.dtype
        return normed if y is None else (normed, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        rows, width = x.shape
        grad, past = grads[0].contiguous(), None if ctx.kind is None else grads[1].contiguous()
        grad_x, grad_weight, scratch = torch.empty_like(x), torch.zeros_like(weight), x.new_empty(width)
        grad_y = torch.empty_like(x, dtype=ctx.kind) if ctx.kind not in (None, x.dtype) else None
        out = (grad_x, grad_y, grad_y is not None and _is_narrow(grad_y), grad_weight)
        _called("norm_backward", grad, _is_narrow(grad), past, x, weight, scales, *out, rows, width, scratch)
        return grad_x, (None if ctx.kind is None else grad_x if grad_y is None else grad_y), grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, kind: torch.dtype) -> Tensor:
    """`weight * x / rms(x)` over the last axis: `[N, D]` float32 -> `[N, D]` of `kind`."""
    return _Norm.apply(x, None, weight, eps, kind)  # type: ignore[no-any-return]


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, *, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm of `x + y`, of `kind`, and the sum in float32; `y` may be bfloat16.  Both `[N, D]`."""
    return _Norm.apply(x, y, weight, eps, kind)  # type: ignore[no-any-return]


class _Swiglu(Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor) -> Tensor:
        wide = wide.contiguous()
        rows, inner = wide.shape[0], wide.shape[1] // 2
        out, scratch = wide.new_empty(rows, inner), torch.empty(2 * inner)
        _called("swiglu", wide, _is_narrow(wide), out, _is_narrow(out), rows, inner, scratch)
        ctx.save_for_backward(wide)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (wide,) = ctx.saved_tensors
        grad, out = grads[0].contiguous(), torch.empty_like(wide)
        rows, inner = grad.shape
        scratch = torch.empty(3 * inner)
        _called("swiglu_backward", grad, _is_narrow(grad), wide, _is_narrow(wide), out, rows, inner, scratch)
        return out


def swiglu(wide: Tensor) -> Tensor:
    """`silu(gate) * up` from both side by side: `[N, 2 I] -> [N, I]`."""
    return _Swiglu.apply(wide)  # type: ignore[no-any-return]


class _Heads(Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, queries: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
        mixed, cos, sin = mixed.contiguous(), cos.contiguous(), sin.contiguous()
        rows, _, width = mixed.shape
        turned, values = cos.new_empty(rows, queries + kv, width), cos.new_empty(rows, kv, width)
        _called("heads_forward", mixed, _is_narrow(mixed), cos, sin, turned, values, rows, queries + kv, kv, width)
        ctx.save_for_backward(cos, sin)
        ctx.kind = mixed.dtype
        return turned[:, :queries], turned[:, queries:], values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        q, k, v = (grad.contiguous() for grad in grads)
        rows, queries, width = q.shape
        kv = k.shape[1]
        grad = torch.empty(rows, queries + 2 * kv, width, dtype=ctx.kind)
        _called("heads_backward", q, k, v, cos, sin, grad, _is_narrow(grad), rows, queries, kv, width)
        return grad, None, None, None, None


def heads(mixed: Tensor, cos: Tensor, sin: Tensor, *, queries: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, in float32 from one product: see `fused.heads`."""
    return _Heads.apply(mixed, cos, sin, queries, kv)  # type: ignore[no-any-return]


def turns(mixed: Tensor, cos: Tensor) -> bool:
    """Can `heads` have these?"""
    return cos.dtype == torch.float32 and suits(mixed, cos) and mixed.shape[-1] <= WIDEST


def _strided(x: Tensor) -> tuple[Tensor, int]:
    """Heads `[N, h, d]` whose rows are whole, and the distance between tokens."""
    if x.stride(-1) != 1 or x.stride(1) != x.shape[-1]:
        x = x.contiguous()
    return x, x.stride(0)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, longest: int, scale: float, window: int, kind: torch.dtype
    ) -> Tensor:
        tokens, heads, width = q.shape
        kv = k.shape[1]
        pairs = [_strided(x) for x in (q, k, v)]
        strided = [part for pair in pairs for part in pair]
        out, logsums = q.new_empty(tokens, heads * width, dtype=kind), q.new_empty(tokens, heads)
        sizes = (segments, len(segments), kv, heads // kv, width, scale, window)
        columns = longest + 32
        scratch = q.new_empty(columns * (2 * width + 8))
        _called("attention_forward", *strided, *sizes, out, _is_narrow(out), logsums, scratch)
        ctx.save_for_backward(*(x for x, _ in pairs), segments, logsums)
        ctx.scale, ctx.window, ctx.longest = scale, window, longest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *inputs, segments, logsums = ctx.saved_tensors
        strided = [part for x in inputs for part in (x, x.stride(0))]
        (q, k, v), grad = inputs, grads[0].contiguous()
        kv, heads, width = k.shape[1], q.shape[1], q.shape[2]
        grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        sizes = (segments, len(segments), kv, heads // kv, width, ctx.scale, ctx.window)
        scratch = q.new_empty((ctx.longest + 32) * (5 * width + 16))
        _called("attention_backward", grad, _is_narrow(grad), *strided, logsums, *sizes, grad_q, grad_k, grad_v, scratch)
        return grad_q, grad_k, grad_v, None, None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, *, longest: int, scale: float, window: int | None, kind: torch.dtype
) -> Tensor:
    """Causal attention over packed rows: nothing is padded, masked or kept but one number a query.

    Args:
        q: `[N, H, d]` float32, rotated.
        k: `[N, Kv, d]`, rotated; `H` is a multiple of `Kv`.
        v: `[N, Kv, d]`.
        segments: `[B, 4]` int64: first token, tokens, and the same of what the segment stands behind.
        longest: The most keys of a segment.
        scale: Multiplies the scores before the softmax.
        window: A token sees itself and the `window - 1` tokens before it; None: all of them.
        kind: Of the result.

    Returns:
        `[N, H * d]`.
    """
    return _Attention.apply(q, k, v, segments, longest, scale, window or 0, kind)  # type: ignore[no-any-return]


__all__ = ["add_norm", "attends", "attention", "heads", "rms_norm", "suits", "swiglu", "turns"]
