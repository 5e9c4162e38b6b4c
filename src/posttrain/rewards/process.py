"""One worker process: started, spoken to with deadlines, and killed with everything it started."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import posttrain
from posttrain.errors import DataError
from posttrain.rewards.reference import describe
from posttrain.rewards.reward import Answer, Reward
from posttrain.rewards.wire import ContractBroken, decode
from posttrain.types import InfraError, Timeout, Verdict

__all__ = ["Limits", "LoadFailed", "Process", "line_of"]

_ALLOWED = ("PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
_MARK = "POSTTRAIN_REWARD_WORKER"
_OUTPUT = 8000  # bytes of what it printed that are kept
_CHILDREN = 8  # a worker that has more children than this after a call is replaced
_TICK = 0.2  # seconds between looks at whether the worker still lives


class LoadFailed(Exception):
    """The worker could not load the reward's function: the message holds the traceback."""


@dataclass(frozen=True)
class Limits:
    """What one worker process may use."""

    memory_bytes: int = 4 << 30
    """Address space of the worker and of each process it starts."""
    file_bytes: int = 64 << 20
    """Size of any file it writes."""
    start_seconds: float = 120.0
    """How long starting and importing may take."""
    env: tuple[str, ...] = ()
    """Names of environment variables it sees besides PATH and the like."""


@dataclass
class Process:
    """A worker for one reward.  Not shared between threads."""

    reward: Reward
    limits: Limits
    output: bytes = b""  # the end of what it printed
    starts: int = 0
    _popen: subprocess.Popen[bytes] | None = None
    _replies: int = -1  # read end
    _folder: str = ""
    _mark: str = ""
    _owner: int = -1  # the process that started it
    _unread: bytes = b""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int | None:
        """The number of the worker process, or None while there is none."""
        return self._popen.pid if self._popen is not None else None

    @property
    def running(self) -> bool:
        """Is there a worker process?"""
        return self._popen is not None

    def judge(self, units: Sequence[Sequence[Answer]]) -> Iterator[list[Verdict | None]]:
        """The verdicts on each unit, in order, as they arrive.

        A unit that the worker did not survive, or did not finish by the deadline, ends the iteration: its verdicts are
        one `InfraError` or `Timeout`, and the worker is gone.  It also ends, early, after a unit that left too many children.

        Raises:
            LoadFailed: The function could not be loaded.
            ContractBroken: A list function did not return one judgement for each answer.
        """
        try:
            self._start()
            to_send = memoryview(b"".join(line_of(unit) for unit in units))
            for unit in units:
                reply, to_send = self._exchange(to_send, self.reward.deadline, (1 << 20) + 30000 * len(unit))
                if isinstance(reply, dict) and isinstance(reply.get("broken"), str):
                    raise ContractBroken(reply["broken"])
                verdicts = _verdicts(reply, len(unit))
                if isinstance(verdicts, InfraError):
                    self.stop()
                    yield [verdicts] * len(unit)
                    return
                crowded = isinstance(reply, dict) and int(reply.get("children", 0)) > _CHILDREN
                if crowded:
                    self.stop()
                yield verdicts
                if crowded:
                    return
        except BaseException:  # also a generator closed half-way, or Ctrl-C: what is in the pipe is out of step
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the worker and all it started; the next call starts a fresh one."""
        with self._lock:
            popen, self._popen = self._popen, None
            if popen is None:
                return
            replies, self._replies, self._unread = self._replies, -1, b""
            if self._owner == os.getpid():  # in a fork of the owner the handles are dropped and nothing is killed
                _kill(popen.pid, self._mark)
                popen.wait()
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                popen.returncode = 0  # nobody here waits for it
            for stream in (popen.stdin, popen.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
            with contextlib.suppress(OSError):
                os.close(replies)

    def kill(self) -> None:
        """Kill the worker for a thread that is not the one that speaks to it: that one finds it dead, and clears up."""
        with self._lock:
            if self._popen is not None and self._owner == os.getpid():
                _kill(self._popen.pid, self._mark)

    def _start(self) -> None:
        """Start the worker unless it runs."""
        if self._popen is not None and self._owner == os.getpid() and _ended(self._popen) is None:
            return
        self.stop()
        if os.environ.get(_MARK):
            raise LoadFailed(
                "a reward's file started rewards of its own while it was loaded; put what trains under `if __name__ == '__main__':`"
            )
        self._folder = tempfile.mkdtemp(prefix="posttrain-reward-")
        self._mark, self._owner = uuid.uuid4().hex, os.getpid()
        self._replies, writing = os.pipe()
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "posttrain.rewards.worker", str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                cwd=self._folder,
                env=self._environment(),
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        self.starts += 1
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        for fd in (self._popen.stdin.fileno(), self._popen.stdout.fileno(), self._replies):
            os.set_blocking(fd, False)
        self._load()

    def _load(self) -> None:
        """Send the function and wait until it is loaded."""
        message = {
            "fn": describe(self.reward.fn),
            "takes_list": self.reward.takes_list,
            "limits": {"memory_bytes": self.limits.memory_bytes, "file_bytes": self.limits.file_bytes},
            "path": [os.path.abspath(entry) for entry in sys.path],
            "parent": os.getpid(),
            "signalled": threading.current_thread() is threading.main_thread(),
        }
        text = memoryview(json.dumps(message).encode() + b"\n")
        reply, _ = self._exchange(text, self.limits.start_seconds, 1 << 20)
        if isinstance(reply, InfraError) or "ready" not in reply:
            said = reply.reason if isinstance(reply, InfraError) else str(reply.get("error"))
            printed = self.output.decode(errors="replace")[-2000:]
            self.stop()
            raise LoadFailed(said + (f"\nit printed:\n{printed}" if printed else ""))

    def _environment(self) -> dict[str, str]:
        """The few variables the worker sees."""
        named = {name: os.environ[name] for name in (*_ALLOWED, *self.limits.env) if name in os.environ}
        locale = {name: value for name, value in os.environ.items() if name.startswith("LC_")}
        root = str(Path(posttrain.__path__[0]).resolve().parent)
        own = {
            "HOME": self._folder,
            "TMPDIR": self._folder,
            "PYTHONPATH": root,
            "PYTHONHASHSEED": "0",
            _MARK: self._mark,
        }
        return {**named, **locale, **own, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}

    def _exchange(self, to_send: memoryview, seconds: float, room: int) -> tuple[dict[str, Any] | InfraError, memoryview]:
        """Write what the pipe takes, drain what is printed, and wait for one line of reply.

        Returns the reply (or what went wrong) and what is still to be written.
        """
        popen = self._popen
        assert popen is not None
        assert popen.stdin is not None
        assert popen.stdout is not None
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            selector.register(popen.stdout, selectors.EVENT_READ)
            if to_send:
                selector.register(popen.stdin, selectors.EVENT_WRITE)
            while True:
                line, found, rest = self._unread.partition(b"\n")
                if found:
                    self._unread = rest
                    return _parsed(line), to_send
                if len(self._unread) > room:
                    return InfraError(reason=f"the reply is longer than {room} bytes"), to_send
                left = until - time.monotonic()
                if left <= 0:
                    return Timeout(reason=f"no answer within {seconds:g} s"), to_send
                for key, _ in selector.select(min(left, _TICK)):
                    if key.fileobj is popen.stdin:
                        to_send = _written(popen.stdin.fileno(), to_send)
                        if not to_send:
                            selector.unregister(popen.stdin)
                    elif key.fileobj is popen.stdout:
                        printed = _available(popen.stdout.fileno())
                        self.output = (self.output + printed)[-_OUTPUT:]
                        if not printed:
                            selector.unregister(popen.stdout)
                    else:
                        self._unread += _available(self._replies)
                ended = _ended(popen)
                if ended is not None and b"\n" not in self._unread:
                    self._unread += _available(self._replies)
                    if b"\n" not in self._unread:
                        return InfraError(reason=f"its process ended{ended}"), to_send


def line_of(unit: Sequence[Answer]) -> bytes:
    """One line of request: all that a worker sees of these answers.

    Raises:
        DataError: A row holds values that are not JSON.
    """
    try:
        return json.dumps([asdict(replace(answer, tokens=[])) for answer in unit]).encode() + b"\n"
    except (TypeError, ValueError) as cause:
        ids = ", ".join(str(answer.info.get("id", answer.index)) for answer in unit)
        raise DataError(f"one of the rows {ids} holds a value that is not JSON, so no worker can read it: {cause}") from cause


def _verdicts(reply: dict[str, Any] | InfraError, count: int) -> list[Verdict | None] | InfraError:
    """The verdicts of a reply, or what is wrong with it."""
    if isinstance(reply, InfraError):
        return reply
    found = reply.get("verdicts")
    if not isinstance(found, list) or len(found) != count or not isinstance(reply.get("children"), int):
        return InfraError(reason="the worker sent a reply that does not fit")
    return [decode(verdict) for verdict in found]


def _parsed(line: bytes) -> dict[str, Any] | InfraError:
    """One line of reply."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else InfraError(reason="the worker sent a line that is not its own")


def _available(fd: int) -> bytes:
    """What can be read now; empty at the end, or when nothing is there."""
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return b""


def _written(fd: int, text: memoryview) -> memoryview:
    """Write what the pipe takes; what remains.  When the other end is closed nothing remains."""
    try:
        return text[os.write(fd, text[: 1 << 16]) :]
    except BlockingIOError:
        return text
    except OSError:
        return text[len(text) :]


def _ended(popen: subprocess.Popen[bytes]) -> str | None:
    """How a worker ended, in words; None while it runs.

    Where the system can tell without reaping it, it stays unreaped, so that its number is not used again before
    `_kill`.
    """
    if not hasattr(os, "waitid"):
        code = popen.poll()
        return None if code is None else f" with code {code}"
    try:
        ended = os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return ""
    if ended is None:
        return None
    return f" with code {ended.si_status}" if ended.si_code == os.CLD_EXITED else f" by signal {ended.si_status}"


def _kill(pid: int, mark: str) -> None:
    """Kill a worker's session, and whatever left the session but carries the worker's mark in its environment."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    wanted = f"{_MARK}={mark}".encode()
    for _ in range(5):
        strays = [stray for stray in _processes() if stray != os.getpid() and wanted in _environ(stray)]
        if not strays:
            return
        for stray in strays:
            with contextlib.suppress(OSError):
                os.kill(stray, signal.SIGKILL)


def _processes() -> list[int]:
    """The numbers of all processes; none where there is no /proc."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _environ(pid: int) -> bytes:
    """The environment a process was started with; empty for one that has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
