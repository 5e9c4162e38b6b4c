"""How a model takes one step for many rows: with a static key-value cache, or by reading every row again.

The cache is preallocated and left-aligned: the key of a row's token p stands in column p.  Keys are stored transposed,
so that scores and sums over values are two plain batched products, and the query heads that share a key head are its
rows.  Only as many columns are read as the longest live row has.  Where products have bfloat16 factors, values are kept in
bfloat16, as the trainer multiplies them; keys too on a CUDA device, whose trainer multiplies them so.  Scores and their softmax
stay in float32.

Axes: `S` slots, `B` slots in use (always the first), `H` query heads, `Kv` key and value heads, `Q = H / Kv`, `d` head
width, `C` allocated columns, `c` columns that are read, `n` tokens of a prompt, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from posttrain.layout import Layout
from posttrain.models.attention import attend
from posttrain.samplers.products import pieces

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel

COLUMNS = 32
"""Columns are read and allocated in multiples of this."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that was read: what its continuations start from."""

    tokens: tuple[int, ...]  # [n]
    logits: Tensor  # [V] float, of the token that follows
    keys: tuple[Tensor, ...] = ()  # [Kv, d, n] a layer
    values: tuple[Tensor, ...] = ()  # [Kv, n, d] a layer


class Stepper(Protocol):
    """A model with a memory of `S` rows."""

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        """Read prompts, all in one pass."""
        ...

    def admit(self, slots: Tensor, prefix: Prefix) -> None:
        """Let the rows of `slots` [m] begin with this prompt; its keys and values are copied once for all of them."""
        ...

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the memory (at most `length` tokens) of rows `source` [m] to rows `target` [m]."""
        ...

    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Feed one token to each of the first B rows.

        Args:
            tokens: `[B]` int64.
            positions: `[B]` int64, place of the token in its row.
            longest: `positions.max() + 1`.

        Returns:
            `[B, V]` float logits of the token after.
        """
        ...


def rounded(columns: int) -> int:
    """The next multiple of `COLUMNS`."""
    return -(-columns // COLUMNS) * COLUMNS


def kept_as(model: LanguageModel) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the keys and of the values in the cache; on a CPU nothing is rounded that the trainer does not round."""
    assert model.decoder is not None
    if model.precision != "bf16":
        return model.dtype, model.dtype
    if model.device.type == "cuda":
        return torch.bfloat16, torch.bfloat16
    return model.dtype, model.dtype if model.decoder.biased_values else torch.bfloat16


class _Layer(NamedTuple):
    """What one layer needs in a step: its functions bound, its buffers cut for `B` rows and `c` columns."""

    qkv: Callable[..., tuple[Tensor, Tensor, Tensor]]
    finish: Callable[..., Tensor]
    flat_keys: Tensor  # [S * Kv * d * C] the keys' bits
    flat_values: Tensor  # [S * Kv * C, d] the values' bits
    keys: Tensor  # [B * Kv, d, c]
    values: Tensor  # [B * Kv, c, d]
    mask: Tensor  # [B * Kv, 1, c], 0 where a row may look, -inf elsewhere


class CachedStepper:
    """Steps a model that has a `Decoder` with a static cache.

    Args:
        model: Its weights must stay as they are for as long as this lives.
        slots: S.
        longest: Tokens of the longest row that will occur.
        columns: Columns to allocate and read from the start; they grow by a quarter when a row needs more.
        fixed: Always read all allocated columns, so that no row's arithmetic depends on the length of another.
    """

    def __init__(self, model: LanguageModel, *, slots: int, longest: int, columns: int, fixed: bool = False) -> None:
        decoder, device = model.decoder, model.device
        assert decoder is not None
        self._precision = model.precision
        self._decoder, self._pieces, self._slots, self._fixed = decoder, pieces(model), slots, fixed
        self._limit = rounded(longest)
        self._kv, self._width = decoder.num_kv_heads, decoder.head_dim
        self._heads = decoder.num_heads // decoder.num_kv_heads
        self._dtype, self._device = model.dtype, device
        self._key_dtype, self._value_dtype = kept_as(model)
        self._cos, self._sin = decoder.rope_table(self._limit)  # [C, d]
        self._windows = [decoder.window(layer) for layer in range(decoder.num_layers)]
        self._keys: list[Tensor] = []  # [S * Kv, d, C] a layer
        self._values: list[Tensor] = []  # [S * Kv, C, d] a layer
        self._masks: dict[int | None, Tensor] = {}  # [S * Kv, 1, C] by window
        self._columns = 0
        self._cut: tuple[int, int]
        self._layers: list[_Layer]
        self._grow(columns)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _grow(self, columns: int) -> None:
        """Allocate at least `columns` columns and keep what is there; ordinary tensors, also from inside `step`."""
        old, new = self._columns, min(self._limit, rounded(max(columns, self._columns * 5 // 4)))
        rows, dtype, device = self._slots * self._kv, self._dtype, self._device
        for layer in range(self._decoder.num_layers):
            # zeros: a masked column must be finite
            keys = torch.zeros(rows, self._width, new, dtype=self._key_dtype, device=device)
            values = torch.zeros(rows, new, self._width, dtype=self._value_dtype, device=device)
            if old:
                keys[:, :, :old] = self._keys[layer]
                values[:, :old] = self._values[layer]
                self._keys[layer], self._values[layer] = keys, values
            else:
                self._keys.append(keys)
                self._values.append(values)
        for window in set(self._windows) | {None}:
            mask = torch.full((rows, 1, new), float("-inf"), dtype=dtype, device=device)
            if old:
                mask[:, :, :old] = self._masks[window]
            self._masks[window] = mask
        self._columns, self._cut, self._layers = new, (0, 0), []  # the old buffers go
        row = torch.arange(rows, device=self._device)
        self._value_start = row.view(self._slots, self._kv) * new  # [S, Kv], flat place of column 0
        depth = torch.arange(self._width, device=self._device)
        self._key_start = (row[:, None] * self._width + depth).view(self._slots, -1) * new  # [S, Kv * d]
        self._places = torch.arange(new, device=self._device)

    def _arrange(self, rows: int, columns: int) -> None:
        """Cut every buffer for `rows` slots and `columns` columns; done again only when one of them changes."""
        if self._cut == (rows, columns):
            return
        used = rows * self._kv
        self._cut = (rows, columns)
        self._layers = [
            _Layer(
                self._pieces.qkv[layer],
                self._pieces.finish[layer],
                _bits(self._keys[layer].view(-1)),
                _bits(self._values[layer].view(-1, self._width)),
                self._keys[layer][:used, :, :columns],
                self._values[layer][:used, :columns],
                self._masks[self._windows[layer]][:used, :, :columns],
            )
            for layer in range(self._decoder.num_layers)
        ]

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """See `Stepper.step`."""
        if longest > self._columns:
            self._grow(longest)
        self._arrange(tokens.shape[0], self._columns if self._fixed else rounded(longest))
        return self._read(tokens, positions)

    def _read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The step itself, with the buffers as they are cut: nothing on the host depends on what a tensor holds."""
        rows, decoder, scale = tokens.shape[0], self._decoder, self._decoder.scale
        place = positions[:, None]  # [B, 1]
        value_at = (self._value_start[:rows] + place).view(-1)  # [B * Kv]
        key_at = (self._key_start[:rows] + place).view(-1)  # [B * Kv * d]
        self._show(rows, value_at, place)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        shape, flat = (rows * self._kv, self._heads, self._width), (rows, self._heads * self._kv * self._width)
        x = decoder.embed(tokens)
        for layer in self._layers:
            q, k, v = layer.qkv(x, cos, sin)
            layer.flat_keys.scatter_(0, key_at, _bits(k.reshape(-1).to(self._key_dtype)))
            layer.flat_values.index_copy_(0, value_at, _bits(v.reshape(-1, self._width).to(self._value_dtype)))
            scores = _scores(q.reshape(shape), layer.keys, layer.mask, scale)  # [B * Kv, Q, c]
            attended = torch.bmm(scores.softmax(-1).to(self._value_dtype), layer.values)  # [B * Kv, Q, d]
            x = layer.finish(x, attended.view(flat))
        return _wide(self._pieces.head(decoder.final(x)))

    def _show(self, rows: int, value_at: Tensor, place: Tensor) -> None:
        """Let every row look at its new token, and no longer at what has left its window."""
        self._masks[None].view(-1).index_fill_(0, value_at, 0.0)
        for window, mask in self._masks.items():
            if window is not None:
                far = (self._places <= place - window) | (self._places > place)  # [B, C]
                own = mask.new_zeros(far.shape).masked_fill_(far, float("-inf"))
                mask.view(self._slots, self._kv, -1)[:rows] = own[:, None]

    def admit(self, slots: Tensor, prefix: Prefix) -> None:
        """See `Stepper.admit`."""
        length = len(prefix.tokens)
        if length > self._columns:
            self._grow(length + COLUMNS)
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self._by_slot(self._keys[layer])[slots, :, :, :length] = keys
            self._by_slot(self._values[layer])[slots, :, :length] = values
        mask = self._by_slot(self._masks[None])  # [S, Kv, 1, C]; the windows' masks are written anew in every step
        mask[slots] = float("-inf")
        mask[slots, :, :, :length] = 0.0

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """See `Stepper.move`."""
        length = min(length, self._columns)
        for layer in range(self._decoder.num_layers):
            keys, values = self._by_slot(self._keys[layer]), self._by_slot(self._values[layer])
            keys[target, :, :, :length] = keys[source, :, :, :length]
            values[target, :, :length] = values[source, :, :length]
        mask = self._by_slot(self._masks[None])
        mask[target] = mask[source]

    def _by_slot(self, buffer: Tensor) -> Tensor:
        """`[S * Kv, ...] -> [S, Kv, ...]`, a view."""
        return buffer.view(self._slots, self._kv, *buffer.shape[1:])

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        """See `Stepper.prefill`: the rows lie one after another, and the last layer ends with each row's last token."""
        decoder, layout = self._decoder, Layout.of_rows(prompts, device=self._device)
        cos, sin = self._cos.index_select(0, layout.positions), self._sin.index_select(0, layout.positions)
        last, sizes = layout.starts[1:] - 1, list(layout.sizes)  # [P]
        keys: list[list[Tensor]] = [[] for _ in prompts]
        values: list[list[Tensor]] = [[] for _ in prompts]
        x = decoder.embed(layout.tokens)  # [N, D]
        for layer in range(decoder.num_layers):
            q, k, v = self._pieces.qkv[layer](x, cos, sin)
            if self._key_dtype != q.dtype:  # as the trainer: the kernel for packed rows on a GPU wants half precision
                q, k, v = (each.to(self._key_dtype) for each in (q, k, v))
            window = self._windows[layer]
            attended = attend(q, k, v, layout, scale=decoder.scale, window=window, precision=self._precision)
            for row, (own_k, own_v) in enumerate(zip(torch.split(k, sizes), torch.split(v, sizes), strict=True)):
                keys[row].append(own_k.permute(1, 2, 0).to(self._key_dtype))  # [n, Kv, d] -> [Kv, d, n]
                values[row].append(own_v.permute(1, 0, 2).to(self._value_dtype))
            if layer == decoder.num_layers - 1:
                x, attended = x.index_select(0, last), attended.index_select(0, last)
            x = self._pieces.finish[layer](x, attended)
        logits = _wide(self._pieces.head(decoder.final(x)))  # [P, V]
        rows = zip(prompts, logits, keys, values, strict=True)
        return [Prefix(tokens, own, tuple(k), tuple(v)) for tokens, own, k, v in rows]


class RereadingStepper:
    """Steps any language model by reading every row again from its first token: slow, and right for every architecture.

    Args:
        model: Its `trunk` and `logits` are used.
        slots: S.
        longest: Tokens of the longest row that will occur.
        alone: One pass a row, so that no row's arithmetic depends on another.
    """

    def __init__(self, model: LanguageModel, *, slots: int, longest: int, alone: bool = False) -> None:
        self._model, self._alone = model, alone
        self._rows = torch.zeros(slots, longest, dtype=torch.int64, device=model.device)

    def _read(self, layout: Layout) -> Tensor:
        hidden = self._model.trunk(layout).hidden  # [N, D]
        return _wide(self._model.logits(hidden.index_select(0, layout.starts[1:] - 1)))

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        """See `Stepper.prefill`."""
        logits = self._read(Layout.of_rows(prompts, device=self._rows.device))
        return [Prefix(tokens, own) for tokens, own in zip(prompts, logits, strict=True)]

    def admit(self, slots: Tensor, prefix: Prefix) -> None:
        """See `Stepper.admit`."""
        self._rows[slots, : len(prefix.tokens)] = torch.tensor(prefix.tokens, device=self._rows.device)

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """See `Stepper.move`."""
        self._rows[target] = self._rows[source]

    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """See `Stepper.step`."""
        count = tokens.shape[0]
        self._rows[torch.arange(count, device=tokens.device), positions] = tokens
        real = torch.arange(longest, device=tokens.device) <= positions[:, None]  # [B, T]
        lengths = (positions + 1).tolist()
        if self._alone:
            rows = [self._rows[row, :length] for row, length in enumerate(lengths)]
            return torch.cat([self._read(Layout.of(row, [len(row)])) for row in rows])
        return self._read(Layout.of(self._rows[:count, :longest][real], lengths))


def _bits(x: Tensor) -> Tensor:
    """The bits of bfloat16 as integers, which torch scatters in place: of bfloat16 itself it copies the whole buffer."""
    return x.view(torch.int16) if x.element_size() == 2 else x


def _scores(q: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`scale * q @ keys + mask`, in the dtype of `q` where keys are kept in bfloat16 too: `[b, Q, d], [b, d, c] -> [b, Q, c]`."""
    if keys.dtype == q.dtype:
        return torch.baddbmm(mask, q, keys, alpha=scale)
    narrow = q.to(keys.dtype)
    if keys.is_cuda:  # bfloat16 factors, float32 sums, which are not rounded
        scores = torch.bmm(narrow, keys, out_dtype=torch.float32)
    else:  # the same arithmetic without that kernel
        scores = torch.bmm(narrow.to(q.dtype), keys.to(q.dtype))
    return scores.mul_(scale).add_(mask)


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32, or float64 where they are."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


__all__ = ["CachedStepper", "Prefix", "RereadingStepper", "Stepper", "rounded"]
