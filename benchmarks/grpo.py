"""A GRPO step end to end: prompts to tokens, answers, rewards, advantages, update; every answer of the same length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from posttrain.methods import GRPO
from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel
from posttrain.samplers import NativeSampler
from posttrain.types import Origin, Sample, Sampling

from .measure import Row, Seconds, Side, clocked, paired
from .sides import Engine, Setting, TrlLoop, tokenizer, trl_settings, twin

PEER = "TRL GRPOTrainer"


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
        samples = []
        for number, text in enumerate(asked):
            ids = tokens(text)["input_ids"]
            blank = Sample(tokens=ids, origin=[Origin.USER] * len(ids), trained=[False] * len(ids), group=str(number))
            samples += [replace(blank, index=len(samples) + i) for i in range(group)]
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


def trl(model: LanguageModel, asked: list[str], group: int, new: int, steps: int, **settings: Any) -> Side:
    """TRL's rounds, with `generate`."""
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
    trainer = GRPOTrainer(
        model=twin(model), reward_funcs=judge, args=config, train_dataset=data, processing_class=tokenizer()
    )
    return TrlLoop(trainer, float(steps))


def rows(setting: Setting) -> list[Row]:
    """The comparisons."""
    count, group, new, steps = (2, 4, 8, 1) if setting.quick else (8, 8, 64, 2)
    asked = prompts(count, 16)
    found = []
    cases: list[tuple[Precision, str]] = [
        ("exact", "fp32 exact"),
        ("fast", "fp32 oneDNN"),
        ("bf16", "bf16 products, fp32 weights"),
    ]
    for precision, mine in cases:
        what = f"{setting.shape}, {count} prompts of 16 x {group} answers of {new}; ours {mine}; TRL generate, fp32"
        sides = (
            ours(setting.model(), asked, group, new, steps, precision),
            trl(setting.model(), asked, group, new, steps),
        )
        found.append(paired(f"grpo/{precision}", what, *sides, rounds=setting.rounds, peer_name=PEER, unit="CPU ms/step"))
    return found
