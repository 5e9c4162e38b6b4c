"""Memory: what SFT steps and the head of a large vocabulary add to the process, each side in a process of its own.

    python -m posttrain.bench.memory sft-ours --quick
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from posttrain import reads
from posttrain.allocator import keep_freed_memory
from posttrain.forward import CHUNK_BYTES, _head_reads
from posttrain.models.model import LanguageModel
from posttrain.types import At

from . import sft
from .measure import Row, Seconds, Side, clocked, paired
from .setting import Setting, has_trl, one_thread

TOKENS = 2048
"""Trained tokens of the head's rows."""


def grown(work: Callable[[], object]) -> float:
    """MiB by which the resident memory's peak passes what it is now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """MiB of this process, now ("VmRSS") or at its peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def head(setting: Setting, chunk_bytes: int) -> tuple[LanguageModel, Callable[[], None], list[int]]:
    """Log-probabilities of `TOKENS` tokens from hidden states, forward and backward, and the bytes of every logits tensor."""
    model = setting.load("135m")
    tokens = 64 if setting.quick else TOKENS
    hidden = torch.randn(tokens, model.hidden_size, requires_grad=True)
    zeros, one = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    at = At(target=zeros + 5, temperature=one, row=zeros, position=zeros, index=zeros, seed=0, step=0)
    sizes: list[int] = []
    logits = model.logits

    def watched(states: torch.Tensor) -> torch.Tensor:
        out = logits(states)
        sizes.append(out.numel() * out.element_size())
        return out

    model.logits = watched  # type: ignore[assignment, method-assign]

    def work() -> None:
        value, *_ = _head_reads(model, hidden, [reads.logprob], at, {}, chunk_bytes)
        (-value.mean()).backward()

    work()  # gradients of the head exist from here on
    return model, work, sizes


def _chunk(setting: Setting) -> int:
    return 1 << 14 if setting.quick else CHUNK_BYTES


def _measured(name: str, setting: Setting) -> float:
    """MiB of one side: "sft-ours", "sft-trl", "head-ours" or "head-whole"."""
    if name.startswith("sft"):
        work = sft.batches(setting)
        model = setting.load("3m")
        side = sft.ours(model, work, "exact") if name == "sft-ours" else sft.trl(model, work)
        assert side is not None
        return grown(side)
    _, run, _ = head(setting, _chunk(setting))
    if name == "head-ours":
        return grown(run)
    _, run, _ = head(setting, 1 << 40)
    return grown(run)


def _asked(name: str, setting: Setting) -> float:
    """The same from a process of its own."""
    command = [sys.executable, "-m", "posttrain.bench.memory", name, *(["--quick"] if setting.quick else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _compared(key: str, what: str, names: tuple[str, str], peer_name: str, setting: Setting) -> Row:
    found: list[tuple[float, float]] = []
    for _ in range(1 if setting.quick else setting.rounds):
        found.append((_asked(names[0], setting), _asked(names[1], setting)))
    ratios = [other / max(own, 0.1) for own, other in found]
    middle = [statistics.median(side) for side in zip(*found, strict=True)]
    ratio = statistics.median(ratios)
    return Row(key, what, ratio, min(ratios), max(ratios), "MiB", middle[0], middle[1], peer_name, rounds=len(found))


def _timed(setting: Setting, chunk_bytes: int) -> Side:
    _, work, _ = head(setting, chunk_bytes)

    def once() -> float:
        work()
        return 1.0

    def run() -> Seconds:
        return clocked(once)

    return run


def rows(setting: Setting) -> Iterator[Row]:
    """The comparisons."""
    if setting.device != "cpu" or not Path("/proc/self/status").exists():
        return
    if has_trl() and setting.model is None:
        what = f"{setting.words('3m')}, SFT steps, ragged rows, batch {sft.BATCH}, growth over the loaded process; both fp32"
        yield _compared("memory_sft", what, ("sft-ours", "sft-trl"), sft.PEER, setting)
    _, work, sizes = head(setting, _chunk(setting))
    _, whole, full = head(setting, 1 << 40)
    work()
    whole()
    own, other = max(sizes) / 2**20, max(full) / 2**20
    where = f"{setting.words('135m')}, {64 if setting.quick else TOKENS} trained tokens, forward and backward of the head, fp32"
    largest = f"largest logits tensor; {where}"
    yield Row("logits_mb", largest, other / own, other / own, other / own, "MiB", own, other, "all logits at once")
    name = "all logits at once"
    ours, peer = _timed(setting, _chunk(setting)), _timed(setting, 1 << 40)
    yield paired("logits_time", where, ours, peer, rounds=setting.rounds, peer_name=name, unit="CPU ms/step", goal=0.97)


def main() -> None:
    """Measure one side and print MiB."""
    keep_freed_memory()
    one_thread()
    print(json.dumps(_measured(sys.argv[1], Setting(quick="--quick" in sys.argv[2:], rounds=1))))


__all__ = ["rows"]

if __name__ == "__main__":
    main()
