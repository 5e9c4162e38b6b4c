"""Ragged samples become a batch, and a batch is cut into micro-batches that never part a pair or a group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.errors import DataError
from posttrain.types import Batch, Sample


def _rectangle(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> Tensor:
    """`[B, T]`: ragged rows, padded with zeros on the right."""
    if not any(rows):
        return torch.zeros(len(rows), width, dtype=dtype)
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], dtype=dtype)


def _column(name: str, samples: Sequence[Sample], width: int, dtype: torch.dtype) -> Tensor:
    """One named column of all samples: `[B]` for numbers, `[B, T]` for values per token, stacked for tensors."""
    missing = next((i for i, sample in enumerate(samples) if sample.columns.get(name) is None), None)
    if missing is not None:
        raise DataError(f"column '{name}' is missing in sample {missing}; a batch needs it in every sample or in none")
    values: list[Any] = [sample.columns[name] for sample in samples]
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack([torch.as_tensor(value) for value in values])
    if isinstance(first, (list, tuple)):
        for sample, value in zip(samples, values, strict=True):
            if len(value) != len(sample):
                raise DataError(f"column '{name}' has {len(value)} values for a sample of {len(sample)} tokens")
        return _rectangle(values, width, dtype)
    return torch.tensor([float(value) for value in values], dtype=dtype)


def pack(samples: Sequence[Sample], *, seed: int = 0, step: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Samples as one batch, in their order.

    Args:
        samples: At least one; their groups are numbered in order of first appearance.
        seed: First half of the key of counter-based randomness.
        step: Second half.
        dtype: Of the real-valued tensors; float64 where the models are.

    Raises:
        DataError: There is no sample, or a column does not fit its sample.
    """
    if not samples:
        raise DataError("there is no sample to make a batch of")
    width = max(len(sample) for sample in samples)
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(sample.group or f"#{i}", len(numbers)) for i, sample in enumerate(samples)]
    mask = _rectangle([sample.trained for sample in samples], width, torch.bool)
    mask[:, 0] = False  # nothing stands before the first token, so nothing predicts it
    zeros: list[float] = []
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    written = [sample.logprobs or zeros for sample in samples]
    truncated = [sample.sampled_logprobs or sample.logprobs or zeros for sample in samples]
    return Batch(
        tokens=_rectangle([sample.tokens for sample in samples], width, torch.int64),
        lengths=torch.tensor([len(sample) for sample in samples]),
        mask=mask,
        origin=_rectangle([sample.origin for sample in samples], width, torch.int8),
        turn=_rectangle([sample.turn for sample in samples], width, torch.int16),
        group=torch.tensor(groups),
        index=torch.tensor([sample.index for sample in samples]),
        temperature=torch.tensor([sample.temperature for sample in samples], dtype=dtype),
        logprobs=_rectangle(written, width, dtype),
        sampled_logprobs=_rectangle(truncated, width, dtype),
        rewards=torch.tensor([sample.reward or 0.0 for sample in samples], dtype=dtype),
        truncated=torch.tensor([sample.finish == "length" for sample in samples]),
        advantages=torch.zeros(len(samples), width, dtype=dtype),
        returns=torch.zeros(len(samples), width, dtype=dtype),
        columns={name: _column(name, samples, width, dtype) for name in names},
        seed=seed,
        step=step,
    )


Unit = Literal["row", "pair", "group"]


def units(batch: Batch, unit: Unit) -> list[list[int]]:
    """Row numbers that must stay together and still train something, in order.

    A pair counts only while both of its rows are alive; a group while any row is.
    """
    alive = batch.mask.any(-1).tolist()
    if unit == "row":
        return [[row] for row, live in enumerate(alive) if live]
    if unit == "pair":
        if len(alive) % 2:
            raise DataError(f"a batch of pairs has {len(alive)} rows; expected an even number, chosen before rejected")
        return [[row, row + 1] for row in range(0, len(alive), 2) if alive[row] and alive[row + 1]]
    members: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group.tolist()):
        members.setdefault(group, []).append(row)
    return [rows for rows in members.values() if any(alive[row] for row in rows)]


def micro_batches(batch: Batch, chosen: Sequence[Sequence[int]], token_budget: int) -> list[Tensor]:
    """Units cut into micro-batches of at most `token_budget` real tokens (a larger unit goes alone).

    Longest first, so that rows of like length meet (their attention is one batched call) and memory peaks at the start;
    but units of one group side by side, so that they are read behind one copy of their prompt.

    Args:
        batch: The whole batch.
        chosen: Units as `units` gives them.
        token_budget: Real tokens a micro-batch may hold.

    Returns:
        Row numbers of each micro-batch, `[b]` int64.
    """
    lengths = batch.lengths.tolist()
    groups = batch.group.tolist()
    size_of = [max(lengths[row] for row in unit) for unit in chosen]
    of_group: dict[int, int] = {}
    for unit, size in zip(chosen, size_of, strict=True):
        of_group[groups[unit[0]]] = max(size, of_group.get(groups[unit[0]], 0))
    group_of = [groups[unit[0]] for unit in chosen]
    order = sorted(range(len(chosen)), key=lambda u: (-of_group[group_of[u]], group_of[u], -size_of[u], u))
    cut: list[list[int]] = []
    room = 0
    for u in order:
        size = sum(lengths[row] for row in chosen[u])
        if not cut or size > room:
            cut.append([])
            room = token_budget
        cut[-1].extend(chosen[u])
        room -= size
    return [torch.tensor(rows) for rows in cut]


def shuffled_minibatches(chosen: Sequence[list[int]], count: int, generator: torch.Generator) -> list[list[list[int]]]:
    """Units in `count` mini-batches of nearly equal size, in an order drawn from `generator`; fewer units, fewer cuts."""
    if count <= 1:
        return [list(chosen)]
    order = torch.randperm(len(chosen), generator=generator).tolist()
    count = min(count, max(1, len(chosen)))
    bounds = [len(order) * i // count for i in range(count + 1)]
    return [[chosen[u] for u in sorted(order[a:b])] for a, b in itertools.pairwise(bounds)]
