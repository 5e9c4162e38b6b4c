"""A DPO step: both answers of a pair through policy and reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.methods import DPO
from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel

from .engine import Engine
from .measure import Row, Seconds, Side, clocked, paired
from .setting import Setting, has_trl, ragged, sample, tokenizer
from .trl import TrlLoop, trl_settings, twin

PAIRS, PROMPT = 4, 8
PEER = "TRL DPOTrainer"
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def pairs(setting: Setting, *, low: int = 16, high: int = 256) -> list[list[Pair]]:
    """Batches of 4 pairs; the first is for warming up."""
    steps = 1 if setting.quick else 4
    answers = ragged(2 * PAIRS * (steps + 1), low=low, high=40 if setting.quick else high, seed=1)
    prompts = ragged(PAIRS * (steps + 1), low=PROMPT, high=PROMPT, seed=2)
    every = [(prompts[i], answers[2 * i], answers[2 * i + 1]) for i in range(len(prompts))]
    return [every[start : start + PAIRS] for start in range(0, len(every), PAIRS)]


def ours(models: dict[str, LanguageModel], work: list[list[Pair]], precision: Precision) -> Side:
    """This library's rounds."""
    engine = Engine(models, DPO(), precision=precision)
    samples = []
    for batch in work:
        rows = [(prompt, answer, str(i)) for i, (prompt, *both) in enumerate(batch) for answer in both]
        samples.append([sample(p, a, group=group, index=n) for n, (p, a, group) in enumerate(rows)])

    def steps() -> float:
        for batch in samples[1:]:
            engine.step(batch)
        return float(len(samples) - 1)

    def run() -> Seconds:
        engine.step(samples[0])
        return clocked(steps)

    return run


def trl(model: LanguageModel, reference: LanguageModel, work: list[list[Pair]], **settings: Any) -> Side | None:
    """TRL's rounds, on the same tokens; None where it is not installed."""
    if not has_trl():
        return None
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**trl_settings(per_device_train_batch_size=PAIRS, max_steps=len(work), max_length=None, **settings))
    text = Dataset.from_list([{"prompt": "1", "chosen": " 2", "rejected": " 3"}])
    trainer = DPOTrainer(
        model=twin(model), ref_model=twin(reference), args=config, train_dataset=text, processing_class=tokenizer()
    )
    every = [row for batch in work for row in batch]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer.train_dataset = Dataset.from_list([dict(zip(names, row, strict=True)) for row in every])
    return TrlLoop(trainer, float(len(work) - 1))


def rows(setting: Setting) -> Iterator[Row]:
    """The comparisons."""
    work = pairs(setting)
    for compared in setting.precisions:
        what = f"{setting.words('3m')}, {PAIRS} pairs, prompt {PROMPT}, answers of 16 to 256 tokens; {compared.words}"
        mine = {"policy": setting.load("3m"), "reference": setting.load("3m", seed=1).frozen_copy()}
        peer = trl(setting.load("3m"), setting.load("3m", seed=1), work, bf16=compared.peer_bf16)
        sides = ours(mine, work, compared.ours), peer
        yield paired(f"dpo_{compared.key}", what, *sides, rounds=setting.rounds, peer_name=PEER, unit=f"{setting.unit}ms/step")


__all__ = ["PAIRS", "PROMPT", "ours", "pairs", "rows", "trl"]
