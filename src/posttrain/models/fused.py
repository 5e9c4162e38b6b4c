"""Pieces of a layer whose backward pass is written out, so that a training step makes and keeps fewer tensors.

Values and gradients are those of the plain formulas to rounding, in every dtype.  Axes: `n` tokens, `D` width, `I` inner
width, `H` query heads, `Kv` key and value heads, `d` width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0]
        normed = x * scale
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        mean = (product @ weight).mul_(-1 / x.shape[-1]).unsqueeze(-1)
        return (grad * weight).addcmul_(normed, mean).mul_(scale), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / rms(x)` over the last axis, as Llama does it: float32 inside (float64 stays), then x's dtype."""
    if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
        return torch.rms_norm(x, weight.shape, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves of the last axis rotated against each other, without gradients: `x [n, h, d]`, `cos [n, 1, d]`, `sin [n, 1, d]`."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class _Heads(Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, queries: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        ctx.save_for_backward(cos, sin)
        ctx.kind, ctx.queries = mixed.dtype, queries
        wide = mixed.to(cos.dtype)
        turned = turn(wide[:, : queries + kv], cos, sin)
        return turned[:, :queries], turned[:, queries:], wide[:, queries + kv :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad_q, grad_k, grad_v = grads
        rows, queries, kv, width = cos.shape[0], ctx.queries, grad_k.shape[1], cos.shape[-1]
        grad = torch.empty(rows, queries + 2 * kv, width, dtype=ctx.kind, device=cos.device)
        back = -sin.roll(width // 2, -1)  # the transpose of a rotation is the one back
        grad[:, :queries] = turn(grad_q, cos, back)
        grad[:, queries : queries + kv] = turn(grad_k, cos, back)
        grad[:, queries + kv :] = grad_v
        return grad, None, None, None, None


def heads(mixed: Tensor, cos: Tensor, sin: Tensor, *, queries: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, from one product.

    Args:
        mixed: `[n, H + 2 Kv, d]` in any dtype.
        cos: `[n, d]`, in the dtype of the results.
        sin: `[n, d]`.
        queries: H.
        kv: Kv.

    Returns:
        `q [n, H, d]`, `k [n, Kv, d]`, `v [n, Kv, d]`.
    """
    return _Heads.apply(mixed, cos, sin, queries, kv)  # type: ignore[no-any-return]


class _Swiglu(Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor) -> Tensor:
        ctx.save_for_backward(wide)
        gate, up = wide.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (wide,) = ctx.saved_tensors
        grad = grads[0]
        gate, up = wide.chunk(2, -1)
        out = torch.empty_like(wide)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
        torch.mul(functional.silu(gate), grad, out=grad_up)
        return out


def swiglu(wide: Tensor) -> Tensor:
    """`silu(gate) * up` from both side by side: `[n, 2 I] -> [n, I]`."""
    return _Swiglu.apply(wide)  # type: ignore[no-any-return]


__all__ = ["heads", "rms_norm", "swiglu", "turn"]
