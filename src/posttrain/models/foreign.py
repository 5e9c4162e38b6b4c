"""The forward pass of any causal language model of transformers, on right-padded rows, behind the packed interface.

Axes: `N` real tokens, `B` rows, `t` tokens of the longest row, `T` width of the batch, `D` hidden width, `V`
vocabulary, `H` heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from posttrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from posttrain.layout import Layout


class ForeignTrunk:
    """A transformers model, run through its own code."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._plain_head: bool | None = None  # worked out at the first logits: are they just the head's product?

    @property
    def _prefix(self) -> str:
        return str(getattr(self._module, "base_model_prefix", ""))

    @property
    def _base(self) -> Any:
        """The model below the head: its output is the hidden state after the last norm."""
        base = getattr(self._module, self._prefix, None) if self._prefix else None
        if not isinstance(base, nn.Module):
            kind = type(self._module).__name__
            raise ConfigError(f"{kind} does not say where its trunk is (base_model_prefix); expected a transformers causal model")
        return base

    def run(self, layout: Layout, embeddings: Tensor | None, attention_layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states `[N, D]` after the last norm, and `[B, H, T, T]` of some layers, without gradients."""
        tight = replace(layout, width=layout.longest, plans={})
        real = tight.scatter(torch.ones_like(layout.tokens))  # [B, t]
        inputs: dict[str, Any] = {"attention_mask": real}
        takes = inspect.signature(self._base.forward).parameters
        for name, value in layout.extra.items():
            if name not in takes:
                kind = type(self._module).__name__
                raise ConfigError(f"{kind} takes no input '{name}'{nearest(name, takes)}")
            inputs[name] = tight.scatter(value)
        if "position_ids" in takes:
            inputs["position_ids"] = tight.scatter(layout.positions)
        if embeddings is None:
            inputs["input_ids"] = tight.scatter(layout.tokens)
        else:
            inputs["inputs_embeds"] = tight.scatter(embeddings)
        hidden: Tensor = self._base(**inputs, use_cache=False)[0]  # [B, t, D]
        found = self._attention(layout, inputs, attention_layers) if attention_layers else {}
        return tight.gather(hidden), found

    @torch.no_grad()
    def _attention(self, layout: Layout, inputs: dict[str, Any], layers: Sequence[int]) -> dict[int, Tensor]:
        with self._eager():
            maps = self._base(**inputs, use_cache=False, output_attentions=True).attentions
        if not maps or any(x is None for x in maps):
            raise ConfigError(f"{type(self._module).__name__} gives no attention probabilities")
        at = torch.arange(layout.width, device=layout.tokens.device)
        real = at[None, :] < layout.lengths[:, None]  # [B, T]
        both = (real[:, :, None] & real[:, None, :])[:, None]  # [B, 1, T, T]
        grow = layout.width - layout.longest
        found = {layer: pad(maps[layer], (0, grow, 0, grow)) for layer in layers}
        wide = torch.promote_types(maps[0].dtype, torch.float32)
        return {layer: x.to(wide).masked_fill(~both, 0.0) for layer, x in found.items()}

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """Attention kernels that return what they attended to."""
        before = self._module.config._attn_implementation
        self._module.set_attn_implementation("eager")
        try:
            yield
        finally:
            self._module.set_attn_implementation(before)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[n, D] -> [n, V]`, with whatever the family does to them after the head (caps, scales)."""
        if self._plain_head is None:
            self._plain_head = self._is_plain(hidden.detach()[:1])
        if self._plain_head:
            out: Tensor = self._module.get_output_embeddings()(hidden)
            return out
        return self._through(hidden)

    @torch.no_grad()
    def _is_plain(self, hidden: Tensor) -> bool:
        head = self._module.get_output_embeddings()
        try:
            whole = self._through(hidden)
        except Exception as cause:
            kind = type(self._module).__name__
            raise ConfigError(f"the head of {kind} cannot be run apart from its trunk: {cause}") from cause
        return head is not None and torch.equal(head(hidden), whole)

    def _through(self, hidden: Tensor) -> Tensor:
        """The model's own forward with its trunk replaced by hidden states that are already known."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        base = self._base
        known = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])
        self._module._modules[self._prefix] = _Known(known)
        try:
            tokens = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            out: Tensor = self._module(input_ids=tokens, use_cache=False).logits[0]  # [n, V]
        finally:
            self._module._modules[self._prefix] = base
        return out


class _Known(nn.Module):
    """Stands where a trunk stood, and returns what is already known."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The known output, whatever is asked."""
        return self.output


__all__ = ["ForeignTrunk"]
