"""One forward a view: packed trunk, then every reading of that view from one chunked pass through the head.

The `[N, V]` matrix of logits never exists whole: trained tokens are taken in chunks of at most `chunk_bytes` of logits, and
a chunk is computed again in the backward pass.  Where all of them fit in one chunk nothing is computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.errors import ConfigError, nearest
from posttrain.layout import Layout, layout
from posttrain.prefixes import shared_layout
from posttrain.types import At, Batch, Read, Readings, View

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel

CHUNK_BYTES = 64 << 20
"""Bytes of logits that may exist at once on a CPU."""
GPU_CHUNK_BYTES = 1 << 30
"""The same on an accelerator: every chunk reads all of the head and adds to all of its gradient, and small ones do little else."""

BESIDE = "_hidden"
"""The reading under which a view keeps its hidden states for another view's `beside`."""


@dataclass(frozen=True)
class Trained:
    """Where the trained tokens of a batch stand: `[n]` each."""

    row: Tensor
    position: Tensor
    before: Tensor  # index into the packed `[N]` of the state that predicts the token
    shape: tuple[int, int]  # (B, T)

    @classmethod
    def of(cls, batch: Batch, lay: Layout) -> Trained:
        """The trained tokens of `batch`, in row order."""
        row, position = batch.mask.nonzero(as_tuple=True)
        return cls(row, position, lay.at(row, position - 1), (batch.num_rows, int(batch.tokens.shape[1])))

    def scatter(self, values: Tensor) -> Tensor:
        """`[n, ...] -> [B, T, ...]`, zero where nothing is trained."""
        out = values.new_zeros(*self.shape, *values.shape[1:])
        return out.index_put((self.row, self.position), values)

    def at(self, batch: Batch) -> At:
        """What a read's function is told of these tokens."""
        return At(
            target=batch.tokens[self.row, self.position],
            temperature=batch.temperature[self.row],
            row=self.row,
            position=self.position,
            index=batch.index[self.row],
            seed=batch.seed,
            step=batch.step,
        )


def _slice(at: At, part: slice) -> At:
    return At(
        target=at.target[part],
        temperature=at.temperature[part],
        row=at.row[part],
        position=at.position[part],
        index=at.index[part],
        seed=at.seed,
        step=at.step,
    )


def _head_reads(
    model: LanguageModel,
    hidden: Tensor,
    reads: list[Read],
    at: At,
    beside: Mapping[str, tuple[LanguageModel, Tensor]],
    chunk_bytes: int,
) -> list[Tensor]:
    """All logit reads of one view, `[n, ...]` each, from one pass over chunks of `hidden [n, D]`."""
    total = hidden.shape[0]
    width = model.vocab_size * max(4, hidden.element_size())
    size = max(1, chunk_bytes // width)
    others = sorted({read.beside for read in reads if read.beside})

    def chunk(states: Tensor, part: slice) -> tuple[Tensor, ...]:
        logits = model.logits(states)
        with torch.no_grad():
            wide = {name: beside[name][0].logits(beside[name][1][part]) for name in others}
        here = at if total <= size else _slice(at, part)
        return tuple(read.fn(logits, replace(here, beside=wide[read.beside]) if read.beside else here) for read in reads)

    if total <= size:
        return list(chunk(hidden, slice(0, total)))
    pieces: list[tuple[Tensor, ...]] = []
    for start in range(0, total, size):
        part = slice(start, min(total, start + size))
        if torch.is_grad_enabled() and hidden.requires_grad:
            pieces.append(checkpoint(chunk, hidden[part], part, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(chunk(hidden[part], part))
    return [torch.cat(values) for values in zip(*pieces, strict=True)]


def chunk_bytes_of(device: torch.device) -> int:
    """Bytes of logits that may exist at once on a device."""
    return CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES


def wanted_beside(views: Mapping[str, View]) -> set[str]:
    """Names of the views whose logits another view's reads look at."""
    return {read.beside for view in views.values() for read in view.reads if read.beside}


def _model(models: Mapping[str, LanguageModel], name: str) -> LanguageModel:
    if name not in models:
        raise ConfigError(f"a view reads model '{name}', which this run does not have{nearest(name, models)}")
    return models[name]


def read(
    models: Mapping[str, LanguageModel],
    batch: Batch,
    views: Mapping[str, View],
    *,
    given: Readings | None = None,
    keep: Collection[str] = (),
    chunk_bytes: int | None = None,
) -> Readings:
    """Read every view that `given` does not hold already.

    Args:
        models: The run's models by name.
        batch: The rows to read; readings are made for tokens in its mask.
        views: Forwards by name, in order; a later one may look at an earlier one's readings.
        given: Readings made before (views read once), for the same rows.
        keep: Views whose hidden states a later call will need `beside` another view's.
        chunk_bytes: Bytes of logits that may exist at once; None: what suits the device.

    Returns:
        `given` and the new readings; values are `[B, T, ...]` or `[B, ...]`.

    Raises:
        ConfigError: A view names a model, or a `beside`, that does not exist.
    """
    seen = given or Readings()
    wanted = wanted_beside(views) | set(keep)
    beside: dict[str, tuple[LanguageModel, Tensor]] = {}
    for name, view in views.items():
        model = _model(models, view.model)
        if name in seen and name not in wanted:
            continue
        source = view.inputs(batch, seen) if view.inputs else batch
        lay = _laid_out(source, shares=_shares(model, view))
        trained = Trained.of(source, lay)
        if name in seen:
            kept = getattr(getattr(seen, name), BESIDE)
            beside[name] = (model, kept[trained.row, trained.position])
            continue
        quiet = view.once or not view.grad
        with torch.no_grad() if quiet else contextlib.nullcontext():
            size = chunk_bytes or chunk_bytes_of(model.device)
            values = _read_view(model, source, view, lay, trained, seen, beside, size, keep=name in wanted)
        if name in wanted:
            beside[name] = (model, values[BESIDE][trained.row, trained.position].detach())
            if name not in keep:
                values.pop(BESIDE)
        seen = seen.plus(name, values)
    return seen


def _laid_out(batch: Batch, *, shares: bool) -> Layout:
    """The batch's tokens, with common beginnings once where that `shares` enough; worked out once for all views and updates."""
    found: Layout = batch.kept(("layout", shares), lambda: (shared_layout(batch) if shares else None) or layout(batch))
    return found


def _shares(model: LanguageModel, view: View) -> bool:
    """May rows that begin alike be read with that beginning once?  Not where a view looks at, or changes, whole rows."""
    whole = view.embeddings is not None or any(quantity.source == "attention" for quantity in view.reads)
    return model.shares and not whole


def _read_view(
    model: LanguageModel,
    batch: Batch,
    view: View,
    lay: Layout,
    trained: Trained,
    seen: Readings,
    beside: Mapping[str, tuple[LanguageModel, Tensor]],
    chunk_bytes: int,
    *,
    keep: bool,
) -> dict[str, Tensor]:
    """The readings of one view."""
    by_source: dict[str, list[Read]] = {}
    for quantity in view.reads:
        if quantity.beside and quantity.beside not in beside:
            raise ConfigError(
                f"read '{quantity.name}' stands beside view '{quantity.beside}', which is not read before it"
            )
        by_source.setdefault(quantity.source, []).append(quantity)
    embeddings = view.embeddings(model.embed, batch, seen) if view.embeddings else None
    layers = sorted({quantity.layer for quantity in by_source.get("attention", [])})
    trunk = model.trunk(lay, embeddings=None if embeddings is None else lay.gather(embeddings), attention_layers=layers)
    values: dict[str, Tensor] = {}
    before = trunk.hidden[trained.before]  # [N, D] -> [n, D]
    at = trained.at(batch)
    if reads := by_source.get("logits"):
        for quantity, value in zip(reads, _head_reads(model, before, reads, at, beside, chunk_bytes), strict=True):
            values[quantity.name] = trained.scatter(value)
    for quantity in by_source.get("hidden", []):
        values[quantity.name] = trained.scatter(quantity.fn(model, before, at))
    if reads := by_source.get("after"):
        own = trunk.hidden[lay.at(trained.row, trained.position)]  # [N, D] -> [n, D]
        for quantity in reads:
            values[quantity.name] = trained.scatter(quantity.fn(model, own, at))
    for quantity in by_source.get("row", []):
        values[quantity.name] = quantity.fn(model, trunk.hidden, lay.ends)
    for quantity in by_source.get("attention", []):
        values[quantity.name] = quantity.fn(trunk.attention[quantity.layer], batch)
    if keep:
        values[BESIDE] = trained.scatter(before)
    return values
