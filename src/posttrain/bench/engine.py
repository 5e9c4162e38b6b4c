"""This library's side of a training step, without the run around it: what the trainer itself does with a batch."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.distributed.world import World
from posttrain.method import Method, Optimizer, Part
from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel
from posttrain.pack import pack, units
from posttrain.score import prepare
from posttrain.step import Ready, Stepper, Tally, update
from posttrain.types import Sample, State

LR = 1e-5


class Engine:
    """Pack, read once, credit, count, forward, backward, clip, AdamW, metrics."""

    def __init__(self, models: dict[str, LanguageModel], method: Method, *, precision: Precision = "exact") -> None:
        self.models, self.method, self.number = models, method, 0
        for model in models.values():
            model.use_precision(precision)
        parameters = {f"policy/{name}": p for name, p in models["policy"].parameters().items()}
        self.stepper = Stepper(Optimizer(lr=LR), parameters, 1_000_000)

    def step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimiser step."""
        world, tally = World(), Tally()
        state = State(step=self.number, total_steps=1_000_000)
        batch = pack(samples, step=self.number)
        batch = batch.to(self.models["policy"].device)
        batch, seen, state = prepare(self.models, self.method, batch, state, token_budget=1 << 20, world=world, on_policy=True)
        ready = Ready("", Part(method=self.method), 1.0, batch, seen, state)
        outcome = update(
            self.models,
            self.stepper,
            [(ready, units(batch, self.method.unit))],
            token_budget=1 << 20,
            world=world,
            tally=tally,
        )
        self.number += 1
        return outcome.metrics | tally.means(world)


__all__ = ["LR", "Engine"]
