"""A rollout as it occurs: ragged prompts in groups, answers that end when they end; slots are refilled here.

With random weights every token is about equally likely, so that a set of end tokens makes lengths geometric on both sides.
Rates are compared: answers differ, since the samplers draw differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel
from posttrain.samplers import NativeSampler
from posttrain.types import Sampling

from .measure import Row, Seconds, Side, clocked, paired
from .setting import Setting, blank, has_trl, ragged, tokenizer
from .trl import trl_settings, twin

GROUP, MEAN = 8, 64
"""Answers a prompt, and about how many tokens each has."""


def ends(model: LanguageModel) -> tuple[int, ...]:
    """End tokens, one of `MEAN` of all."""
    return tuple(range(model.vocab_size - model.vocab_size // MEAN, model.vocab_size))


def ours(model: LanguageModel, prompts: list[list[int]], most: int, precision: Precision) -> Side:
    """This library's rollouts."""
    model.use_precision(precision)
    sampler = NativeSampler(model, None, stop_tokens=ends(model), max_batch=64)
    asked = [blank(prompt, index=i) for i, prompt in enumerate(prompt for prompt in prompts for _ in range(GROUP))]
    calls = iter(range(1 << 30))

    def write() -> float:
        written = sampler.sample(asked, sampling=Sampling(max_tokens=most), seed=0, step=next(calls))
        return float(sum(len(answer.completion) for answer in written))

    return lambda: clocked(write)


def trl(model: LanguageModel, prompts: list[list[int]], most: int, **settings: Any) -> Side | None:
    """TRL's rollouts: one padded call of `generate`, as its trainer makes it; None where it is not installed."""
    if not has_trl():
        return None
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    stops = ends(model)
    config = GRPOConfig(
        num_generations=GROUP,
        per_device_train_batch_size=len(prompts) * GROUP,
        max_completion_length=most,
        generation_kwargs={"eos_token_id": list(stops)},
        temperature=1.0,
        **trl_settings(max_steps=1, **settings),
    )
    data = Dataset.from_list([{"prompt": "1"}])
    trainer: Any = GRPOTrainer(
        model=twin(model), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, train_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip
    asked = [prompt for prompt in prompts for _ in range(GROUP)]
    ending = frozenset(stops)

    def real(answer: list[int]) -> int:
        return next((place + 1 for place, token in enumerate(answer) if token in ending), len(answer))

    def write() -> float:
        answers = trainer._generate_single_turn(asked, None, {}, GROUP)[0]
        return float(sum(map(real, answers)))

    def run() -> Seconds:
        return clocked(write)

    return run


def rows(setting: Setting) -> Iterator[Row]:
    """The comparisons."""
    _, bf16, both = setting.precisions
    count, high, most = (2, 16, 16) if setting.quick else (16, 128, 256)
    prompts = ragged(count, low=8, high=high, seed=3)
    for key, compared, goal in (("rollout_ragged", bf16, 4.0), ("rollout_ragged_both", both, None)):
        what = (
            f"{setting.words('3m')}, {count} prompts of 8 to {max(map(len, prompts))} x {GROUP} answers of 1 to {most} tokens "
            f"(mean about {MEAN}); ours 64 at a time; {compared.words}"
        )
        mine = ours(setting.load("3m"), prompts, most, compared.ours)
        peer = trl(setting.load("3m"), prompts, most, bf16=compared.peer_bf16)
        unit = f"tokens/{setting.unit}s"
        yield paired(key, what, mine, peer, rounds=setting.rounds, peer_name="TRL's rollout", unit=unit, goal=goal, same=False)


__all__ = ["GROUP", "MEAN", "ends", "ours", "rows", "trl"]
