"""Matrix products whose weights are made ready once for many steps, and the decoder's layers in as few products as possible.

A trainer's weights change between two products, a sampler's do not.  Where the model's precision is "fast" or "bf16",
one call of `sample` keeps the weights as oneDNN wants them, those of queries, keys and values side by side, gate and up
side by side.  The arithmetic is that of `models.gemm` and `models.decoder`; where the precision is "exact", nothing is
copied and the decoder's own pieces run.

Axes: `n` tokens, `D` hidden width, `I` inner width, `H` query heads, `Kv` key and value heads, `d` width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from posttrain.models import compiled
from posttrain.models.decoder import Decoder, causal_lm
from posttrain.models.gemm import Precision, has_onednn

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel

Product = Callable[[Tensor], Tensor]
"""`[n, I] -> [n, O]`."""
ROWS = 32
"""Rows that oneDNN is told to expect; other numbers work too."""


@dataclass(frozen=True)
class Pieces:
    """A forward in pieces, like `Decoder`, with the layers bound."""

    qkv: Sequence[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]]
    """`x [n, D], cos [n, d], sin [n, d] -> q [n, H, d], k [n, Kv, d], v [n, Kv, d]`, a layer."""
    finish: Sequence[Callable[[Tensor, Tensor], Tensor]]
    """`x [n, D], attended [n, H * d] -> [n, D]`, a layer."""
    head: Product
    """`[n, D] -> [n, V]`."""
    fused: Sequence[FusedLayer] | None = None
    """The layers themselves, where their products are made ready."""


def pieces(model: LanguageModel) -> Pieces:
    """The pieces of a model that has a decoder, for weights that stay as they are until they are dropped."""
    decoder = model.decoder
    assert decoder is not None
    inner: Any = causal_lm(model.module)
    if not fusible(model):
        numbers = range(decoder.num_layers)
        qkv = [partial(decoder.qkv, layer) for layer in numbers]
        return Pieces(qkv, [partial(decoder.finish, layer) for layer in numbers], decoder.head)
    layers = inner.model.layers[: decoder.num_layers]
    fused = [FusedLayer(decoder, number, layer, model.precision) for number, layer in enumerate(layers)]
    head = product(model.precision, [inner.lm_head])
    return Pieces([layer.qkv for layer in fused], [layer.finish for layer in fused], head, fused)


def fusible(model: LanguageModel) -> bool:
    """Can the products of this model be made ready?  Not in "exact", nor with LoRA or quantised weights."""
    inner: Any = causal_lm(model.module)
    if model.decoder is None or model.precision == "exact" or type(inner.lm_head) is not nn.Linear:
        return False
    return all(map(_plain, inner.model.layers[: model.decoder.num_layers]))


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    names = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return [*names, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _plain(layer: Any) -> bool:
    """Are all products of this layer plain ones (no LoRA, no quantised weights)?"""
    return all(type(module) is nn.Linear for module in _linears(layer))


def product(precision: Precision, modules: Sequence[nn.Linear], *, narrow: bool = False) -> Product:
    """The product with the weights of some linear layers side by side: `[n, I] -> [n, O1 + O2 + ...]`.

    With `narrow` the result of bfloat16 factors stays in bfloat16, as in the trainer.
    """
    weight = torch.cat([module.weight.detach() for module in modules]) if len(modules) > 1 else modules[0].weight.detach()
    biases = [module.bias for module in modules if module.bias is not None]
    bias = torch.cat([each.detach() for each in biases]) if biases else None
    kind = weight.dtype
    if precision == "bf16":
        weight = weight.to(torch.bfloat16)
        kind = torch.bfloat16 if narrow and bias is None else kind
    if weight.device.type != "cpu" or not has_onednn() or weight.dtype == torch.float64 or not _runs(weight.dtype):
        return partial(_dense, weight=weight, bias=bias, kind=kind)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    if weight.dtype == kind:
        return partial(_packed, packed=packed, bias=bias, factors=kind)
    return partial(_packed_narrow, packed=packed, bias=bias, kind=kind)


def _runs(dtype: torch.dtype) -> bool:
    """Can oneDNN multiply this on this CPU?"""
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _dense(x: Tensor, *, weight: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    out = functional.linear(x.to(weight.dtype), weight).to(kind)
    return out if bias is None else out + bias


def _packed(x: Tensor, *, packed: Tensor, bias: Tensor | None, factors: torch.dtype) -> Tensor:
    rows = len(x)
    x = x.to(factors) if rows > 1 else x.to(factors).repeat(2, 1)  # a row alone is added up in another order than the trainer's
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")[:rows]
    return out if bias is None else out.add_(bias)


def _packed_narrow(x: Tensor, *, packed: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), packed, None, "none", [], "")
    return out.to(kind) if bias is None else out.to(kind).add_(bias)


class FusedLayer:
    """One layer in four products, whose results stay in bfloat16 where their factors are."""

    def __init__(self, decoder: Decoder, number: int, layer: Any, precision: Precision) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._decoder, self._number, self._layer, self._act = decoder, number, layer, mlp.act_fn
        self.mix = product(precision, [attention.q_proj, attention.k_proj, attention.v_proj], narrow=True)
        self.out = product(precision, [attention.o_proj], narrow=True)
        self.wide = product(precision, [mlp.gate_proj, mlp.up_proj], narrow=True)
        self.down = product(precision, [mlp.down_proj], narrow=True)
        self.inner: int = mlp.gate_proj.out_features
        self._query_norm = getattr(attention, "q_norm", None)
        self._key_norm = getattr(attention, "k_norm", None)

    @property
    def norms(self) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
        """Weights and epsilons of the norms before attention and before the gates."""
        before, after = self._layer.input_layernorm, self._layer.post_attention_layernorm
        return (before.weight, before.variance_epsilon), (after.weight, after.variance_epsilon)

    @property
    def head_norms(self) -> tuple[Tensor | None, Tensor | None, float]:
        """Weights and epsilon of the norms of queries and keys, where there are any."""
        if self._query_norm is None or self._key_norm is None:
            return None, None, 0.0
        return self._query_norm.weight, self._key_norm.weight, self._query_norm.variance_epsilon

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Pieces.qkv`."""
        mixed = self.mix(self._decoder.norm(self._layer.input_layernorm, x))
        return self._decoder.split(self._number, mixed, cos, sin)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """See `Pieces.finish`."""
        decoder, norm = self._decoder, self._layer.post_attention_layernorm
        out = self.out(attended)
        if decoder.by_kernel(x, norm):
            normed, x = compiled.add_norm(x, out, norm.weight, norm.variance_epsilon, kind=out.dtype)
        else:
            x = out.to(x.dtype).add_(x)
            normed = decoder.norm(norm, x)
        wide = self.wide(normed)  # [n, 2 I]
        if decoder.silu and compiled.suits(wide):
            inner = compiled.swiglu(wide)
        else:
            wide = wide if decoder.silu else wide.to(x.dtype)
            inner = self._act(wide[:, : self.inner]).mul_(wide[:, self.inner :])
        return self.down(inner).to(x.dtype).add_(x)


__all__ = ["FusedLayer", "Pieces", "Product", "fusible", "pieces", "product"]
