"""Small things to test with: batches from lists, readings from lists, and a method's scalar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.method import Method
from posttrain.types import At, Batch, Origin, Readings, State


def make_batch(
    answers: Sequence[int],
    *,
    prompt: int = 1,
    padding: int = 0,
    group: Sequence[int] | None = None,
    rewards: Sequence[float] | None = None,
    columns: dict[str, Any] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Batch:
    """A batch of rows with `prompt` untrained tokens and then as many trained ones as `answers` says, right-padded."""
    rows, width = len(answers), prompt + max(answers) + padding
    lengths = torch.tensor([prompt + n for n in answers])
    position = torch.arange(width)
    real = position < lengths[:, None]
    mask = real & (position >= prompt)
    words = torch.zeros(rows, width, dtype=torch.int64)
    for row, values in enumerate(tokens or []):
        words[row, : len(values)] = torch.tensor(values)
    batch = Batch(
        tokens=words,
        lengths=lengths,
        mask=mask,
        origin=torch.where(mask, int(Origin.POLICY), 0).to(torch.int8),
        turn=torch.zeros(rows, width, dtype=torch.int16),
        group=torch.tensor(group if group is not None else list(range(rows))),
        index=torch.arange(rows),
        temperature=torch.ones(rows, dtype=dtype),
        logprobs=torch.zeros(rows, width, dtype=dtype),
        sampled_logprobs=torch.zeros(rows, width, dtype=dtype),
        rewards=torch.tensor(rewards if rewards is not None else [0.0] * rows, dtype=dtype),
        truncated=torch.zeros(rows, dtype=torch.bool),
        advantages=torch.zeros(rows, width, dtype=dtype),
        returns=torch.zeros(rows, width, dtype=dtype),
        columns={name: torch.as_tensor(value, dtype=dtype) for name, value in (columns or {}).items()},
    )
    return batch.with_(**changes)


def spread(batch: Batch, values: Sequence[Sequence[float]], *, elsewhere: float = 0.0) -> Tensor:
    """`[B, T]`: the values of each row at its trained tokens, in order, and `elsewhere` at all others."""
    out = torch.full(batch.mask.shape, elsewhere, dtype=batch.logprobs.dtype)
    for row, numbers in enumerate(values):
        out[row, batch.mask[row]] = torch.tensor(numbers, dtype=out.dtype)
    return out


def trained(batch: Batch, values: Tensor) -> list[list[float]]:
    """The values at trained tokens, row by row."""
    return [values[row, batch.mask[row]].tolist() for row in range(batch.num_rows)]


def objective(method: Method, batch: Batch, seen: Readings, state: State | None = None) -> Tensor:
    """The scalar that an engine would make of one batch: weighted sums, each divided once by its own count."""
    state = state or State()
    values = method.loss(batch, seen, state)
    total = torch.zeros((), dtype=batch.logprobs.dtype)
    for name, term in method.terms(state).items():
        weights, count = term.reduce(batch)
        assert values[name].shape == weights.shape
        kept = torch.where(weights != 0, values[name], torch.zeros_like(values[name]))
        total = total + term.weight * (kept * weights).sum() / count.clamp(min=1)
    return total


def at(target: Sequence[int], *, beside: Tensor | None = None, temperature: float = 1.0, step: int = 0) -> At:
    """Where a chunk of tokens stands: one row, positions in order."""
    n = len(target)
    return At(
        target=torch.tensor(target),
        temperature=torch.full((n,), temperature, dtype=torch.float64),
        row=torch.zeros(n, dtype=torch.int64),
        position=torch.arange(n) + 1,
        index=torch.zeros(n, dtype=torch.int64),
        seed=0,
        step=step,
        beside=beside,
    )


def float64(values: Any) -> Tensor:
    """A tensor of float64 that can be differentiated."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(found: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    """Fail unless two tensors or lists agree to `tolerance` (the number of digits that was worked out)."""
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64).detach(),
        torch.as_tensor(wanted, dtype=torch.float64).detach(),
        atol=tolerance,
        rtol=0,
    )
