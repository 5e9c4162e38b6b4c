"""The loss on rows that are not trained on: without noise, smoothing, or gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from posttrain.experience import Desk
from posttrain.forward import read
from posttrain.pack import micro_batches, pack, units
from posttrain.reads import logprob
from posttrain.score import prepare, shard
from posttrain.step import Ready, Tally, accumulate
from posttrain.types import Batch, View

if TYPE_CHECKING:
    from posttrain.session import Session


@torch.no_grad()
def losses(session: Session) -> dict[str, float]:
    """The loss of the run's first part that does not sample on its validation rows, with metrics, by `validation/<name>`.

    For demonstrations `validation/nll` is beside it.
    """
    run = session.run
    parts = {name: part for name, part in run.method.parts().items() if part.method.rows != "prompts"}
    if not parts:
        return {}
    (name, part), tally = next(iter(parts.items())), Tally()
    desk = Desk(session.renderer, None, run.sampling, 1, run.seed, session.step, session.world)
    rows = list(run.validation)
    before = session.state(name, rows)
    samples = part.method.experience(desk, rows, before)
    batch = pack(samples, seed=run.seed, step=session.step, dtype=session.real)
    batch = batch.to(session.models["policy"].device).with_(training=False)
    credited, seen, state = prepare(
        session.models,
        part.method,
        batch,
        before,
        token_budget=session.token_budget,
        world=session.world,
        on_policy=True,
    )
    ready = Ready("validation", part, 1.0, credited, seen, state)
    if part.method.rows == "demonstrations" and part.method.imitates:
        tally.add("validation/nll", *_nll(session, batch))
    chosen = shard(units(credited, part.method.unit), session.world)
    accumulate(
        session.models,
        ready,
        chosen,
        token_budget=session.token_budget,
        world=session.world,
        tally=tally,
    )
    return tally.means(session.world)


def _nll(session: Session, batch: Batch) -> tuple[float, float]:
    """Negative log-likelihood of all trained tokens of this rank's rows, and how many: the same for every method."""
    total, count = 0.0, 0.0
    views = {"policy": View(reads=(logprob,), once=True)}
    for rows in micro_batches(batch, shard(units(batch, "row"), session.world), session.token_budget):
        piece = batch.rows(rows)
        total -= float(read(session.models, piece, views).policy.logprob[piece.mask].sum())
        count += float(piece.mask.sum())
    return total, count


def criterion(found: Mapping[str, float]) -> float:
    """What the best weights make least: the likelihood loss where there is one, as a method's own loss may fall while the
    demonstrations become less likely; else that loss."""
    return found.get("validation/nll", found.get("validation/loss", math.inf))
