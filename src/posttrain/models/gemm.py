"""The matrix product of a linear layer, three ways, and a probe that says which float32 way is faster here.

`exact` is torch's own product and the default; `fast` is float32 through oneDNN, which beats torch's choice on some
CPUs; `bf16` multiplies bfloat16 copies of float32 master weights and keeps everything else in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from posttrain.errors import ConfigError, nearest

Precision = Literal["exact", "fast", "bf16"]
Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""`(x [..., I], weight [O, I], bias [O] | None) -> [..., O]`."""
Together = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""`(x [n, I], weights [O1, I], [O2, I], ...) -> [n, O1 + O2 + ...]`: one product for several layers with the same input."""


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., I] @ weight [O, I].T + bias [O]` by torch."""
    return functional.linear(x, weight, bias)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """`x [n, I] @ weight [O, I].T` by oneDNN, float32, without gradients."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def has_onednn() -> bool:
    """Does this torch have the operator that reaches oneDNN in float32?"""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _OneDNN(Function):
    """`x [n, I], weights [O, I] -> [n, O1 + O2 + ...]`, all three products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return onednn(x, weights[0] if len(weights) == 1 else torch.cat(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad, (needs_x, *needs) = grads[0].contiguous(), ctx.needs_input_grad
        grad_x = onednn(grad, torch.cat([w.t() for w in weights], 1)) if needs_x else None  # [n, O] -> [n, I]
        grad_weights: list[Tensor | None] = [None] * len(weights)
        if any(needs):
            whole = onednn(grad.t().contiguous(), x.t().contiguous())  # [O, n], [I, n] -> [O, I]
            pieces = whole.split([len(w) for w in weights])
            grad_weights = [piece if needed else None for piece, needed in zip(pieces, needs, strict=True)]
        return grad_x, *grad_weights


def _by_onednn(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Can oneDNN multiply these: is it there, and are they float32 on a CPU?"""
    wide = all(factor.dtype == torch.float32 for factor in (x, *weights))
    return wide and x.device.type == "cpu" and x.numel() > 0 and has_onednn()


def fast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by oneDNN; torch's own product where oneDNN is missing or the tensors are not float32 on a CPU."""
    if not _by_onednn(x, (weight,)):
        return functional.linear(x, weight, bias)
    out: Tensor = _OneDNN.apply(x.flatten(0, -2).contiguous(), weight.contiguous())
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def _narrow(weights: Sequence[Tensor]) -> Tensor:
    """The weights as bfloat16, one below the other: `[O1 + O2 + ..., I]`."""
    if len(weights) == 1:
        return weights[0].to(torch.bfloat16)
    out = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=torch.bfloat16, device=weights[0].device)
    for place, weight in zip(out.split([len(w) for w in weights]), weights, strict=True):
        place.copy_(weight)
    return out


class _BFloat16(Function):
    """`x [n, I], weights [O, I] -> [n, O1 + O2 + ...]` in bfloat16, as are all factors; gradients of weights add up in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        narrow, matrix = x.to(torch.bfloat16), _narrow(weights)
        ctx.save_for_backward(narrow, matrix)  # not the weights: the backward pass reads the same factors, and casts nothing again
        ctx.dtype, ctx.kinds, ctx.sizes = x.dtype, [w.dtype for w in weights], [len(w) for w in weights]
        return functional.linear(narrow, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        grad, (needs_x, *needs) = grads[0], ctx.needs_input_grad
        grad_x = (grad @ matrix).to(ctx.dtype) if needs_x else None
        grad_weights: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            pieces = zip((grad.t() @ x).split(ctx.sizes), ctx.kinds, needs, strict=True)
            grad_weights = [piece.to(kind) if needed else None for piece, kind, needed in pieces]
        return grad_x, *grad_weights


def bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same with bfloat16 factors; `weight` stays the float32 master, and its gradient adds up in float32."""
    out: Tensor = _BFloat16.apply(x.flatten(0, -2), weight)
    out = out.to(weight.dtype).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def fast_together(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`fast` for several layers at once."""
    if not _by_onednn(x, weights):
        return functional.linear(x, torch.cat(list(weights)))
    return _OneDNN.apply(x.contiguous(), *weights)  # type: ignore[no-any-return]


def bf16_together(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`bf16` for several layers at once; the result stays in bfloat16, for what rounds it no further."""
    return _BFloat16.apply(x, *weights)  # type: ignore[no-any-return]


LINEAR: dict[str, Linear] = {"exact": exact, "fast": fast, "bf16": bf16}
"""The products by the name of their precision."""
TOGETHER: dict[str, Together] = {"fast": fast_together, "bf16": bf16_together}
"""The products of several layers at once; in "exact" every layer has its own, as in transformers."""


def linear_of(precision: str) -> Linear:
    """The product of that name.

    Raises:
        ConfigError: There is none.
    """
    if precision not in LINEAR:
        raise ConfigError(f"precision is '{precision}'{nearest(precision, LINEAR)}")
    return LINEAR[precision]


OFFERED = 1.3
"""The least gain of a matrix product that is worth telling."""


@dataclass(frozen=True)
class Probe:
    """What a probe found; saved with the run, so that a resumed run makes the same choice."""

    choice: Precision  # "fast" or "exact"
    exact_seconds: float  # of one product, the best of a few
    fast_seconds: float  # 0 where oneDNN is missing
    bf16_seconds: float
    threads: int

    def words(self) -> str:
        """What another precision would bring to the matrix products here; empty where it would bring little."""
        quicker = {"fast": self.fast_seconds, "bf16": self.bf16_seconds}
        gains = {name: self.exact_seconds / seconds for name, seconds in quicker.items() if seconds}
        told = [f"precision={name} {gain:.1f}x" for name, gain in gains.items() if gain >= OFFERED]
        return f"quicker here: {', '.join(told)}" if told else ""

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def settle(precision: Precision, *, recorded: Mapping[str, Any] | None = None) -> tuple[Precision, dict[str, Any]]:
    """The precision to use where `precision` was asked for, and the record to save with the run.

    "fast" asks a probe whether it is faster here, or repeats the choice that an earlier part of the run recorded; the
    others are taken as they are.
    """
    if precision != "fast":
        return precision, {"choice": precision}
    if recorded is not None and "choice" in recorded:
        return recorded["choice"], dict(recorded)
    found = probe()
    return found.choice, found.record()


def probe(*, tokens: int = 256, width: int = 512, repeats: int = 5) -> Probe:
    """Which product is faster here: `x [tokens, width] @ weight [width, width].T`, the best of `repeats`.

    Takes some milliseconds.  `fast` is chosen when it needs at most nine tenths of the time; `bf16` rounds, and is offered.
    """
    x, weight = torch.ones(tokens, width), torch.ones(width, width)

    def best(linear: Linear) -> float:
        found = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            linear(x, weight, None)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    with torch.no_grad():
        exact_seconds, bf16_seconds = best(exact), best(bf16)
        fast_seconds = best(fast) if has_onednn() else 0.0
    choice: Precision = "fast" if 0 < fast_seconds <= 0.9 * exact_seconds else "exact"
    return Probe(choice, exact_seconds, fast_seconds, bf16_seconds, torch.get_num_threads())


__all__ = [
    "LINEAR",
    "TOGETHER",
    "Linear",
    "Precision",
    "Probe",
    "Together",
    "bf16",
    "bf16_together",
    "exact",
    "fast",
    "fast_together",
    "has_onednn",
    "linear_of",
    "onednn",
    "probe",
    "settle",
]
