"""Causal attention over packed rows: rows of like length go through one batched kernel, without a mask.

Where there is a kernel for packed rows it takes all of them in one call instead: see `varlen`, and `compiled` on a CPU.

Axes: `N` real tokens of all rows, `b` rows of one group, `t` tokens of the longest row of a group, `H` query heads,
`Kv` key and value heads, `d` width of a head.  Right padding needs no mask under causal attention: a real token never
looks at what follows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain.layout import Behind, Layout
from posttrain.models import varlen
from posttrain.models.compiled import attends
from posttrain.models.compiled import attention as compiled_attention
from posttrain.models.folded import LONGEST, attention
from posttrain.models.gemm import Precision

WIDE = (torch.float32, torch.float64)
PADDING = 0.12
"""The largest share of padding in a group of rows."""
PREFIX_PADDING = 0.4
"""The same for the common beginnings that rows stand behind, whose padding costs less than one more call."""
SLACK = 64
"""Tokens of padding in a group that cost less than one more call, whatever their share."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that go through one kernel call."""

    rows: int  # b
    width: int  # t
    first: int  # where its tokens start, when they stand together in the pack and need no padding; -1 otherwise
    index: Tensor  # [b * t] int64 place in the pack, padding repeats the row's last token; empty when `first` >= 0
    real: Tensor  # [n] int64 places in [b * t] of its real tokens; empty when no row of the group is padded
    keys: Tensor | None = None  # [b * s] int64 places of the keys, where rows stand behind others; None: as the queries
    before: tuple[int, ...] = ()  # b tokens that each row stands behind, or one number for all


@dataclass(frozen=True, eq=False)
class Plan:
    """How the rows of one layout are grouped; worked out once, used by every layer and the backward pass."""

    groups: tuple[Group, ...]
    back: Tensor | None  # [N] int64 place in the groups' outputs laid end to end; None when they are in order already


def groups_of(sizes: tuple[int, ...], *, padding: float = PADDING) -> list[list[int]]:
    """Row numbers grouped by length, with at most `padding` (a share) or `SLACK` tokens of padding a group, by their first row.

    Example:
        >>> groups_of((4, 100, 95, 4))
        [[0, 3], [1, 2]]
    """
    groups: list[list[int]] = []
    width, total = 0, 0
    for row in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        size = sizes[row]
        whole = width * (len(groups[-1]) + 1) if groups else 0
        if groups and whole - total - size <= max(SLACK, padding * whole):
            groups[-1].append(row)
            total += size
        else:
            groups.append([row])
            width, total = size, size
    ordered = [sorted(group) for group in groups]
    return sorted(ordered, key=lambda group: group[0])


def plan(layout: Layout) -> Plan:
    """The plan of a layout, kept with it."""
    if "attention" not in layout.plans:
        layout.plans["attention"] = _plan(layout)
    found: Plan = layout.plans["attention"]
    return found


def _plan(layout: Layout) -> Plan:
    whole, tails = list(range(layout.num_rows)), list[list[int]]()
    if layout.behind is not None:
        in_front = _in_front(layout.behind, layout.num_rows)
        whole = [segment for segment, other in enumerate(in_front) if other < 0]
        behind = [segment for segment, other in enumerate(in_front) if other >= 0]
        fronts = groups_of(tuple(layout.sizes[in_front[segment]] for segment in behind), padding=PREFIX_PADDING)
        for alike in fronts:
            cut = groups_of(tuple(layout.sizes[behind[number]] for number in alike))
            tails += [[behind[alike[number]] for number in group] for group in cut]
    sets = [[whole[number] for number in group] for group in groups_of(tuple(layout.sizes[row] for row in whole))]
    groups = [_group_of(layout, rows) for rows in sets]
    groups += [_tail_of(layout, rows, [in_front[row] for row in rows]) for rows in tails]
    order = [row for rows in [*sets, *tails] for row in rows]
    if order == sorted(order):
        return Plan(tuple(groups), None)
    offsets = layout.offsets
    moved = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in order])  # [N]
    return Plan(tuple(groups), _tensor(moved.argsort(), layout))


def segments_of(layout: Layout) -> tuple[Tensor, int]:
    """`[B, 4]` int64: first token, tokens, first token in front, tokens in front; and the most keys of a segment."""
    if "segments" not in layout.plans:
        rows = [[layout.offsets[row], size, 0, 0] for row, size in enumerate(layout.sizes)]
        fronts = [] if layout.behind is None else _in_front(layout.behind, layout.num_rows)
        for row, front in enumerate(fronts):
            if front >= 0:
                rows[row][2:] = [layout.offsets[front], layout.sizes[front]]
        longest = max((row[1] + row[3] for row in rows), default=0)
        layout.plans["segments"] = torch.tensor(rows, dtype=torch.int64).view(-1, 4), longest
    found: tuple[Tensor, int] = layout.plans["segments"]
    return found


def _packed(layout: Layout) -> varlen.Packed:
    """Where the kernel for packed rows finds queries and keys, kept with the layout."""
    if "packed" not in layout.plans:
        layout.plans["packed"] = varlen.packed(segments_of(layout)[0], layout.tokens.device)
    found: varlen.Packed = layout.plans["packed"]
    return found


def _in_front(behind: Behind, segments: int) -> list[int]:
    """For every segment the one that it stands behind, or -1."""
    return [-1] * behind.first + behind.segment.tolist()[: segments - behind.first]


def _tensor(values: npt.NDArray[np.int64], layout: Layout) -> Tensor:
    """Small index arithmetic is done by numpy, which is quicker at it than torch; the result goes where the tokens are."""
    return torch.from_numpy(values).to(layout.tokens.device)


def _lengths(layout: Layout, rows: list[int]) -> npt.NDArray[np.int64]:
    """`[b, 1]`."""
    return np.array([layout.sizes[row] for row in rows])[:, None]


def _places(layout: Layout, rows: list[int], width: int) -> npt.NDArray[np.int64]:
    """`[b, width]` places in the pack; padding repeats a row's last token."""
    starts = np.array([layout.offsets[row] for row in rows])[:, None]
    found: npt.NDArray[np.int64] = starts + np.minimum(np.arange(width), _lengths(layout, rows) - 1)
    return found


def _group_of(layout: Layout, rows: list[int]) -> Group:
    """A group of rows that stand behind nothing."""
    sizes, device = layout.sizes, layout.tokens.device
    empty = torch.empty(0, dtype=torch.int64, device=device)
    width = max(sizes[row] for row in rows)
    even = all(sizes[row] == width for row in rows)
    if even and rows == list(range(rows[0], rows[0] + len(rows))):
        return Group(len(rows), width, layout.offsets[rows[0]], empty, empty)
    real = empty if even else _tensor((np.arange(width) < _lengths(layout, rows)).ravel().nonzero()[0], layout)  # [n]
    return Group(len(rows), width, -1, _tensor(_places(layout, rows, width).ravel(), layout), real)


def _tail_of(layout: Layout, rows: list[int], fronts: list[int]) -> Group:
    """A group of rows that stand behind others: their keys are the other's tokens, then their own."""
    plain, sizes = _group_of(layout, rows), layout.sizes
    before = [sizes[front] for front in fronts]
    columns = np.concatenate((_places(layout, fronts, max(before)), _places(layout, rows, plain.width)), 1)  # [b, s]
    return replace(plain, keys=_tensor(columns.ravel(), layout), before=tuple(before) if len(set(before)) > 1 else (before[0],))


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, window: int | None = None, precision: Precision = "exact"
) -> Tensor:
    """Causal attention of every token to the tokens before it in its own row.

    Args:
        q: `[N, H, d]`, rotated.
        k: `[N, Kv, d]`, rotated; `H` is a multiple of `Kv`.
        v: `[N, Kv, d]`.
        layout: The rows.
        scale: Multiplies the scores before the softmax.
        window: A token sees itself and the `window - 1` tokens before it; None: all of them.
        precision: "exact" runs torch's own kernel.  "fast" and "bf16" run a compiled one on a CPU thread, whose result is
            bfloat16 in "bf16"; without it they fold short rows, "bf16" with bfloat16 factors of all products but the scores.

    Returns:
        `[N, H * d]`.
    """
    kernel = varlen.kernel_for(q.device, q.dtype, q.shape[-1])
    if kernel is not None and (layout.behind is None or varlen.sees_fronts(kernel, q.device, q.dtype)):
        return varlen.attention(kernel, q, k, v, _packed(layout), scale=scale, window=window)
    if precision != "exact" and attends(q, k, v):
        segments, longest = segments_of(layout)
        kind = torch.bfloat16 if precision == "bf16" else q.dtype
        return compiled_attention(q, k, v, segments, longest=longest, scale=scale, window=window, kind=kind)
    the_plan = plan(layout)
    if the_plan.groups and the_plan.groups[0].rows == layout.num_rows and the_plan.groups[0].first == 0:
        return _group(q, k, v, the_plan.groups[0], scale=scale, window=window, precision=precision)
    parts = [_group(q, k, v, group, scale=scale, window=window, precision=precision) for group in the_plan.groups]
    attended = torch.cat(parts) if len(parts) > 1 else parts[0]
    return attended if the_plan.back is None else attended.index_select(0, the_plan.back)


def _group(
    q: Tensor, k: Tensor, v: Tensor, group: Group, *, scale: float, window: int | None, precision: Precision
) -> Tensor:
    """One batched call: the attended real tokens of a group, `[n, H * d]`, in the order of its rows."""
    count = group.rows * group.width
    folded = precision != "exact" and folds(group, q, window)

    def cut(x: Tensor, index: Tensor, first: int = -1) -> Tensor:  # [N, h, d] -> [b, t, h, d]
        some = x.narrow(0, first, count) if first >= 0 else x.index_select(0, index)
        return some.view(group.rows, -1, x.shape[1], x.shape[2])

    own = (group.index, group.first) if group.keys is None else (group.keys,)
    queries, keys, values = cut(q, group.index, group.first), cut(k, *own), cut(v, *own)
    if folded:
        causal = causal_bias(group.width, keys.shape[1], q.shape[1] // k.shape[1], window, q.dtype, q.device)
        front = front_bias(group.before, group.width, q.dtype, q.device) if len(group.before) > 1 else None
        narrow = precision == "bf16"
        out = attention(queries, keys, values, causal=causal, front=front, scale=scale, narrow=narrow).flatten(2).flatten(0, 1)
        return out.index_select(0, group.real) if group.real.numel() else out
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    if group.keys is None:
        mask = window_mask(group.width, window, q.device) if window is not None and group.width > window else None
    else:
        mask = tail_mask(group.before, group.width, window, q.device)
    repeats = q.shape[1] // k.shape[1]
    keys, values = repeat_heads(keys, repeats), repeat_heads(values, repeats)
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
    flat = out.transpose(1, 2).reshape(count, -1)  # [b, H, t, d] -> [b * t, H * d]
    return flat.index_select(0, group.real) if group.real.numel() else flat


def folds(group: Group, q: Tensor, window: int | None) -> bool:
    """Does this group go through `folded.attention`?  On a CPU, where rows are short; not windows behind other rows."""
    length = group.width + (max(group.before) if group.before else 0)
    return q.device.type == "cpu" and length <= LONGEST and q.dtype in WIDE and not (group.before and window is not None)


@lru_cache(maxsize=16)
def causal_bias(width: int, keys: int, repeats: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[1, Q * t, s]`: 0 where query i may look at key j, -inf elsewhere; the last t keys are the queries' own; `repeats` is Q."""
    with torch.inference_mode(False):
        seen = torch.ones(width, keys, dtype=torch.bool, device=device)
        seen[:, keys - width :] = window_mask(width, window or width, device)
        bias = torch.zeros(width, keys, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        return bias.repeat(repeats, 1)[None]


@lru_cache(maxsize=16)
def front_bias(before: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[b, 1, s]`: -inf at the columns in front that a row does not stand behind, 0 elsewhere."""
    with torch.inference_mode(False):
        longest = max(before)
        column = torch.arange(longest + width, device=device)
        length = torch.tensor(before, device=device)[:, None]  # [b, 1]
        hidden = (column >= length) & (column < longest)
        return torch.zeros(len(before), 1, longest + width, dtype=dtype, device=device).masked_fill_(hidden[:, None], float("-inf"))


def repeat_heads(x: Tensor, repeats: int) -> Tensor:
    """`[b, Kv, t, d] -> [b, Kv * repeats, t, d]`: each key and value head serves `repeats` query heads."""
    if repeats == 1:
        return x
    rows, heads, width, size = x.shape
    return x[:, :, None].expand(rows, heads, repeats, width, size).reshape(rows, heads * repeats, width, size)


@lru_cache(maxsize=8)
def window_mask(width: int, window: int, device: torch.device) -> Tensor:
    """`[t, t]` bool, True where query i may look at key j: `i - window < j <= i`."""
    with torch.inference_mode(False):
        place = torch.arange(width, device=device)
        distance = place[:, None] - place[None, :]
        return (distance >= 0) & (distance < window)


@lru_cache(maxsize=16)
def tail_mask(before: tuple[int, ...], width: int, window: int | None, device: torch.device) -> Tensor:
    """`[b, 1, t, s]` bool (b may be 1), True where query i of a row may look at column j.

    The first max(before) columns are what the row stands behind, of which it has `before` tokens; then come its own.
    """
    with torch.inference_mode(False):
        longest = max(before)
        place = torch.arange(width, device=device)
        own = place[:, None] >= place[None, :]  # [t, t]
        length = torch.tensor(before, device=device)[:, None, None]  # [b, 1, 1]
        column = torch.arange(longest, device=device)
        front = (column < length).expand(-1, width, -1)  # [b, t, P]
        if window is not None:
            own = own & (place[:, None] - place[None, :] < window)
            front = front & (length + place[:, None] - column < window)
        return torch.cat((front, own.expand(len(before), -1, -1)), -1)[:, None]


def probabilities(q: Tensor, k: Tensor, layout: Layout, *, scale: float, window: int | None = None) -> Tensor:
    """The attention of one layer as numbers.

    Returns:
        `[B, H, T, T]`, `T = layout.width`: row i of a head says how token i divides its attention; zero at padding.
        In float32 at least.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    width, repeats = layout.longest, q.shape[1] // k.shape[1]
    out = torch.zeros(layout.num_rows, q.shape[1], layout.width, layout.width, dtype=wide, device=q.device)
    visible = window_mask(width, window or width, q.device)
    for row, size in enumerate(layout.sizes):
        start = layout.offsets[row]
        queries = q[start : start + size].transpose(0, 1)  # [H, t, d]
        keys = k[start : start + size].transpose(0, 1).repeat_interleave(repeats, 0)
        scores = (queries @ keys.transpose(1, 2) * scale).to(wide)  # [H, t, t]
        out[row, :, :size, :size] = scores.masked_fill(~visible[:size, :size], float("-inf")).softmax(-1)
    return out


__all__ = ["Group", "Plan", "attend", "groups_of", "plan", "probabilities", "repeat_heads", "window_mask"]
