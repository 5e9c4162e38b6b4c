"""Memory that was freed stays with the process: a training step asks for the same tensors again and again.

Left alone, the C library gives large blocks back to the system when they are freed, and every new one costs a page fault
for each 4 KiB.  Measured on a virtual machine, a GRPO step spent up to a third of its time on these.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of `mallopt`, from <malloc.h>."""
KEPT = 512 << 20
"""Free bytes at the heap's end that are kept."""
LARGE = 80 << 20
"""The least block that gets a mapping of its own, which goes back when it is freed: larger than a chunk of logits."""
STEP = 64 << 20
"""Bytes by which the heap grows."""
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables by which a user decides instead."""


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Tell the C library's allocator to keep what is freed; once a process, and only where it is glibc's own.

    Returns:
        True where it was done; False with another C library, or where the environment has settings of its own.
    """
    try:
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, ValueError):  # another system, whose libraries know none of these
        return False
    if not glibc or any(name in os.environ for name in SETTINGS):
        return False
    wanted = ((_MMAP_THRESHOLD, LARGE), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, STEP))
    taken = [mallopt(name, value) for name, value in wanted]  # older ones refuse the first, and take the others
    return all(taken)


__all__ = ["keep_freed_memory"]
