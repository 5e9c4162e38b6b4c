"""The two halves of a layer, before and after attention, each as one graph of `torch.compile`.

What stands around the matrix products is many small operations that a GPU spends its time reading and writing memory for;
a graph does those that follow one another in one pass.  All weights are arguments, so that one graph serves all layers, and
the number of tokens is dynamic from the first call on, so that it serves all batches.

The formulas are those of `Decoder`, written plainly.  Axes: `n` tokens, `D` hidden width, `I` inner width, `H` query heads,
`Kv` key and value heads, `d` width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from posttrain.errors import ConfigError
from posttrain.models.decoder import Decoder, rms_norm_offset, rotate
from posttrain.models.gemm import bf16

BACKEND: Any = "inductor"
"""What turns the formulas into kernels; tests put one in its place that takes no time."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}
"""Of the gate, by transformers' name."""

Weights = tuple["Tensor | None", ...]
"""Of layers that read the same; of their biases, None where there is none."""


def norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """`weight * x / rms(x)` over the last axis, in float32 at least; with `offset` as Gemma does it."""
    if offset:
        return rms_norm_offset(x, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def products(x: Tensor, weights: Weights, biases: Weights, narrow: bool) -> list[Tensor]:
    """`x [n, I]` through several linear layers `[O, I]`: `[n, O]` each, in x's dtype.

    With `narrow` the factors are bfloat16 and all layers one product; a weight's gradient is its master's dtype again.
    """
    if not narrow:
        return [functional.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True) if w is not None]
    given = [w for w in weights if w is not None]
    matrix = torch.cat([w.to(torch.bfloat16) for w in given]) if len(given) > 1 else given[0].to(torch.bfloat16)
    parts = (x.to(torch.bfloat16) @ matrix.T).to(x.dtype).split([len(w) for w in given], -1)
    return [part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True)]


def before(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Weights,  # of the layer [D], of the heads of queries and of keys [d]
    weights: Weights,  # of queries, keys and values
    biases: Weights,
    eps: float,
    offset: bool,
    narrow: bool,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x [n, D]` -> queries `[n, H, d]`, keys `[n, Kv, d]`, values `[n, Kv, d]`, of `kind`; see `Decoder.qkv`."""
    first, of_queries, of_keys = norms
    parts = products(norm(x, cast("Tensor", first), eps, offset), weights, biases, narrow)
    q, k, v = (part.unflatten(-1, (-1, cos.shape[-1])) for part in parts)
    if of_queries is not None and of_keys is not None:
        q, k = norm(q, of_queries, eps, offset), norm(k, of_keys, eps, offset)
    return rotate(q, cos, sin).to(kind), rotate(k, cos, sin).to(kind), v.to(kind)


def after(
    x: Tensor,
    attended: Tensor,
    weight: Tensor,  # of the norm [D]
    weights: Weights,  # out, gate, up, down
    biases: Weights,
    eps: float,
    offset: bool,
    narrow: bool,
    activation: str,
) -> Tensor:
    """`x [n, D]` that entered the layer and `attended [n, H * d]` -> `[n, D]`; see `Decoder.finish`."""
    x = x + products(attended.to(x.dtype), weights[:1], biases[:1], narrow)[0]
    gate, up = products(norm(x, weight, eps, offset), weights[1:3], biases[1:3], narrow)
    return x + products(ACTIVATIONS[activation](gate) * up, weights[3:], biases[3:], narrow)[0]


@lru_cache(maxsize=8)
def compiled(half: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """One of the two as a graph, which all models share."""
    return torch.compile(half, backend=backend, dynamic=False)


class CompiledLayers:
    """`Decoder.qkv` and `Decoder.finish` as compiled graphs, for plain linear layers in the precisions "fast" and "bf16".

    Example:
        `graphs = CompiledLayers(decoder)`, then for every layer `q, k, v = graphs.qkv(layer, x, cos, sin, kind=torch.bfloat16)`
        and `x = graphs.finish(layer, x, attended)`.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Refuse what the formulas above would not compute.

        Raises:
            ConfigError: Linear layers that are not plain (LoRA, 4 bits), or a gate of an activation not in `ACTIVATIONS`.
        """
        self._decoder = decoder
        self._activation = decoder.activation
        if self._activation not in ACTIVATIONS:
            raise ConfigError(
                f"compile knows gates of {', '.join(ACTIVATIONS)}; this model's is '{self._activation}': leave compile out"
            )
        self._halves = [self._parts(layer) for layer in range(decoder.num_layers)]

    def _parts(self, layer: int) -> tuple[tuple[nn.Module, ...], tuple[nn.Linear, ...]]:
        """The norms of a layer, and its linear layers: q, k, v, out, gate, up, down."""
        block = self._decoder.layers[layer]
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        linear = (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        other = next((type(module).__name__ for module in linear if type(module) is not nn.Linear), None)
        if other is not None:
            raise ConfigError(f"compile needs plain linear layers, and this model has {other} (LoRA, 4 bits): leave compile out")
        heads = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
        return (block.input_layernorm, block.post_attention_layernorm, *heads), linear

    def _eps(self, module: Any) -> float:
        return float(module.eps if self._decoder.offset_norm else module.variance_epsilon)

    @property
    def _narrow(self) -> bool:
        return self._decoder.linear is bf16

    def qkv(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, *, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """As `Decoder.qkv`, of `kind`."""
        norms, linear = self._halves[layer]
        first, head_norms = norms[0], norms[2:] or (None, None)
        weights, biases = _weights(linear[:3])
        given = ((first.weight, *(None if each is None else each.weight for each in head_norms)), weights, biases)
        settings = (self._eps(first), self._decoder.offset_norm, self._narrow, kind)
        found = _run(before, (x, cos, sin), *given, *settings)
        return cast("tuple[Tensor, Tensor, Tensor]", found)

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """As `Decoder.finish`."""
        norms, linear = self._halves[layer]
        weights, biases = _weights(linear[3:])
        settings = (self._eps(norms[1]), self._decoder.offset_norm, self._narrow, self._activation)
        return cast("Tensor", _run(after, (x, attended), norms[1].weight, weights, biases, *settings))


def _weights(layers: Sequence[nn.Linear]) -> tuple[Weights, Weights]:
    return tuple(module.weight for module in layers), tuple(module.bias for module in layers)


def _run(half: Callable[..., Any], tokens: Sequence[Tensor], *given: Any) -> Any:
    """A half on tensors `[n, ...]` and what else it takes.

    Raises:
        ConfigError: There is no compiler here that torch could use.
    """
    if len(tokens[0]) < 2:  # torch.compile makes a size of 1 a constant, and a graph for it alone
        return half(*tokens, *given)
    for x in tokens:
        torch._dynamo.mark_dynamic(x, 0)
    try:
        return compiled(half, BACKEND)(*tokens, *given)
    except torch._dynamo.exc.TorchDynamoException as cause:
        reason = " ".join(str(cause).split("\n\n")[0].split())
        raise ConfigError(f"torch.compile failed: {reason}; it needs a C++ compiler, on a GPU Triton: leave compile out") from cause


__all__ = ["ACTIVATIONS", "BACKEND", "CompiledLayers", "after", "before", "compiled", "norm", "products"]
