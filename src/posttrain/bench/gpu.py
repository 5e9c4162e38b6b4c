"""On one GPU: SFT with its model FLOP utilisation, a GRPO step, and rollouts, from 135 M to 1.5 B random weights.

MFU counts 6 N + 6 L d s operations a token (weights without the input embedding, causal attention over s tokens) against
the dense bf16 peak of the accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from posttrain.models.model import LanguageModel

from . import grpo, sft
from .decoding import continuous, make_prompts, native, side
from .measure import Row, Side, busy, paired
from .setting import Setting, ragged

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second, from the data sheets."""
SIZES = ("135m", "500m", "1500m")


def peak() -> float | None:
    """Of this machine's accelerator, where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for key, value in PEAKS.items() if key in name), None)


def flop_per_token(model: LanguageModel, length: float) -> float:
    """Operations of training on one token of a row of `length` tokens."""
    inputs = model.vocab_size * model.hidden_size
    return 6 * (model.num_parameters - inputs) + 6 * model.num_layers * model.hidden_size * length


def batches(setting: Setting, *, fixed: bool) -> list[list[list[int]]]:
    """Four batches of 8 rows: log-normal from 64 to 2,048 tokens, or 2,048 each."""
    low, high, steps = (8, 16, 2) if setting.quick else (64, 2048, 4)
    rows = ragged(sft.BATCH * steps, low=high if fixed else low, high=high)
    return [rows[start : start + sft.BATCH] for start in range(0, len(rows), sft.BATCH)]


def with_use(row: Row, ours: Side, model: LanguageModel, length: float = 0.0) -> Row:
    """The row with MFU (where tokens of rows of that `length` were counted), peak memory and idle share of a round of ours."""
    limit = peak()
    mfu = None if limit is None or not length else row.ours * flop_per_token(model, length) / limit
    if not torch.cuda.is_available():
        return replace(row, mfu=mfu)
    forget()
    before = torch.cuda.memory_allocated()
    seconds = ours().wall
    peak_mb = (torch.cuda.max_memory_allocated() - before) / 1e6
    return replace(row, mfu=mfu, peak_mb=peak_mb, idle=max(0.0, 1 - busy(ours) / seconds))


def forget() -> None:
    """Give memory back between rows."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Work:
    """Rows to train on, and what they are called."""

    suffix: str  # of the row's key
    words: str
    batches: list[list[list[int]]]
    length: float  # of the row that a token is in, on average

    @classmethod
    def of(cls, setting: Setting, *, fixed: bool) -> Work:
        """Fixed or ragged rows."""
        work = batches(setting, fixed=fixed)
        lengths = [len(row) for batch in work for row in batch]
        words = f"batch {sft.BATCH}, {'fixed' if fixed else 'ragged'} rows of {min(lengths)} to {max(lengths)} tokens; bf16 both"
        return cls("" if fixed else "_ragged", words, work, sum(n * n for n in lengths) / sum(lengths))


def against_trl(setting: Setting, size: str, work: Work) -> Row:
    """SFT here and in TRL."""
    forget()
    model = setting.load(size)
    peer: Side | None = sft.trl(model, work.batches, bf16=True, device=setting.device)
    ours = sft.ours(model, work.batches, "bf16")
    row = paired(
        f"gpu_sft_{size}{work.suffix}", f"{setting.words(size)}, {work.words}", ours, peer,
        rounds=setting.rounds, peer_name=sft.PEER, unit="tokens/s", goal=1.5 if work.suffix else None,
    )  # fmt: skip
    return with_use(row, ours, model, work.length)


def against_eager(setting: Setting, size: str, work: Work) -> Row:
    """SFT here with compiled layers and without: whether `compile=true` pays."""
    forget()
    compiled, eager = setting.load(size), setting.load(size)
    compiled.use_compile(True)
    ours, peer = (sft.ours(model, work.batches, "bf16") for model in (compiled, eager))
    row = paired(
        f"gpu_sft_{size}{work.suffix}_compiled", f"{setting.words(size)}, {work.words}", ours, peer,
        rounds=setting.rounds, peer_name="compile=false", unit="tokens/s",
    )  # fmt: skip
    return with_use(row, ours, compiled, work.length)


def training(setting: Setting, size: str) -> Iterator[Row]:
    """SFT on fixed and on ragged rows; what one row holds on the accelerator is free again before the next."""
    for fixed in (True, False):
        work = Work.of(setting, fixed=fixed)
        yield against_trl(setting, size, work)
        yield against_eager(setting, size, work)


def rows(setting: Setting) -> Iterator[Row]:
    """The comparisons."""
    count, words, group, new = (2, 8, 4, 8) if setting.quick else (16, 128, 8, 256)
    for size in ("135m",) if setting.model else SIZES:
        yield from training(setting, size)
        forget()
        model, asked = setting.load(size), grpo.prompts(count, words)
        peer = grpo.trl(model, asked, group, new, 1, bf16=True, device=setting.device)
        what = f"{setting.words(size)}, {count} prompts of {words} x {group} answers of {new} tokens; bf16 both"
        ours = grpo.ours(model, asked, group, new, 1, "bf16")
        row = paired(
            f"gpu_grpo_{size}", what, ours, peer,
            rounds=setting.rounds, peer_name=grpo.PEER, unit="ms/step", goal=2.0,
        )  # fmt: skip
        yield with_use(row, ours, model)
        forget()
        model.use_precision("bf16")
        prompts = make_prompts(model, 4 if setting.quick else 64, 16)
        sides = side(native(model, prompts, new)), continuous(model, prompts, new, bf16=True)
        what = f"{setting.words(size)}, batch {len(prompts)}, prompt 16, {new} new tokens; bf16 both"
        name = "transformers generate_batch"
        row = paired(f"gpu_rollout_{size}", what, *sides, rounds=setting.rounds, peer_name=name, unit="tokens/s", goal=1.2)
        yield with_use(row, sides[0], model)


__all__ = ["flop_per_token", "peak", "rows"]
