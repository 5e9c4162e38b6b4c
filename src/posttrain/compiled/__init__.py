"""Small kernels for a CPU: compiled once with the machine's own C compiler, and left out where there is none.

Between the matrix products of a decoding step stand a dozen small operations a layer, each quicker than the call that asks
for it: `decoding.c` does them in four calls.  `training.c` has attention over packed rows and what stands around the products of
a training step, forward and backward.  POSTTRAIN_COMPILE=0 leaves both out.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("decoding.c", "training.c"))
HEADER = Path(__file__).with_name("common.h")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
SECONDS = 120
"""The longest that a compiler may take."""
THREADS = 2
"""Threads of torch's up to which the kernels, which have one, are quicker than torch's own operations."""
_POINTER, _FLAG, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "add_norm": [_POINTER, _POINTER, _FLAG, _POINTER, _POINTER, _FLAG, _SIZE, _SIZE, _FLOAT, _POINTER],
    "swiglu": [_POINTER, _FLAG, _POINTER, _FLAG, _SIZE, _SIZE, _POINTER],
    "draw": [_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _POINTER],
    "attend": [
        *[_POINTER, _FLAG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _FLAG, _POINTER, _FLAG, _POINTER, _POINTER],
        *[_FLOAT, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _FLOAT, _SIZE, _POINTER],
    ],
    "norm_forward": [
        *[_POINTER, _POINTER, _FLAG, _POINTER, _POINTER, _POINTER, _FLAG, _POINTER, _SIZE, _SIZE, _FLOAT, _POINTER],
    ],
    "norm_backward": [
        *[_POINTER, _FLAG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _FLAG, _POINTER, _SIZE, _SIZE, _POINTER],
    ],
    "swiglu_backward": [_POINTER, _FLAG, _POINTER, _FLAG, _POINTER, _SIZE, _SIZE, _POINTER],
    "heads_forward": [_POINTER, _FLAG, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE],
    "heads_backward": [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _FLAG, _SIZE, _SIZE, _SIZE, _SIZE],
    "attention_forward": [
        *[_POINTER, _SIZE] * 3,
        *[_POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _FLOAT, _SIZE, _POINTER, _FLAG, _POINTER, _POINTER],
    ],
    "attention_backward": [
        *[_POINTER, _FLAG],
        *[_POINTER, _SIZE] * 3,
        *[_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _FLOAT, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER],
    ],
}


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def _processor() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def build() -> Path | None:
    """The compiled kernels, or None where they cannot be had; a compiler's complaint is no error of the run's."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("POSTTRAIN_COMPILE") == "0" or compiler is None:
        return None
    try:
        key = hashlib.sha256(repr((FLAGS, compiler, platform.machine(), _processor())).encode())
        for file in (HEADER, *SOURCES):
            key.update(file.read_bytes())
        target = cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / target.name
            command = [compiler, *FLAGS, "-o", str(fresh), *map(str, SOURCES), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            fresh.replace(target)  # whole or not at all, also where several processes compile at once
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: this user has no home
        return None
    return target


@lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL | None:
    """The kernels, or None."""
    path = build()
    if path is None:
        return None
    try:
        found = ctypes.CDLL(str(path))
        for name, signature in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = signature, None
    except (OSError, AttributeError):
        return None
    return found


__all__ = ["THREADS", "build", "cache_folder", "kernels"]
