"""The loss on rows that are not trained on: without noise, smoothing, or gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from posttrain.experience import Desk
from posttrain.forward import CHUNK_BYTES
from posttrain.pack import pack, units
from posttrain.score import prepare, shard
from posttrain.step import Ready, Tally, accumulate

if TYPE_CHECKING:
    from posttrain.session import Session


@torch.no_grad()
def losses(session: Session) -> dict[str, float]:
    """The loss of the run's first part that does not sample on its validation rows, with metrics, by `validation/<name>`."""
    run = session.run
    parts = [part for part in run.method.parts().values() if part.method.rows != "prompts"]
    if not parts:
        return {}
    part, tally = parts[0], Tally()
    desk = Desk(session.renderer, None, run.sampling, 1, run.seed, session.step, session.world)
    rows = list(run.validation)
    samples = desk.pairs(rows) if part.method.rows == "pairs" else desk.replay(rows)
    batch = pack(samples, seed=run.seed, step=session.step, dtype=session.real)
    batch = batch.to(session.models["policy"].device).with_(training=False)
    credited, seen, state = prepare(
        session.models,
        part.method,
        batch,
        session.state(rows=rows),
        token_budget=session.token_budget,
        world=session.world,
        on_policy=True,
    )
    ready = Ready("validation", part, 1.0, credited, seen, state)
    chosen = shard(units(credited, part.method.unit), session.world)
    accumulate(
        session.models,
        ready,
        chosen,
        token_budget=session.token_budget,
        chunk_bytes=CHUNK_BYTES,
        world=session.world,
        tally=tally,
    )
    return tally.means(session.world)
