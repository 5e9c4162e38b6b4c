"""Speed and memory against the peers on the same model, data and mathematics, in one run: `posttrain bench`.

A ratio above 1 says that this library is quicker, smaller or better; see `measure` for how it is taken.  Where TRL is not
installed (extra `bench`), this library's side is measured alone.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from posttrain.allocator import keep_freed_memory
from posttrain.compiled import kernels
from posttrain.errors import ConfigError
from posttrain.files import atomic_write, make_folders

from . import decoding, dpo, gpu, grpo, memory, numbers, overhead, rollout, sft
from .measure import Row, header, shown
from .setting import Setting, one_thread

PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "sft": sft.rows,
    "dpo": dpo.rows,
    "grpo": grpo.rows,
    "decode": decoding.rows,
    "rollout": rollout.rows,
    "overhead": overhead.rows,
    "memory": memory.rows,
    "numbers": numbers.rows,
    "gpu": gpu.rows,
}
"""The comparisons by name; "gpu" needs one."""


def machine(setting: Setting) -> dict[str, Any]:
    """What the rows were measured with."""
    found: dict[str, Any] = {}
    for name in ("torch", "transformers", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found | {
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": cuda or "cpu",
        "fp32": setting.fp32.ours,
        "kernels": kernels() is not None,
        "quick": setting.quick,
    }


def _processor() -> str:
    """Its name, with the instruction sets that decide about speed."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    lines = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)
    told = {name.strip(): value.strip() for name, value in lines.items()}
    flags = told.get("flags", "").split()
    sets = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([told.get("model name", platform.machine()), *sets])


def bench(
    setting: Setting,
    *,
    parts: Sequence[str] = (),
    json_file: Path | None = None,
    tell: Callable[[str], None] = print,
) -> list[Row]:
    """Measure, telling each row as it is done and writing all of them to a file after each.

    Args:
        setting: How large.
        parts: Names of `PARTS`; all that the machine can run when empty.
        json_file: `{"machine": ..., "rows": [...]}`.
        tell: Called with lines of text.

    Raises:
        ConfigError: Too few rounds to say anything, or an unknown part.
    """
    if setting.rounds < 5 and not setting.quick:
        raise ConfigError(f"{setting.rounds} rounds say nothing; measure at least 5, or use --quick to see that all runs")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"there is no part '{unknown[0]}'; there are {', '.join(PARTS)}")
    if json_file is not None:
        make_folders(json_file.parent)
    keep_freed_memory()
    one_thread()
    told = machine(setting)
    tell(", ".join(f"{name} {value}" for name, value in told.items() if value is not None))
    tell(header())
    chosen = parts or [part for part in PARTS if (part == "gpu") == (setting.device != "cpu")]
    rows: list[Row] = []
    for part in chosen:
        for measured in PARTS[part](setting):
            row = replace(measured, goal=None) if setting.quick else measured
            rows.append(row)
            tell(shown(row))
            if json_file is not None:
                atomic_write(json_file, json.dumps({"machine": told, "rows": [row.record() for row in rows]}, indent=1) + "\n")
    return rows


__all__ = ["PARTS", "Row", "Setting", "bench", "machine"]
