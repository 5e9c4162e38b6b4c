"""The process in which a reward runs: `python -m posttrain.rewards.worker REPLY_FD`.

It reads JSON lines from what was its standard input: first the function and the limits, then one list of answers a
line. It writes one JSON line for each to `REPLY_FD`.  What the function prints goes to a pipe that the parent drains
and bounds.

What it isolates: the parent's memory, environment, standard streams and signals; time; memory a process; the size of a
file; stray children.  What it does not: files that the user may read or write, what the system shows of the user's other
processes (`/proc`), the network, the number of processes.  It is for functions that fail, not for programs that attack.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.rewards.reference import resolve, trace
from posttrain.rewards.reward import Answer
from posttrain.rewards.wire import ContractBroken, encode, read, read_all
from posttrain.types import InfraError

__all__ = ["main"]

_TRACE = 4000  # characters of a traceback that are sent


def _limit(limits: dict[str, int]) -> None:
    """Bound memory, file size, open files and core dumps of this process and of those it starts."""
    wanted = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in wanted.items():
        _, hard = resource.getrlimit(kind)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))


def _die_with(parent: int, *, signalled: bool) -> None:
    """End this session when the parent is gone: at once where the kernel can signal it, else within a second."""
    if signalled and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _children() -> int:
    """How many children this process has, zombies included; 0 where the system does not say."""
    try:
        return sum(len(file.read_text().split()) for file in Path("/proc/self/task").glob("*/children"))
    except OSError:
        return 0


def _trace(error: BaseException) -> str:
    """The end of an error's traceback, without the lines between this process and the function."""
    try:
        return trace(error)[-_TRACE:]
    except BaseException:  # its __str__ raises, or no memory is left
        return type(error).__name__


def _judge(fn: Callable[..., Any], takes_list: bool, line: bytes) -> dict[str, Any]:
    """The judgements on one line of answers, as a reply."""
    answers = [Answer(**answer) for answer in json.loads(line)]
    try:
        returned = read_all(fn(answers), len(answers)) if takes_list else [read(fn(answer)) for answer in answers]
        return {"verdicts": [encode(verdict) for verdict in returned]}
    except ContractBroken as error:
        return {"broken": str(error)}
    except BaseException as error:  # sys.exit() and exhausted memory included: the parent decides what it means
        return {"verdicts": [encode(InfraError(reason=_trace(error)))] * len(answers)}


def main() -> None:
    """Serve until standard input ends."""
    replies = int(sys.argv[1])
    os.set_inheritable(replies, False)
    requests = os.fdopen(os.dup(0), "rb")  # not inheritable; the function's own standard input is empty
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def reply(message: dict[str, Any]) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # the function may have closed or replaced it
                stream.flush()
        text = (json.dumps(message, allow_nan=False) + "\n").encode()
        while text:
            text = text[os.write(replies, text) :]

    start = json.loads(requests.readline())
    _die_with(start["parent"], signalled=start["signalled"])
    _limit(start["limits"])
    sys.path.extend(entry for entry in start["path"] if entry not in sys.path)
    try:
        fn = resolve(start["fn"])
        prepare = getattr(fn, "prepare", None)
        if prepare is not None:
            prepare()
    except BaseException as error:
        reply({"error": _trace(error)})
        return
    reply({"ready": os.getpid()})
    for line in requests:
        reply({**_judge(fn, start["takes_list"], line), "children": _children()})


if __name__ == "__main__":
    main()
