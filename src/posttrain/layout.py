"""Where the real tokens of a batch stand when its rows are laid one after another, without padding.

Axes: `B` rows, `T` tokens of the longest row, `N` real tokens of all rows.  Row b is `[starts[b], starts[b + 1])`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import DataError, nearest
from posttrain.types import Batch


@dataclass(frozen=True, eq=False)
class Behind:
    """Rows of a batch as segments of a layout: row b is segment `first + b`, which may stand behind another one."""

    segment: Tensor  # [B] int64 segment that holds the row's first tokens; -1: none, the row is whole
    length: Tensor  # [B] int64 tokens of that segment, 0 where there is none
    first: int  # segments before those of the rows


@dataclass(frozen=True, eq=False)
class Layout:
    """The real tokens of `B` rows, one row after another.

    Example:
        >>> here = Layout.of_rows([[5, 6, 7], [8]])
        >>> here.tokens.tolist(), here.positions.tolist(), here.starts.tolist(), here.row.tolist()
        ([5, 6, 7, 8], [0, 1, 2, 0], [0, 3, 4], [0, 0, 0, 1])
        >>> here.scatter(here.tokens).tolist()
        [[5, 6, 7], [8, 0, 0]]
    """

    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64, place of the token in its row, from 0
    lengths: Tensor  # [B] int64
    starts: Tensor  # [B + 1] int64
    row: Tensor  # [N] int64
    sizes: tuple[int, ...]  # B Python ints, the same as `lengths`
    width: int  # T, at least max(sizes): the width of the batch that this lays out
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # [N, ...] model inputs beyond tokens
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)  # index tensors worked out once for this layout
    behind: Behind | None = None  # where rows share their first tokens, the rows above are segments; see `prefixes`

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.tokens.shape[0])

    @property
    def longest(self) -> int:
        """The number of tokens of the longest row."""
        return max(self.sizes, default=0)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """`starts` as B + 1 Python ints."""
        found = [0]
        for size in self.sizes:
            found.append(found[-1] + size)
        return tuple(found)

    @cached_property
    def flat(self) -> Tensor:
        """[N] int64: the place of each token in the padded batch `[B, T]` read row by row."""
        return self.row * self.width + self.positions

    def at(self, row: Tensor, position: Tensor) -> Tensor:
        """`[n]` places in the pack of tokens given by their row of the batch and position in it, `[n]` each."""
        if self.behind is None:
            return self.starts[row] + position
        length = self.behind.length[row]
        shared = self.starts[self.behind.segment[row].clamp(min=0)] + position
        own = self.starts[self.behind.first + row] + position - length
        return torch.where(position < length, shared, own)

    @cached_property
    def ends(self) -> Tensor:
        """`[B]` int64 places in the pack of the rows' last tokens."""
        return self.starts[1:] - 1 if self.behind is None else self.starts[self.behind.first + 1 :] - 1

    def scatter(self, values: Tensor, *, fill: float = 0.0) -> Tensor:
        """`[N, ...] -> [B, T, ...]`, with `fill` where there is no token; differentiable."""
        shape = values.shape[1:]
        padded = values.new_full((self.num_rows * self.width, *shape), fill)
        return padded.index_copy(0, self.flat, values).view(self.num_rows, self.width, *shape)

    def gather(self, padded: Tensor) -> Tensor:
        """`[B, T, ...] -> [N, ...]`: the real tokens; differentiable."""
        return padded.flatten(0, 1).index_select(0, self.flat)

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        sizes: Sequence[int],
        *,
        width: int | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Layout:
        """A layout of packed tokens.

        Args:
            tokens: `[N]` int64, all rows one after another.
            sizes: B lengths, each at least 1, whose sum is N.
            width: T of the padded batch; the longest row when not given.
            extra: `[N, ...]` model inputs beyond tokens, by name.
        """
        if any(size < 1 for size in sizes) or sum(sizes) != tokens.shape[0]:
            raise DataError(f"rows of lengths {list(sizes)} do not make {tokens.shape[0]} tokens; every row needs at least 1")
        device = tokens.device
        counts = np.array(sizes, dtype=np.int64)
        begins = np.concatenate((np.zeros(1, dtype=np.int64), counts.cumsum()))
        owner = np.repeat(np.arange(len(sizes)), counts)
        within = np.arange(len(owner)) - begins[:-1][owner]
        lengths, starts, row, positions = (torch.from_numpy(x).to(device) for x in (counts, begins, owner, within))
        longest = max(sizes, default=0)
        if width is not None and width < longest:
            raise DataError(f"a row of {longest} tokens does not fit a width of {width}")
        return cls(tokens, positions, lengths, starts, row, tuple(sizes), width or longest, dict(extra or {}))

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], *, device: torch.device | str = "cpu") -> Layout:
        """A layout of rows given as lists of token numbers."""
        flat = [token for row in rows for token in row]
        return cls.of(torch.tensor(flat, dtype=torch.int64, device=device), [len(row) for row in rows])


def layout(batch: Batch, *, extra: Sequence[str] = ()) -> Layout:
    """The real tokens of a batch, row after row.

    Args:
        batch: Right-padded rows.
        extra: Names of columns `[B, T, ...]` that are model inputs and ride along, packed to `[N, ...]`.
    """
    missing = [name for name in extra if name not in batch.columns]
    if missing:
        raise DataError(f"the batch has no column '{missing[0]}'{nearest(missing[0], batch.columns)}")
    width = int(batch.tokens.shape[1])
    real = torch.arange(width, device=batch.tokens.device)[None, :] < batch.lengths[:, None]  # [B, T]
    row, positions = real.nonzero(as_tuple=True)  # [N] each, row after row
    sizes: tuple[int, ...] = tuple(batch.lengths.tolist())
    if min(sizes, default=1) < 1 or max(sizes, default=0) > width:
        raise DataError(f"rows of lengths {list(sizes)} do not fit a batch of width {width}; every row needs at least 1 token")
    starts = torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0))  # [B + 1]
    columns = {name: batch.columns[name][row, positions] for name in extra}
    return Layout(batch.tokens[row, positions], positions, batch.lengths, starts, row, sizes, width, columns)
