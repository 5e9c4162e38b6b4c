"""SFT on ragged rows: packed here, padded in TRL; the same rows, batches and loss."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.methods import SFT
from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel

from .measure import Row, Seconds, Side, clocked, paired
from .sides import Engine, Setting, TrlLoop, ragged, sample, tokenizer, trl_settings, twin

BATCH, PROMPT = 8, 4
Per = Literal["token", "step"]
"""What an amount of work is counted in."""


def batches(setting: Setting, *, low: int = 16, high: int = 256) -> list[list[list[int]]]:
    """Batches of 8 ragged rows; the first is for warming up."""
    steps = 1 if setting.quick else 4
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


def trl(model: LanguageModel, work: list[list[list[int]]], *, per: Per = "token", **settings: Any) -> Side:
    """TRL's rounds, on the same batches."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [row for batch in work for row in batch]
    labelled = [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in rows]
    config = SFTConfig(
        **trl_settings(per_device_train_batch_size=BATCH, max_steps=len(work), max_length=None, **settings)
    )
    data = Dataset.from_list(labelled)
    trainer = SFTTrainer(model=twin(model), args=config, train_dataset=data, processing_class=tokenizer())
    return TrlLoop(trainer, amount(work, per))


def rows(setting: Setting) -> list[Row]:
    """The comparisons."""
    work = batches(setting)
    longest = max(len(row) for batch in work for row in batch)
    found = []
    cases: list[tuple[str, Precision, dict[str, Any], str, str]] = [
        ("sft/exact", "exact", {}, "fp32 exact", "fp32"),
        ("sft/fast", "fast", {}, "fp32 oneDNN", "fp32"),
        ("sft/bf16", "bf16", {}, "bf16 products, fp32 weights", "fp32"),
        ("sft/bf16-both", "bf16", {"bf16": True}, "bf16 products, fp32 weights", "bf16 autocast"),
    ]
    for key, precision, settings, mine, other in cases:
        what = f"{setting.shape}, rows of 16 to {longest} tokens, batch {BATCH}; ours packed, {mine}; TRL padded, {other}"
        sides = ours(setting.model(), work, precision), trl(setting.model(), work, **settings)
        found.append(
            paired(key, what, *sides, rounds=setting.rounds, peer_name="TRL SFTTrainer", unit="tokens/CPU s")
        )
    return found
