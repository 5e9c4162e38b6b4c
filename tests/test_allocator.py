"""Freed memory stays with the process where the C library is glibc's own, and a user's settings are left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from posttrain.allocator import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "on" else None
block = 48 << 20  # glibc alone maps and unmaps what is larger than 32 MiB, whatever has happened before
import torch
def work():
    for _ in range(12):
        torch.ones(block // 4)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(which: str, **settings: str) -> tuple[str, int]:
    import os

    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | settings
    out = subprocess.run([sys.executable, "-c", FAULTS, which], capture_output=True, text=True, check=True, env=env)
    done, count = out.stdout.split()
    return done, int(count)


def test_large_tensors_come_without_page_faults() -> None:
    done, with_it = faults("on")
    if done == "False":
        pytest.skip("not glibc's allocator, or the environment has settings of its own")
    _, without = faults("off")
    assert with_it < without / 10


def test_settings_of_the_environment_win() -> None:
    assert faults("on", MALLOC_TOP_PAD_="1000000")[0] == "False"
