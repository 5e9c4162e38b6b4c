"""The library against `examples/plain_sft.py` and `examples/plain_grpo.py`, step by step on the same rows.

The examples are loaded as they stand.  Each side keeps its own weights and its own AdamW through all steps; losses,
log-probabilities and the weights at the end must agree to float32 error.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain import reads, tiny
from posttrain.data.chat import Renderer
from posttrain.distributed.world import World
from posttrain.formulas.advantages import group_zscore_sample
from posttrain.forward import read
from posttrain.method import Method, Optimizer, Part
from posttrain.methods import GRPO, SFT
from posttrain.models.load import load
from posttrain.pack import pack, units
from posttrain.samplers.native import NativeSampler
from posttrain.score import prepare
from posttrain.step import Ready, Stepper, Tally, update
from posttrain.tasks.word_problems import rows
from posttrain.types import Sample, Sampling, State, View

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 8
EPS = 1e-5
"""AdamW's, on both sides.  The default 1e-8 divides gradients that are float noise by their own size: steps of noise."""
pytestmark = pytest.mark.skipif(not (EXAMPLES / "plain_sft.py").exists(), reason="the examples are not part of this installation")


@pytest.fixture
def plain_sft() -> Iterator[Any]:
    yield from example("plain_sft")


@pytest.fixture
def plain_grpo() -> Iterator[Any]:
    yield from example("plain_grpo")


def example(name: str) -> Iterator[Any]:
    """One of the examples as a module; what it brings into `sys.modules` is taken out again."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))
        for loaded in ("plain_sft", "plain_grpo"):
            sys.modules.pop(loaded, None)


class Library:
    """The engine's side: the embedded model, a method and an optimiser."""

    def __init__(self, method: Method, optimizer: Optimizer) -> None:
        self.model, self.tokenizer = load("tiny")
        self.method, self.models = method, {"policy": self.model}
        self.renderer = Renderer(self.tokenizer)
        self.stepper = Stepper(optimizer, {f"policy/{n}": p for n, p in self.model.parameters().items()}, STEPS)

    def step(self, samples: Sequence[Sample], number: int, *, budget: int) -> float:
        """One update; returns its loss."""
        state, world, tally = State(step=number, total_steps=STEPS), World(), Tally()
        batch = pack(samples, step=number)
        batch, seen, state = prepare(
            self.models, self.method, batch, state, token_budget=budget, world=world, on_policy=True
        )
        ready = Ready("", Part(method=self.method), 1.0, batch, seen, state)
        chosen = units(batch, self.method.unit)
        outcome = update(
            self.models,
            self.stepper,
            [(ready, chosen)],
            token_budget=budget,
            chunk_bytes=1 << 20,
            world=world,
            tally=tally,
        )
        assert outcome.skipped is None
        return tally.means(world)["loss"]

    def logprobs(self, samples: Sequence[Sample]) -> Tensor:
        """`[B, T]` of the trained tokens."""
        return read(self.models, pack(samples), {"policy": View(reads=(reads.logprob,), once=True)}).policy.logprob


@dataclass
class Plain:
    """The example's side: its `loss` and torch's own optimiser and clipping."""

    module: Any  # plain_sft or plain_grpo
    model: Any
    optimizer: Any

    def step(self, batch: dict[str, Tensor], rate: float) -> tuple[float, Tensor]:
        value, logprobs = self.module.loss(self.model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(value.detach()), logprobs.detach()


def plain(module: Any) -> Plain:
    model, _ = module.load(tiny.path())
    return Plain(module, model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, eps=EPS))


def compare_weights(library: Library, oracle: Plain) -> None:
    """Every weight agrees to 1e-5, after steps that moved it a hundred times as far."""
    start, theirs = dict(load("tiny")[0].weights()), dict(oracle.model.named_parameters())
    moved = max(float((w.detach() - start[n].detach()).abs().max()) for n, w in library.model.weights())
    apart = max(float((w.detach() - theirs[n].detach()).abs().max()) for n, w in library.model.weights())
    print(f"moved by at most {moved:.1e}, apart by at most {apart:.1e}")
    assert moved > 1e-3
    assert apart <= 1e-5


@pytest.mark.parametrize("budget", [100_000, 300])
def test_sft(plain_sft: Any, budget: int) -> None:
    lr, size = 3e-4, 6
    library, oracle = Library(SFT(), Optimizer(lr=lr, eps=EPS, schedule="cosine")), plain(plain_sft)
    chosen = rows("demonstrations", STEPS * size, level="demo")
    for number in range(STEPS):
        part = chosen[number * size : (number + 1) * size]
        examples = [plain_sft.demonstration(library.tokenizer, row) for row in part]
        samples = [sample.with_(index=i) for i, row in enumerate(part) for sample in library.renderer.demonstrations(row)]
        assert [sample.tokens for sample in samples] == [prompt + completion for prompt, completion in examples]
        ours = library.step(samples, number, budget=budget)
        batch = plain_sft.collate(examples, library.tokenizer.pad_token_id)
        theirs, _ = oracle.step(batch, lr * 0.5 * (1 + math.cos(math.pi * number / STEPS)))
        print(f"step {number}: {ours:.7f} and {theirs:.7f}")
        assert ours == pytest.approx(theirs, rel=1e-5)
    compare_weights(library, oracle)


def reward(sample: Sample) -> float:
    """Something that differs within a group whatever is written."""
    return float(sum(sample.completion) % 3 == 0) + 0.1 * (sample.index % 2)


@pytest.mark.parametrize("budget", [100_000, 500])
def test_grpo(plain_grpo: Any, budget: int) -> None:
    lr, prompts, group = 5e-4, 3, 4
    method = GRPO(beta=0.0, advantage=partial(group_zscore_sample, eps=1e-4))
    library, oracle = Library(method, Optimizer(lr=lr, eps=EPS)), plain(plain_grpo)
    chosen = rows("train", STEPS * prompts, level="demo", seed=0)
    sampler = NativeSampler(library.model, library.tokenizer, stop_tokens=library.renderer.stop_tokens)
    for number in range(STEPS):
        part = [row for row in chosen[number * prompts : (number + 1) * prompts] for _ in range(group)]
        asked = [
            library.renderer.prompt(row["prompt"]).with_(group=str(i // group), index=i) for i, row in enumerate(part)
        ]
        assert [p.tokens for p in asked] == [plain_grpo.prompt_tokens(library.tokenizer, row) for row in part]
        written = sampler.sample(asked, sampling=Sampling(max_tokens=24), seed=0, step=number)
        samples = [sample.with_(reward=reward(sample)) for sample in written]
        batch = plain_grpo.collate(
            [(s.tokens[: s.prompt_length], s.completion) for s in samples], library.tokenizer.pad_token_id
        )
        rewards = torch.tensor([s.reward for s in samples]).view(prompts, group)
        batch["advantages"] = plain_grpo.group_advantages(rewards).flatten()
        before = library.logprobs(samples)
        ours = library.step(samples, number, budget=budget)
        theirs, logprobs = oracle.step(batch, lr)
        print(f"step {number}: {ours:.7f} and {theirs:.7f}")
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        mask = batch["mask"]
        assert float((before[mask] - logprobs[mask]).abs().max()) <= 1e-4
    compare_weights(library, oracle)
