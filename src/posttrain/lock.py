"""One writer a run: two processes never write the same folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import CheckpointError

__all__ = ["run_lock"]

_locked: set[Path] = set()


@contextmanager
def run_lock(folder: Path | str) -> Iterator[None]:
    """Hold a run's folder for this process alone (POSIX lock on `.lock`); the system frees it when the process dies.

    POSIX locks are not inherited, so a worker that outlives its killed parent does not keep the run locked.

    Raises:
        CheckpointError: Another process writes this run; the message names it.
    """
    path = Path(folder).resolve() / ".lock"
    if path in _locked:  # a second lock by the same process would succeed, and closing it would free the first
        raise CheckpointError(
            f"{folder} is already being written by this process (pid {os.getpid()}); expected one run a folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            if cause.errno not in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"{path} could not be locked: {cause}") from cause
            owner = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
            hint = "wait for it, end it, or choose another folder"
            message = f"{folder} is being written by another process ({owner}); {hint}"
            raise CheckpointError(message) from cause
        _locked.add(path)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _locked.discard(path)
        os.close(handle)
