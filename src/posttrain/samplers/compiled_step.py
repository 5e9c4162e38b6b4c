"""A decoding step whose small operations are compiled: four products and four calls a layer.

The same cache, the same products and the same arithmetic as `CachedStepper`, whose prefill it keeps; every row reads as many
columns as it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.compiled import THREADS, kernels
from posttrain.samplers.cache import CachedStepper
from posttrain.samplers.draw import Drawn, draw
from posttrain.samplers.products import fusible
from posttrain.types import Sampling

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel

QUERIES = 4
"""Query heads that `attend` of decoding.c takes at a time."""
LARGEST = 128 * 4096
"""Tokens of the largest vocabulary that `draw` of decoding.c holds."""


class CompiledStepper(CachedStepper):
    """See `CachedStepper`; for models that `can_step`."""

    def __init__(self, model: LanguageModel, *, slots: int, longest: int, columns: int) -> None:
        super().__init__(model, slots=slots, longest=longest, columns=columns)
        found = kernels()
        assert found is not None
        assert self._pieces.fused is not None
        self._kernels, self._fused = found, self._pieces.fused
        self._cos, self._sin = self._cos.contiguous(), self._sin.contiguous()
        before, after = zip(*(layer.norms for layer in self._fused), strict=True)
        self._before, self._after = [*before, self._decoder.final_norm], list(after)
        self._head_norms = [layer.head_norms for layer in self._fused]
        self._narrow = model.precision == "bf16"
        kind = torch.bfloat16 if self._narrow else torch.float32  # of what products get
        inner, width = max(layer.inner for layer in self._fused), self._decoder.hidden_size
        self._scratch = torch.empty(max(2 * inner, width, QUERIES * self._limit))
        self._normed = torch.empty(slots, width, dtype=kind)
        self._attended = torch.empty(slots, self._decoder.num_heads * self._width, dtype=kind)
        self._inner = torch.empty(slots, inner, dtype=kind)
        self._weights = torch.empty(0)

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """See `Stepper.step`."""
        rows = tokens.shape[0]
        if longest > self._columns:
            self._grow(longest)
        x = self._decoder.embed(tokens)  # [B, D]
        normed = self._add_norm(x, None, *self._before[0])
        for number, layer in enumerate(self._fused):
            y = layer.out(self._attend(layer.mix(normed), positions, number))
            normed = self._add_norm(x, y, *self._after[number])
            wide = layer.wide(normed)  # [B, 2 I]
            self._kernels.swiglu(
                wide.data_ptr(), wide.dtype == torch.bfloat16, self._inner.data_ptr(), self._narrow, rows, layer.inner,
                self._scratch.data_ptr(),
            )  # fmt: skip
            normed = self._add_norm(x, layer.down(self._inner[:rows]), *self._before[number + 1])
        return self._pieces.head(normed)

    def draw(self, logits: Tensor, uniforms: Tensor | None, sampling: Sampling) -> Drawn:
        """See `draw.draw`, whose results these are to rounding."""
        rows, vocabulary = logits.shape
        if uniforms is None or sampling.truncated or vocabulary > LARGEST:
            return draw(logits, uniforms, sampling)
        tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        if self._weights.numel() < vocabulary:
            self._weights = torch.empty(vocabulary)
        logits, uniforms = logits.contiguous(), uniforms.contiguous()
        self._kernels.draw(
            logits.data_ptr(), uniforms.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(), rows, vocabulary,
            sampling.temperature, self._weights.data_ptr(),
        )  # fmt: skip
        return Drawn(tokens, logprobs, logprobs)

    def _add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add `y` to the residual stream, and norm it: `[B, D]`."""
        rows, width = x.shape
        self._kernels.add_norm(
            x.data_ptr(), None if y is None else y.data_ptr(), y is not None and y.dtype == torch.bfloat16, weight.data_ptr(),
            self._normed.data_ptr(), self._narrow, rows, width, eps, self._scratch.data_ptr(),
        )  # fmt: skip
        return self._normed[:rows]

    def _attend(self, mixed: Tensor, positions: Tensor, number: int) -> Tensor:
        """Keys and values into the cache, and what each query finds there: `[B, H * d]`."""
        rows, (query, key, eps) = mixed.shape[0], self._head_norms[number]
        self._kernels.attend(
            mixed.data_ptr(), mixed.dtype == torch.bfloat16, self._cos.data_ptr(), self._sin.data_ptr(), positions.data_ptr(),
            self._keys[number].data_ptr(), self._values[number].data_ptr(), self._value_dtype == torch.bfloat16,
            self._attended.data_ptr(), self._narrow,
            None if query is None else query.data_ptr(), None if key is None else key.data_ptr(), eps,
            rows, self._kv, self._heads, self._width, self._columns, self._decoder.scale, self._windows[number] or 0,
            self._scratch.data_ptr(),
        )  # fmt: skip
        return self._attended[:rows]


def can_step(model: LanguageModel) -> bool:
    """Can this model's steps be compiled?  Llama's kind of layer in float32 on a CPU, in a quick precision, without LoRA.

    The functions run on one thread: where torch has many, its own operations are quicker.
    """
    decoder = model.decoder
    if torch.get_num_threads() > THREADS:
        return False
    if decoder is None or model.precision == "exact" or model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    plain = decoder.silu and not decoder.offset_norm and decoder.head_dim % 16 == 0 and decoder.head_dim <= 256
    return plain and fusible(model) and kernels() is not None


__all__ = ["CompiledStepper", "can_step"]
