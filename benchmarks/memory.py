"""Peak memory of SFT steps: what the process grows by from before its first step, each side in a process of its own.

    python -m benchmarks.memory --side ours --quick
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from . import sft
from .measure import Row
from .sides import Setting, one_thread

MIB = 1024  # ru_maxrss is in KiB


def grown(side: str, setting: Setting) -> float:
    """MiB by which the resident memory's peak passes what it was when all was loaded."""
    work = sft.batches(setting)
    model = setting.model()
    run = sft.ours(model, work, "exact") if side == "ours" else sft.trl(model, work)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB - before


def rows(setting: Setting) -> list[Row]:
    """The comparison."""
    found: dict[str, list[float]] = {"ours": [], "trl": []}
    for number in range(1 if setting.quick else setting.rounds):
        for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
            command = [sys.executable, "-m", "benchmarks.memory", "--side", side, *(["--quick"] if setting.quick else [])]
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
            found[side].append(float(json.loads(done.stdout.splitlines()[-1])))
    ratios = [other / own for own, other in zip(found["ours"], found["trl"], strict=True)]
    row = Row(
        key="memory/sft",
        what=f"{setting.shape}, SFT steps, ragged rows, batch {sft.BATCH}, growth over the loaded process; both fp32",
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        unit="MiB",
        ours=statistics.median(found["ours"]),
        peer=statistics.median(found["trl"]),
        peer_name="TRL SFTTrainer",
        wall=0.0,
        rounds=len(ratios),
    )
    return [row]


def main() -> None:
    """Measure one side and print MiB."""
    parser = argparse.ArgumentParser(description="Peak memory of one side's SFT steps.")
    parser.add_argument("--side", choices=["ours", "trl"], required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    one_thread()
    print(json.dumps(grown(options.side, Setting(quick=options.quick, rounds=1))))


if __name__ == "__main__":
    main()
