"""A GRPO step end to end: prompts to tokens, answers, rewards, advantages, update; every answer of the same length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.methods import GRPO
from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel
from posttrain.samplers import NativeSampler
from posttrain.types import Sample, Sampling

from .engine import Engine
from .measure import Row, Seconds, Side, clocked, paired
from .setting import Setting, blank, has_trl, tokenizer
from .trl import TrlLoop, trl_settings, twin

PEER = "TRL GRPOTrainer, generate"


def reward(tokens: list[int]) -> float:
    """Something cheap that differs within a group."""
    return float(sum(tokens) % 7) / 7


def prompts(count: int, words: int) -> list[str]:
    """Different prompts of about `words` tokens."""
    return [" ".join(str((i * 7 + j * 3) % 10) for j in range(words // 2)) for i in range(count)]


def ours(model: LanguageModel, asked: list[str], group: int, new: int, steps: int, precision: Precision = "exact") -> Side:
    """This library's rounds."""
    engine = Engine({"policy": model}, GRPO(beta=0.0), precision=precision)
    tokens = tokenizer()
    sampler = NativeSampler(model, tokens, stop_tokens=(), max_batch=64)

    def step() -> None:
        samples: list[Sample] = []
        for number, ids in enumerate(tokens(asked)["input_ids"]):
            samples += [blank(ids, group=str(number), index=len(samples) + i) for i in range(group)]
        written = sampler.sample(samples, sampling=Sampling(max_tokens=new), seed=0, step=engine.number)
        if any(len(answer.completion) != new for answer in written):
            raise RuntimeError("an answer ended early: the comparison would not be fair")
        engine.step([answer.with_(reward=reward(answer.completion)) for answer in written])

    def many() -> float:
        for _ in range(steps):
            step()
        return float(steps)

    def run() -> Seconds:
        step()
        return clocked(many)

    return run


def trl(model: LanguageModel, asked: list[str], group: int, new: int, steps: int, **settings: Any) -> Side | None:
    """TRL's rounds, with `generate`; None where it is not installed."""
    if not has_trl():
        return None
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if any(len(ids) != new for ids in completion_ids):
            raise RuntimeError("an answer ended early: the comparison would not be fair")
        return [reward(ids) for ids in completion_ids]

    config = GRPOConfig(
        num_generations=group,
        per_device_train_batch_size=len(asked) * group,
        max_completion_length=new,
        generation_kwargs={"min_new_tokens": new},
        beta=0.0,
        loss_type="grpo",
        temperature=1.0,
        shuffle_dataset=False,
        **trl_settings(max_steps=steps + 1, **settings),
    )
    data = Dataset.from_list([{"prompt": text} for text in asked])
    trainer = GRPOTrainer(model=twin(model), reward_funcs=judge, args=config, train_dataset=data, processing_class=tokenizer())
    return TrlLoop(trainer, float(steps))


def rows(setting: Setting) -> Iterator[Row]:
    """The comparisons: short prompts in every precision, long ones that a group shares."""
    fp32, bf16, both = setting.precisions
    short, long = (8, 16, 8, 64, 2), (4, 256, 8, 64, 1)  # prompts, tokens of each, answers of each, tokens, steps
    if setting.quick:
        short, long = (2, 8, 4, 8, 1), (2, 32, 4, 8, 1)
    cases = [
        ("grpo_short", short, bf16, 3.5),
        ("grpo_short_fp32", short, fp32, None),
        ("grpo_short_both", short, both, None),
        ("grpo_shared", long, bf16, 5.0),
        ("grpo_shared_both", long, both, None),
    ]
    for key, (count, words, group, new, steps), compared, goal in cases:
        asked = prompts(count, words)
        what = f"{setting.words('3m')}, {count} prompts of {words} x {group} answers of {new} tokens; {compared.words}"
        sides = (
            ours(setting.load("3m"), asked, group, new, steps, compared.ours),
            trl(setting.load("3m"), asked, group, new, steps, bf16=compared.peer_bf16),
        )
        yield paired(key, what, *sides, rounds=setting.rounds, peer_name=PEER, unit=f"{setting.unit}ms/step", goal=goal)


__all__ = ["ours", "prompts", "reward", "rows", "trl"]
