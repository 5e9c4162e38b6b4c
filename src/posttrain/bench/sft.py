"""SFT on ragged rows: packed here, padded in TRL; the same rows, batches and loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from posttrain.methods import SFT
from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel

from .engine import Engine
from .measure import Row, Seconds, Side, clocked, paired
from .setting import Setting, has_trl, ragged, sample, tokenizer
from .trl import TrlLoop, trl_settings, twin

BATCH, PROMPT = 8, 4
PEER = "TRL SFTTrainer"
Per = Literal["token", "step"]
"""What an amount of work is counted in."""


def batches(setting: Setting, *, steps: int = 4, low: int = 16, high: int = 256) -> list[list[list[int]]]:
    """Batches of 8 ragged rows; the first is for warming up."""
    steps = 1 if setting.quick else steps
    rows = ragged(BATCH * (steps + 1), low=low, high=48 if setting.quick else high)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def amount(work: list[list[list[int]]], per: Per) -> float:
    """Tokens, or steps, of a round."""
    return float(sum(len(row) for batch in work[1:] for row in batch) if per == "token" else len(work) - 1)


def ours(model: LanguageModel, work: list[list[list[int]]], precision: Precision, *, per: Per = "token") -> Side:
    """This library's rounds; the first batch warms up."""
    engine = Engine({"policy": model}, SFT(), precision=precision)
    samples = [[sample(row[:PROMPT], row[PROMPT:], index=i) for i, row in enumerate(rows)] for rows in work]

    def steps() -> float:
        for batch in samples[1:]:
            engine.step(batch)
        return amount(work, per)

    def run() -> Seconds:
        engine.step(samples[0])
        return clocked(steps)

    return run


def trl(model: LanguageModel, work: list[list[list[int]]], *, per: Per = "token", **settings: Any) -> Side | None:
    """TRL's rounds, on the same batches; None where it is not installed."""
    if not has_trl():
        return None
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [row for batch in work for row in batch]
    labelled = [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in rows]
    config = SFTConfig(**trl_settings(per_device_train_batch_size=BATCH, max_steps=len(work), max_length=None, **settings))
    data = Dataset.from_list(labelled)
    trainer = SFTTrainer(model=twin(model), args=config, train_dataset=data, processing_class=tokenizer())
    return TrlLoop(trainer, amount(work, per))


def rows(setting: Setting) -> Iterator[Row]:
    """The comparisons: the small shape in every precision, the large one with bf16 products."""
    fp32, bf16, both = setting.precisions
    cases = [("3m", fp32, "sft_fp32", 3.5), ("3m", bf16, "sft_bf16_3m", 6.0), ("3m", both, "sft_bf16_3m_both", None)]
    if setting.model is None:
        cases += [("135m", bf16, "sft_bf16_135m", 8.0), ("135m", both, "sft_bf16_135m_both", None)]
    for shape, compared, key, goal in cases:
        work = batches(setting, steps=1 if shape == "135m" else 4)
        longest = max(len(row) for batch in work for row in batch)
        what = f"{setting.words(shape)}, rows of 16 to {longest} tokens, batch {BATCH}, packed here, padded there; {compared.words}"
        sides = ours(setting.load(shape), work, compared.ours), trl(setting.load(shape), work, bf16=compared.peer_bf16)
        yield paired(key, what, *sides, rounds=setting.rounds, peer_name=PEER, unit=f"tokens/{setting.unit}s", goal=goal)


__all__ = ["BATCH", "PEER", "PROMPT", "amount", "batches", "ours", "rows", "trl"]
