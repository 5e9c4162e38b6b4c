"""The forward pass of Llama, Mistral, Qwen2, Qwen3 and Gemma in pieces that work on tokens, wherever these come from.

The weights are those of the transformers module, by reference; so are its linear layers, which LoRA may have wrapped.
A trainer strings the pieces together over packed rows, a sampler over one token a row with a cache between `qkv` and
`finish`.

Axes: `n` tokens, `D` hidden width, `H` query heads, `Kv` key and value heads, `d` width of a head, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.models import compiled
from posttrain.models.fused import heads, rms_norm, swiglu
from posttrain.models.gemm import Linear, Together, bf16, bf16_together, exact

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM")
"""The transformers classes whose forward pass this file owns."""


def causal_lm(module: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the module itself."""
    unwrap = getattr(module, "get_base_model", None)
    return cast("nn.Module", unwrap()) if callable(unwrap) else module


def supports(module: nn.Module) -> bool:
    """Can `Decoder` run this model?  The exact class counts: a subclass may have changed anything."""
    inner = causal_lm(module)
    kind = type(inner)
    if kind.__name__ not in FAMILIES or not kind.__module__.startswith("transformers.models."):
        return False
    return not getattr(inner.config, "use_bidirectional_attention", False)


def rms_norm_offset(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`(1 + weight) * x / rms(x)` over the last axis, as Gemma does it: weighed in float32 too."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: `x [n, h, d]`, `cos [n, d]`, `sin [n, d]` -> `[n, h, d]`, halves paired."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


class Decoder:
    """The building blocks of one model's forward pass.

    Example (the whole forward of one row, attention aside):
        `x = embed(tokens); cos, sin = rope(positions)`, then for every layer
        `q, k, v = qkv(layer, x, cos, sin); x = finish(layer, x, attended)`, then `head(final(x))`.
    """

    def __init__(self, module: nn.Module, *, linear: Linear = exact) -> None:
        if not supports(module):
            raise ConfigError(f"{type(causal_lm(module)).__name__} has no owned forward; it can be one of {', '.join(FAMILIES)}")
        inner: Any = causal_lm(module)
        config = inner.config
        self.linear = linear
        self.together: Together | None = None
        self._table: tuple[Any, Tensor, Tensor] | None = None
        self._model: Any = inner.model
        self._head: Any = inner.lm_head
        self.layers: list[Any] = list(inner.model.layers[: config.num_hidden_layers])
        self.activation: str = config.hidden_act
        self.silu = self.activation in ("silu", "swish")
        self.offset_norm = type(inner).__name__ == "GemmaForCausalLM"
        self._mistral_window = config.sliding_window if type(inner).__name__ == "MistralForCausalLM" else None
        attention = self.layers[0].self_attn
        self.num_layers = len(self.layers)
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.scale: float = attention.scaling

    @property
    def final_norm(self) -> tuple[Tensor, float]:
        """Weight and epsilon of the last norm, of Llama's kind."""
        return self._model.norm.weight, self._model.norm.variance_epsilon

    @property
    def biased_values(self) -> bool:
        """Do values have a bias, so that those of bfloat16 factors are float32?"""
        return any(getattr(layer.self_attn.v_proj, "bias", None) is not None for layer in self.layers)

    def window(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees, itself included; None: all before it."""
        own: int | None = getattr(self.layers[layer].self_attn, "sliding_window", None)
        return own if own is not None else self._mistral_window

    def embed(self, tokens: Tensor) -> Tensor:
        """`[...] int64 -> [..., D]`, scaled where the family scales."""
        return cast("Tensor", self._model.embed_tokens(tokens))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of some positions.

        The frequencies are the model's own module's, scaling included; for a float64 model the angles are worked out in
        float64, where transformers stays in float32.  With the scalings "dynamic" and "longrope" the frequencies depend on
        the largest position that is asked for together with it, as they do in transformers.

        Args:
            positions: `[n]` int64, `n >= 1`.

        Returns:
            `cos [n, d]` and `sin [n, d]` in the model's dtype.
        """
        rotary, dtype = self._model.rotary_emb, self._model.embed_tokens.weight.dtype
        like = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = rotary(like, positions[None])  # [1, n, d]
        if dtype != torch.float64:
            return cos[0], sin[0]
        angles = positions[:, None].double() * rotary.inv_freq.float().double()  # [n, d / 2]
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    def rope_table(self, length: int) -> tuple[Tensor, Tensor]:
        """`rope` of the positions 0 to `length` - 1; the last one is kept, for a sampler asks for the same again and again."""
        weight = self._model.embed_tokens.weight
        key = (length, weight.device, weight.dtype)
        if self._table is None or self._table[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._table = key, *self.rope(torch.arange(length, device=weight.device))
        return self._table[1:]

    def qkv(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer, normed and rotated.

        Args:
            layer: From 0.
            x: `[n, D]`, what enters the layer.
            cos: `[n, d]` of the tokens' positions.
            sin: `[n, d]`.

        Returns:
            `q [n, H, d]`, `k [n, Kv, d]`, `v [n, Kv, d]`.
        """
        block = self.layers[layer]
        attention = block.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        normed = self.norm(block.input_layernorm, x, read_by=projections)
        mixed = self._together(normed, projections)
        if mixed is not None:
            return self.split(layer, mixed, cos, sin)
        q = self.apply(attention.q_proj, normed).view(-1, self.num_heads, self.head_dim)
        k = self.apply(attention.k_proj, normed).view(-1, self.num_kv_heads, self.head_dim)
        v = self.apply(attention.v_proj, normed).view(-1, self.num_kv_heads, self.head_dim)
        if hasattr(attention, "q_norm"):
            q, k = self.norm(attention.q_norm, q), self.norm(attention.k_norm, k)
        turned = rotate(torch.cat((q, k), 1), cos, sin)
        return turned[:, : self.num_heads], turned[:, self.num_heads :], v

    def split(self, layer: int, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One product `[n, (H + 2 Kv) * d]` -> queries and keys, normed and rotated, and values, in the dtype of `cos`."""
        mixed = mixed.view(len(mixed), -1, self.head_dim)
        attention = self.layers[layer].self_attn
        if hasattr(attention, "q_norm"):
            q, k, v = mixed.to(cos.dtype).split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
            mixed = torch.cat((self.norm(attention.q_norm, q), self.norm(attention.k_norm, k), v), 1)
        turned = compiled.heads if compiled.turns(mixed, cos) else heads
        return turned(mixed, cos, sin, queries=self.num_heads, kv=self.num_kv_heads)

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: `x [n, D]` that entered it and `attended [n, H * d]` -> `[n, D]` that leaves it."""
        block = self.layers[layer]
        mlp, norm, out = block.mlp, block.post_attention_layernorm, block.self_attn.o_proj
        if type(out) is not nn.Linear:
            attended = attended.to(x.dtype)
        sides = (mlp.gate_proj, mlp.up_proj)
        if self.by_kernel(x, norm):
            kind = self._read_as(sides, x)
            normed, x = compiled.add_norm(x, self._raw(out, attended), norm.weight, norm.variance_epsilon, kind=kind)
        else:
            x = x + self.apply(out, attended)
            normed = self.norm(norm, x, read_by=sides)
        wide = self._together(normed, sides) if self.silu else None
        if wide is None:
            inner = mlp.act_fn(self.apply(mlp.gate_proj, normed)) * self.apply(mlp.up_proj, normed)
        else:
            inner = compiled.swiglu(wide) if compiled.suits(wide) else swiglu(wide)
            inner = inner if type(mlp.down_proj) is nn.Linear else inner.to(x.dtype)
        return x + self.apply(mlp.down_proj, inner)

    def by_kernel(self, x: Tensor, norm: Any) -> bool:
        """Do compiled kernels norm this?  In a quick precision, float32 on a CPU thread, a norm of Llama's kind."""
        wide = x.dtype == norm.weight.dtype == torch.float32
        return wide and self.linear is not exact and not self.offset_norm and compiled.suits(x)

    def _read_as(self, modules: Sequence[Any], x: Tensor) -> torch.dtype:
        """What linear layers read `x` as: bfloat16 where that is what their products take."""
        return torch.bfloat16 if self.linear is bf16 and all(type(module) is nn.Linear for module in modules) else x.dtype

    def _raw(self, module: Any, x: Tensor) -> Tensor:
        """A linear layer as its product leaves it, which may be bfloat16."""
        if self.linear is bf16 and type(module) is nn.Linear and module.bias is None:
            return bf16_together(x, [module.weight])
        return self.apply(module, x)

    def _together(self, x: Tensor, modules: Sequence[Any]) -> Tensor | None:
        """Several linear layers in one product, or None where that would not be the same: LoRA, "exact", half precision."""
        together = self.together
        if together is None or not all(type(module) is nn.Linear for module in modules):
            return None
        if modules[0].weight.dtype not in (torch.float32, torch.float64):
            return None
        biases = [module.bias for module in modules if module.bias is not None]
        if biases and len(biases) < len(modules):
            return None
        out = together(x, [module.weight for module in modules])
        return out.to(x.dtype) + torch.cat(biases) if biases else out

    def final(self, x: Tensor) -> Tensor:
        """The last norm: `[n, D] -> [n, D]`."""
        return self.norm(self._model.norm, x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[n, D] -> [n, V]` in the model's dtype."""
        return self.apply(self._head, hidden)

    def norm(self, module: Any, x: Tensor, *, read_by: Sequence[Any] = ()) -> Tensor:
        """One of the model's norms, exact in float64 too.

        Args:
            module: The norm.
            x: `[..., D]`.
            read_by: The linear layers that alone read the result, which may then be of the dtype of their factors.
        """
        if self.offset_norm:
            return rms_norm_offset(x, module.weight, module.eps)
        if self.by_kernel(x, module):
            kind = self._read_as(read_by, x) if read_by else x.dtype
            flat = x.reshape(-1, x.shape[-1])
            return compiled.rms_norm(flat, module.weight, module.variance_epsilon, kind=kind).view(x.shape)
        return rms_norm(x, module.weight, module.variance_epsilon)

    def apply(self, module: Any, x: Tensor) -> Tensor:
        """One of the model's linear layers; a product of another precision reaches plain layers and plain LoRA."""
        if type(module) is nn.Linear:
            return self.linear(x, module.weight, module.bias)
        if self.linear is exact:
            return cast("Tensor", module(x))
        base: Any = getattr(module, "base_layer", None)
        plain_lora = type(base) is nn.Linear and hasattr(module, "lora_A") and not getattr(module, "lora_variant", None)
        if not plain_lora or module.merged:
            return cast("Tensor", module(x))
        out = self.linear(x, base.weight, base.bias)
        if module.disable_adapters:
            return out
        for name in module.active_adapters:
            if name in module.lora_A:
                down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
                out = out + up(down(dropout(x.to(down.weight.dtype)))).to(out.dtype) * module.scaling[name]
        return out


__all__ = ["FAMILIES", "Decoder", "causal_lm", "rms_norm", "rms_norm_offset", "rotate", "supports"]
