"""Samples become a batch with credit: group statistics, readings taken once, and what a method makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.forward import read, wanted_beside
from posttrain.method import Method
from posttrain.pack import micro_batches, units
from posttrain.reads import logprob
from posttrain.types import Batch, GroupStats, Readings, State, View

if TYPE_CHECKING:
    from posttrain.distributed.world import World
    from posttrain.models.model import LanguageModel
    from posttrain.recall import Recall


def group_stats(batch: Batch, pass_mark: float = 1.0) -> GroupStats:
    """What is known of each group; samples that were masked (no verdict to be had) count nowhere.

    Args:
        batch: With its rewards.
        pass_mark: A sample passes when its reward is at least this.
    """
    number = int(batch.group.max()) + 1 if batch.num_rows else 0
    live = batch.mask.any(-1)
    rewards = batch.rewards.double()  # so that equal rewards have a spread of 0, not of float32's rounding

    def summed(*values: Tensor) -> tuple[Tensor, ...]:
        """[B] each -> [G] each, of the rows that count."""
        columns = torch.stack(values, -1) * live[:, None]
        return columns.new_zeros(number, len(values)).index_add(0, batch.group, columns).unbind(-1)

    passed = (rewards >= pass_mark - 1e-9).to(rewards.dtype)
    count, total, passes, cut = summed(torch.ones_like(rewards), rewards, passed, batch.truncated.to(rewards.dtype))
    mean = total / count.clamp(min=1)
    (spread,) = summed((rewards - mean[batch.group]) ** 2)
    return GroupStats(
        group=torch.arange(number, device=rewards.device),
        count=count.long(),
        passed=passes.long(),
        mean=mean.to(batch.rewards.dtype),
        std=(spread / count.clamp(min=1)).sqrt().to(batch.rewards.dtype),
        truncated=cut.long(),
    )


def shard(chosen: list[list[int]], world: World) -> list[list[int]]:
    """This rank's units: every `size`-th, so that ranks differ by one unit at most."""
    return chosen[world.rank :: world.size]


def _read_once(
    models: Mapping[str, LanguageModel],
    batch: Batch,
    views: Mapping[str, View],
    method: Method,
    token_budget: int,
    world: World,
) -> Readings:
    """Views that are read once, in micro-batches, put back into the order of the batch (and gathered over ranks)."""
    mine = shard(units(batch, method.unit), world)
    keep = wanted_beside(method.views()) & set(views)
    out: dict[str, dict[str, Tensor]] = {name: {} for name in views}
    for rows in micro_batches(batch, mine, token_budget):
        seen = read(models, batch.rows(rows), views, keep=keep)
        for view in views:
            for name, value in getattr(seen, view).values.items():
                whole = out[view].get(name)
                if whole is None:
                    # Rows of a view with inputs of its own may be wider than the batch; narrow readings start at zero.
                    whole = out[view][name] = value.new_zeros(batch.num_rows, *value.shape[1:])
                if whole.ndim > 1 and value.shape[1] > whole.shape[1]:
                    grown = value.new_zeros(batch.num_rows, *value.shape[1:])
                    grown[:, : whole.shape[1]] = whole
                    whole = out[view][name] = grown
                if whole.ndim > 1:
                    whole[rows, : value.shape[1]] = value
                else:
                    whole[rows] = value
    return Readings.of(**(_gathered(out, batch, world) if world.size > 1 else out))


def _gathered(out: dict[str, dict[str, Tensor]], batch: Batch, world: World) -> dict[str, dict[str, Tensor]]:
    """Readings of all ranks: each row was read by exactly one and is zero on the others, so the sum is the whole.

    A rank with fewer units than others may have read nothing, or narrower rows: the ranks agree on every shape first.
    """
    own = {f"{view} {name}": value for view, values in out.items() for name, value in values.items()}
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for rank in world.all_gather_json({key: [str(v.dtype), *v.shape[1:]] for key, v in own.items()}):
        for key, (dtype, *shape) in rank.items():
            dtypes[key] = dtype
            shapes[key] = [max(pair) for pair in zip(shape, shapes.get(key, shape), strict=True)]
    whole: dict[str, dict[str, Tensor]] = {view: {} for view in out}
    for key in sorted(shapes):
        dtype = getattr(torch, dtypes[key].removeprefix("torch."))
        value = torch.zeros(batch.num_rows, *shapes[key], dtype=dtype, device=batch.tokens.device)
        if key in own:
            value[tuple(slice(size) for size in own[key].shape)] = own[key]
        view, _, name = key.partition(" ")
        whole[view][name] = world.all_sum(value)
    return whole


def prepare(
    models: Mapping[str, LanguageModel],
    method: Method,
    batch: Batch,
    state: State,
    *,
    token_budget: int,
    world: World,
    on_policy: bool,
    recall: Recall | None = None,
) -> tuple[Batch, Readings, State]:
    """Group statistics, the views read once, then credit.

    Args:
        models: The run's models.
        method: Whose views and credit these are.
        batch: All ranks' rows.
        state: Where the run stands.
        token_budget: Real tokens a forward may hold.
        world: The ranks.
        on_policy: One update will be made of this batch: views that credit does not look at are left to the update,
            which takes them from the live forward (same weights, same temperature, so the same numbers).
        recall: Where readings of frozen models are remembered, for rows that come again.

    Returns:
        The credited batch, the readings for all its rows, and the state, for answers with their groups' statistics. A batch that
        trains nothing comes back as it is, without readings; no update is to be made of it.
    """
    if method.rows == "prompts":  # what is not scored has no statistics
        state = replace(state, groups=group_stats(batch))
    chosen = units(batch, method.unit)
    if not chosen:
        return batch, Readings(), state
    once = {
        name: view
        for name, view in method.views().items()
        if view.once and not (on_policy and not view.credit and view.model in method.trains)
    }
    frozen = recall.covers(method, once) if recall is not None else []
    known = (recall.known(frozen, batch) if recall is not None else None) or {}
    left = {name: view for name, view in once.items() if name not in known}
    seen = _read_once(models, batch, left, method, token_budget, world) if left else Readings()
    for name, values in known.items():
        seen = seen.plus(name, values)
    if recall is not None and not known:
        for name in frozen:
            recall.keep(name, batch, getattr(seen, name).values[logprob.name], [row for unit in chosen for row in unit])
    return method.credit(batch, seen, state), seen, state
