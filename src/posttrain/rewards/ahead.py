"""Answers judged before anyone asks for the verdicts: a thread a worker, busy while the sampler still writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from posttrain.errors import DataError
from posttrain.rewards.process import Process, line_of
from posttrain.rewards.reward import Answer, Reward
from posttrain.types import Verdict

__all__ = ["Ahead", "First"]

_TICK = 0.1  # seconds between looks at whether a thread has ended


@dataclass(frozen=True)
class First:
    """What came of asking about one answer for the first time."""

    found: list[Verdict | None]  # one
    gone: bool  # did the worker not outlive it
    seconds: float


class Ahead:
    """First tries at answers of one reward, for `RewardRunner.judge` to find.

    Nothing is counted, retried or refused here: a failure is kept like any verdict, and `judge` does with it what it does
    with its own.  What a worker cannot be asked at all is left to `judge`, which meets the same error and says so.

    Args:
        reward: Judges answers one by one (`Reward.one_by_one`).
        processes: Its workers; nobody else may speak to them before `end`.
    """

    def __init__(self, reward: Reward, processes: Sequence[Process]) -> None:
        self.reward = reward
        self.over = False
        self._waiting: SimpleQueue[tuple[bytes, Answer] | None] = SimpleQueue()
        self._found: dict[bytes, First] = {}  # by what the worker was sent
        # daemons: a program that forgets to close its runner can end all the same
        self._threads = {threading.Thread(target=self._ask, args=(process,), daemon=True): process for process in processes}

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def put(self, answer: Answer) -> None:
        """Have an answer judged when its turn comes."""
        key = _key(answer)
        if key is not None:
            self._waiting.put((key, answer))

    def take(self, answer: Answer) -> First | None:
        """What came of this very answer, once; None where it was not asked about, or differed in anything a worker sees."""
        key = _key(answer)
        return None if key is None else self._found.pop(key, None)

    def end(self, *, kill: bool = False) -> None:
        """Ask no more, and wait for what is being judged, by its deadline; or `kill` its worker and wait for nothing."""
        self.over = True
        for _ in self._threads:
            self._waiting.put(None)
        for thread, process in self._threads.items():
            while thread.is_alive() and thread is not threading.current_thread():
                if kill:
                    process.kill()
                thread.join(_TICK)

    def _ask(self, process: Process) -> None:
        while (item := self._waiting.get()) is not None and not self.over:
            key, answer = item
            begun = time.monotonic()
            try:
                (found,) = process.judge([[answer]])
            except Exception:  # not loaded, out of memory, ...: `judge` will meet it too, where it can be told
                return
            self._found[key] = First(found, not process.running, time.monotonic() - begun)


def _key(answer: Answer) -> bytes | None:
    """What a worker would be sent; None for an answer that cannot be sent."""
    try:
        return line_of([answer])
    except DataError:
        return None
