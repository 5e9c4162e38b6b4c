"""A language model as the rest of the library sees it: packed tokens in, hidden states out, logits where wanted.

Axes: `N` real tokens of a batch (packed), `n` some of them, `B` rows, `T` width of the batch, `D` hidden width, `V`
vocabulary, `H` query heads.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.errors import CheckpointError, ConfigError, nearest
from posttrain.models import compiled, varlen
from posttrain.models.attention import attend, probabilities
from posttrain.models.decoder import Decoder, causal_lm, supports
from posttrain.models.foreign import ForeignTrunk
from posttrain.models.gemm import TOGETHER, Precision, linear_of, settle
from posttrain.models.heads import ScalarHead, reward_head, value_head
from posttrain.models.torch_compile import CompiledLayers

if TYPE_CHECKING:
    from posttrain.layout import Layout


@dataclass(frozen=True)
class Trunk:
    """What one pass through the layers gives."""

    hidden: Tensor  # [N, D] after the last norm
    attention: dict[int, Tensor] = field(default_factory=dict)  # [B, H, T, T] by the layer number that was asked for


class LanguageModel:
    """A causal language model, its extra heads, and how its forward pass is run.

    Llama, Mistral, Qwen2, Qwen3 and Gemma run packed through their own `Decoder`; every other causal model runs
    through its transformers trunk on padded rows, with the same interface and results.  Dropout is off unless
    `dropout(True)` asks for it.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = "",
        heads: nn.ModuleDict | None = None,
        precision: Precision = "exact",
        checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        """Wrap a transformers model.

        Args:
            module: A transformers causal language model, or a PEFT model around one; it is used by reference.
            name: What to call it in reports and adapter folders: the name or folder it was loaded from.
            heads: Extra heads by name.
            precision: How its matrix products are computed; see `gemm`.
            checkpointing: Keep only each layer's input for the backward pass, and recompute the rest.
            compile: Run the halves of a layer as graphs of `torch.compile`, in precisions "fast" and "bf16"; see `torch_compile`.

        Raises:
            ConfigError: `compile` was asked of a model that it does not do: LoRA, 4 bits, a gate of another kind.
        """
        self.module = module
        self.name = name
        self.heads = heads if heads is not None else nn.ModuleDict()
        self.decoder: Decoder | None = Decoder(module) if supports(module) else None
        self.foreign = ForeignTrunk(causal_lm(module))
        self._embedding: nn.Module = cast("Any", causal_lm(module)).get_input_embeddings()
        self.checkpointing = checkpointing
        self.precision: Precision = "exact"
        self.use_precision(precision)
        self.use_compile(compile)
        for option, on in (("checkpointing", checkpointing), ("compile", compile)):
            if on and self.decoder is None:
                name = type(causal_lm(module)).__name__
                warnings.warn(f"{option} has no effect on {name}: its trunk is not our own", stacklevel=2)
        self.heads.to(self.device)
        self.dropout(False)

    # ---------------------------------------------------------------------------------------------- what it is

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return causal_lm(self.module).config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return cast("Tensor", self._embedding.weight).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast("Tensor", self._embedding.weight).device

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        return int(self.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return int(self.config.num_hidden_layers)

    @property
    def has_adapters(self) -> bool:
        """Does it carry LoRA adapters?"""
        return hasattr(self.module, "disable_adapter")

    @property
    def num_parameters(self) -> int:
        """The number of weights, trained or not, tied ones once, extra heads included."""
        return sum(value.numel() for part in (self.module, self.heads) for value in part.parameters())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights and saved buffers by name, tied ones once, extra heads last as `heads.<head>.<part>`."""
        yield from self.module.named_parameters()
        saved = self.module.state_dict(keep_vars=True)
        yield from ((name, buffer) for name, buffer in self.module.named_buffers() if name in saved)
        yield from ((f"heads.{name}", value) for name, value in self.heads.named_parameters())

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable weights by name, extra heads included."""
        own, heads = self.module.named_parameters(), self.heads.named_parameters(prefix="heads")
        return {name: weight for part in (own, heads) for name, weight in part if weight.requires_grad}

    def fingerprint(self) -> str:
        """The sha256 of all weights with their names, dtypes and shapes, in hexadecimal."""
        digest = hashlib.sha256()
        for name, value in sorted(self.weights(), key=lambda item: item[0]):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # ---------------------------------------------------------------------------------------------- what it does

    def embed(self, tokens: Tensor) -> Tensor:
        """The embedding, scaled where the family scales: `[...] int64 -> [..., D]`."""
        return cast("Tensor", self._embedding(tokens))

    def trunk(self, layout: Layout, *, embeddings: Tensor | None = None, attention_layers: Sequence[int] = ()) -> Trunk:
        """One pass through all layers.

        Args:
            layout: The rows.
            embeddings: `[N, D]` in place of `embed(layout.tokens)`.
            attention_layers: Layers whose attention is wanted as numbers, without gradients; negative counts from the
                end.

        Returns:
            Hidden states `[N, D]` after the last norm, and `[B, H, T, T]` a layer.
        """
        wanted = {layer: self._layer(layer) for layer in attention_layers}
        if self.decoder is None or layout.extra:
            hidden, found = self.foreign.run(layout, embeddings, sorted(set(wanted.values())))
        else:
            x = self.decoder.embed(layout.tokens) if embeddings is None else embeddings
            hidden, found = self._own_trunk(self.decoder, layout, x, set(wanted.values()))
        return Trunk(hidden, {asked: found[layer] for asked, layer in wanted.items()})

    def _own_trunk(self, decoder: Decoder, layout: Layout, x: Tensor, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        cos, sin = decoder.rope(layout.positions)
        found: dict[int, Tensor] = {}
        kind, layers = self._attends_in, self._compiled_layers if self.compiles else None

        def block(layer: int, x: Tensor) -> Tensor:
            if layers is not None:
                q, k, v = layers.qkv(layer, x, cos, sin, kind=kind)
            else:
                q, k, v = (each.to(kind) for each in decoder.qkv(layer, x, cos, sin))
            window = decoder.window(layer)
            attended = attend(q, k, v, layout, scale=decoder.scale, window=window, precision=self.precision)
            return (layers or decoder).finish(layer, x, attended)

        for layer in range(decoder.num_layers):
            if layer in wanted:
                with torch.no_grad():
                    q, k, _ = decoder.qkv(layer, x, cos, sin)
                    found[layer] = probabilities(q, k, layout, scale=decoder.scale, window=decoder.window(layer))
            if self.checkpointing and torch.is_grad_enabled():
                x = cast("Tensor", checkpoint(block, layer, x, use_reentrant=False))
            else:
                x = block(layer, x)
        return decoder.final(x), found

    def _layer(self, layer: int) -> int:
        if not -self.num_layers <= layer < self.num_layers:
            raise ConfigError(f"layer {layer} was asked for; this model has layers 0 to {self.num_layers - 1} (or negative)")
        return layer % self.num_layers

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, D] -> [n, V]`, in float32 at least."""
        raw = self.foreign.head(hidden) if self.decoder is None else self.decoder.head(hidden)
        return raw if raw.dtype == torch.float64 else raw.float()

    def add_value_head(self) -> ScalarHead:
        """The critic's head unless it is there: a reward model's own where it is one, else zero.  Maps hidden `[n, D]` to `[n]`."""
        head = value_head(self.hidden_size)
        if "value" not in self.heads and "reward" in self.heads:
            head.load_state_dict(self.heads["reward"].state_dict())
        return self._add("value", head)

    def add_reward_head(self, *, seed: int = 0) -> ScalarHead:
        """The reward model's head, made from `seed` unless it is there; `heads["reward"](hidden [n, D]) -> [n]`."""
        return self._add("reward", reward_head(self.hidden_size, seed=seed))

    def _add(self, name: str, head: ScalarHead) -> ScalarHead:
        if name not in self.heads:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            self.heads[name] = head.to(device=self.device, dtype=wide)
        return cast("ScalarHead", self.heads[name])

    # ---------------------------------------------------------------------------------------------- how it is run

    def dropout(self, on: bool) -> None:
        """Turn dropout on or off: that of LoRA, and of trunks that are not our own."""
        self.module.train(on)

    def use_precision(self, precision: Precision) -> None:
        """Compute the matrix products in another way from now on: "exact", "fast" or "bf16"; see `gemm`.

        Raises:
            ConfigError: The model runs through a trunk that is not our own, or "bf16" was asked of weights in half
                precision.
        """
        linear = linear_of(precision)
        if precision != "exact" and self.decoder is None:
            raise ConfigError(
                f"precision '{precision}' needs our own forward; {type(causal_lm(self.module)).__name__} has 'exact' only"
            )
        if precision == "bf16" and self.dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"precision 'bf16' keeps float32 master weights; these are {self.dtype}: use 'exact'")
        self.precision = precision
        if self.decoder is not None:
            self.decoder.linear, self.decoder.together = linear, TOGETHER.get(precision)

    def use_compile(self, on: bool) -> None:
        """Run the layers as graphs of `torch.compile` from now on, or no longer; "exact" and trunks of others have none.

        Raises:
            ConfigError: This model has layers that the graphs do not compute.
        """
        self._compiled_layers = CompiledLayers(self.decoder) if on and self.decoder is not None else None
        self.compile = self._compiled_layers is not None

    @property
    def compiles(self) -> bool:
        """Do graphs of `torch.compile` run its layers?"""
        return self.compile and self.precision != "exact"

    @property
    def compiled(self) -> bool:
        """Do compiled kernels stand between its matrix products?"""
        plain = self.decoder is not None and self.precision != "exact" and self.dtype == torch.float32
        return plain and self.device.type == "cpu" and compiled.suits()

    @property
    def _attends_in(self) -> torch.dtype:
        """The dtype of queries, keys and values: the kernel for packed rows, on a GPU, wants half precision."""
        return torch.bfloat16 if self.precision == "bf16" and self.device.type == "cuda" else self.dtype

    @property
    def shares(self) -> bool:
        """Can rows that begin alike stand behind that beginning: on a CPU, and where the kernel for packed rows takes them?"""
        if self.decoder is None or self.device.type == "cpu":
            return self.decoder is not None
        kernel = varlen.kernel_for(self.device, self._attends_in, self.decoder.head_dim)
        return kernel is not None and varlen.sees_fronts(kernel, self.device, self._attends_in)

    def use_quickest(self) -> None:
        """Compute float32 on the back end that a probe finds quickest here: for a model that only writes and is evaluated."""
        if self.decoder is not None and self.device.type == "cpu" and self.dtype == torch.float32:
            self.use_precision(settle("fast")[0])

    @contextmanager
    def adapters_off(self) -> Iterator[LanguageModel]:
        """Inside, the model computes as if it had no LoRA adapters: a reference that costs no memory.

        Raises:
            ConfigError: It has none, so that inside and outside would be the same.
        """
        if not self.has_adapters:
            raise ConfigError("this model has no LoRA adapters to turn off; load it with lora=Lora(), or load a second model")
        module: Any = self.module
        with module.disable_adapter():
            yield self

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors over weights of the same names (of `weights()`), in place; what is not named stays.

        Raises:
            CheckpointError: A name or a shape is not this model's.
        """
        own = dict(self.weights())
        for name, value in tensors.items():
            if name not in own:
                raise CheckpointError(f"this model has no weight '{name}'{nearest(name, list(own)[:2000])}")
            if own[name].shape != value.shape:
                raise CheckpointError(f"'{name}' has shape {tuple(value.shape)}; this model's has {tuple(own[name].shape)}")
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)

    def frozen_copy(self) -> LanguageModel:
        """A copy with its own weights, of which none is trained: a reference model."""
        twin = replace_module(self, copy.deepcopy(self.module), copy.deepcopy(self.heads))
        twin.module.requires_grad_(False)
        twin.heads.requires_grad_(False)
        return twin


def replace_module(model: LanguageModel, module: nn.Module, heads: nn.ModuleDict) -> LanguageModel:
    """The same way of running, on another module and heads."""
    how = {"checkpointing": model.checkpointing, "compile": model.compile}
    return LanguageModel(module, name=model.name, heads=heads, precision=model.precision, **how)


__all__ = ["LanguageModel", "Trunk", "replace_module"]
