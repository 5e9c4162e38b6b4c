"""Causal attention of packed rows by torch's kernel for them, `varlen_attn`: on a GPU, in half precision, nothing padded.

A segment that stands behind a common beginning has that beginning's keys before its own.  It then has more keys than
queries, and flash attention aligns its causal mask, and its window, to the bottom right: the last query sees all keys,
the one before it all but the last.  That is the mask such a segment needs.

Axes: `N` tokens, `S` segments, `K` keys of all segments, `H` query heads, `Kv` key and value heads, `d` width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)
"""What the kernel reads."""
Kernel = Callable[..., Any]
"""Called as `torch.nn.attention.varlen.varlen_attn`."""


@lru_cache(maxsize=1)
def _torchs() -> Kernel | None:
    """The kernel of this torch, where it takes a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys() else None


def kernel_for(device: torch.device, dtype: torch.dtype, width: int) -> Kernel | None:
    """The kernel, where it applies: half precision on a GPU with flash attention, heads of 8, 16, ... 256."""
    if device.type != "cuda" or dtype not in HALF or width % 8 or width > 256:
        return None
    return None if torch.cuda.get_device_capability(device) < (8, 0) else _torchs()


@lru_cache(maxsize=8)
def sees_fronts(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Is its causal mask aligned to the bottom right?  Found out on two queries and three keys, once a process.

    torch may answer by another kernel than flash attention, and a mask of the other alignment would be wrong in silence.
    """
    with torch.inference_mode(False), torch.no_grad():
        queries = torch.zeros(2, 1, 8, dtype=dtype, device=device)
        keys = torch.zeros(3, 1, 8, dtype=dtype, device=device)
        values = torch.tensor([0.0, 2.0, 7.0], dtype=dtype, device=device)[:, None, None].expand(3, 1, 8).contiguous()
        starts = [torch.tensor([0, count], dtype=torch.int32, device=device) for count in (2, 3)]
        seen = kernel(queries, keys, values, *starts, 2, 3, scale=1.0, window_size=(-1, 0))[:, 0, 0]
        return torch.allclose(seen.float().cpu(), torch.tensor([1.0, 3.0]), atol=0.05)


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the queries and keys of all segments stand; worked out once a layout."""

    queries: Tensor  # [S + 1] int32, segment s has queries [queries[s], queries[s + 1]) of N
    keys: Tensor  # [S + 1] int32, the same of K
    index: Tensor | None  # [K] int64 place in the pack of every key; None where segments have no keys but their own
    most_queries: int  # of a segment
    most_keys: int


def packed(segments: Tensor, device: torch.device) -> Packed:
    """The plan of segments that lie one after another.

    Args:
        segments: `[S, 4]` int64 on the CPU: first token, tokens, first token in front, tokens in front.
        device: Where the plan is wanted.

    Example:
        Three tokens in front of two segments of two tokens and one:

        >>> plan = packed(torch.tensor([[0, 3, 0, 0], [3, 2, 0, 3], [5, 1, 0, 3]]), torch.device("cpu"))
        >>> plan.queries.tolist(), plan.keys.tolist()
        ([0, 3, 5, 6], [0, 3, 8, 12])
        >>> plan.index.tolist()
        [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    """
    first, own, front_first, front = segments.unbind(1)  # [S] each
    counts = own + front
    queries, keys = (torch.nn.functional.pad(x.cumsum(0), (1, 0)) for x in (own, counts))
    index = None
    if bool(front.any()):
        segment = torch.repeat_interleave(torch.arange(len(segments)), counts)  # [K]
        place = torch.arange(int(keys[-1])) - keys[segment]  # of a key among those of its segment
        before = front[segment]
        index = torch.where(place < before, front_first[segment] + place, first[segment] + place - before).to(device)
    queries, keys = (x.to(device=device, dtype=torch.int32) for x in (queries, keys))
    return Packed(queries, keys, index, int(own.max()), int(counts.max()))


class _Gather(Function):
    """`x [N, ...], index [K] -> [K, ...]`; what a beginning gets back from many segments is summed in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        (grad,) = grads
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = torch.zeros(ctx.count, *grad.shape[1:], dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


def attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, plan: Packed, *, scale: float, window: int | None) -> Tensor:
    """Causal attention of all segments in one call.

    Args:
        kernel: See `kernel_for`.
        q: `[N, H, d]`, rotated.
        k: `[N, Kv, d]`, rotated; `H` is a multiple of `Kv`.
        v: `[N, Kv, d]`.
        plan: Where their queries and keys stand.
        scale: Multiplies the scores before the softmax.
        window: A token sees itself and the `window - 1` tokens before it; None: all of them.

    Returns:
        `[N, H * d]`.
    """
    if plan.index is not None:
        # copies a beginning once a segment behind it: in half precision Kv * d * 2 bytes a key, and as much for its value,
        # kept for the backward pass as those of whole rows would be
        k, v = _Gather.apply(k, plan.index), _Gather.apply(v, plan.index)
    repeats, options = q.shape[1] // k.shape[1], {}
    if repeats > 1 and "enable_gqa" in inspect.signature(kernel).parameters:
        options["enable_gqa"] = True
    elif repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    sides = (-1 if window is None else window - 1, 0)
    out: Tensor = kernel(
        q, k, v, plan.queries, plan.keys, plan.most_queries, plan.most_keys, scale=scale, window_size=sides, **options
    )
    return out.flatten(1)


__all__ = ["HALF", "Kernel", "Packed", "attention", "kernel_for", "packed", "sees_fronts"]
