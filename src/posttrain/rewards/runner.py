"""Who runs rewards: owner of the worker processes, of retries, and of the rate at which the infrastructure may fail."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from types import TracebackType

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.ahead import Ahead, First
from posttrain.rewards.process import Limits, LoadFailed, Process
from posttrain.rewards.reference import trace
from posttrain.rewards.reward import Answer, Reward
from posttrain.rewards.wire import ContractBroken, read, read_all
from posttrain.types import InfraError, Timeout, Verdict

__all__ = ["Limits", "RewardRunner", "Singles", "Tally"]

_WINDOW = 200  # judgements over which the failure rate is taken
_HANGS = 3  # calls that may time out in a row, retries included, before anything has succeeded


@dataclass
class Tally:
    """What happened to one reward in one call, after retries."""

    judged: int = 0
    failed: int = 0
    timed_out: int = 0  # of the failed
    retried: int = 0  # judgements that were asked for twice
    seconds: float = 0.0


@dataclass
class Singles:
    """Judgements by workers that are asked about one answer at a time (`Reward.one_by_one`)."""

    judged: int = 0
    ahead: int = 0  # of these, ready when `judge` was called
    seconds: float = 0.0  # of workers, those ahead included


@dataclass
class _Try:
    """Answers that go into one call of the function."""

    indexes: list[int]
    again: bool = False


@dataclass
class _Record:
    """What is remembered of one reward from call to call."""

    window: deque[bool] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # did the infrastructure fail
    first: str = ""  # the first failure, traceback included
    hangs: int = 0  # calls in a row that timed out, retries included
    succeeded: bool = False  # did any call
    warned: bool = False  # that a call timed out


class RewardRunner:
    """Runs rewards in workers that live from step to step.

    A judgement that the infrastructure failed (it raised, hung, returned no finite number, or its process died) is asked
    for once more, in a fresh worker; then that answer is marked, or all of the call where the function takes a list.  A
    list that does not hold one judgement an answer stops the run at once.

    Answers may be handed over while others are still being written (`judge_ahead`): that saves time and changes no verdict,
    no count and no error, since `judge` takes what came of the first try and does all the rest.

    Example:
        >>> from posttrain.rewards.maths import MathsExact
        >>> with RewardRunner() as runner:
        ...     answer = Answer(text="<answer>7</answer>", info={"answer": "7"})
        ...     runner.judge(Reward("right", MathsExact()), [answer])[0]
        [Score(reason='', value=1.0)]

    Args:
        workers: Processes a reward, started when first needed.
        limits: What each process may use.
        max_failure_rate: Share of the last 200 judgements of a reward that may fail, in [0, 1].
    """

    def __init__(self, *, workers: int = 1, limits: Limits | None = None, max_failure_rate: float = 0.2) -> None:
        if workers < 1:
            raise ConfigError(f"found workers {workers}; write at least 1")
        if not 0.0 <= max_failure_rate <= 1.0:
            raise ConfigError(f"found max_failure_rate {max_failure_rate}; write a share in [0, 1]")
        self.workers, self.limits, self.max_failure_rate = workers, limits or Limits(), max_failure_rate
        self._processes: dict[str, list[Process]] = {}
        self._ahead: dict[str, Ahead] = {}
        self._singles = Singles()
        self._records: dict[str, _Record] = {}
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._processes, self._ahead)

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill every worker and all they started; the runner may be used again."""
        _stop_all(self._processes, self._ahead)

    @property
    def starts(self) -> int:
        """How many worker processes were started since the last `close`."""
        return sum(process.starts for processes in self._processes.values() for process in processes)

    def pids(self) -> list[int]:
        """The numbers of the worker processes that run."""
        running = [process.pid for processes in self._processes.values() for process in processes]
        return [pid for pid in running if pid is not None]

    def printed(self, name: str) -> str:
        """The end of what the workers of a reward printed, 8000 bytes each at most."""
        return "".join(process.output.decode(errors="replace") for process in self._processes.get(name, []))

    def first_failure(self, name: str) -> str:
        """The first failure of a reward since this runner was made; empty when there was none."""
        return self._records[name].first if name in self._records else ""

    def judge_ahead(self, reward: Reward, answer: Answer) -> None:
        """Let a worker judge an answer in the background, so that `judge` finds it done; of no effect unless `reward.one_by_one`.

        A later answer that differs in anything a worker sees is judged anew.  All calls come from one thread.
        """
        if not reward.one_by_one:
            return
        ahead = self._ahead.get(reward.name)
        if ahead is None or ahead.over or ahead.reward != reward:
            if ahead is not None:
                ahead.end()
            ahead = self._ahead[reward.name] = Ahead(reward, self._workers_of(reward))
            ahead.start()
        ahead.put(answer)

    def settle(self) -> Singles:
        """Forget what was judged ahead and never asked for; what single judgements there were since the last call."""
        for ahead in self._ahead.values():
            ahead.end()
        self._ahead.clear()
        found, self._singles = self._singles, Singles()
        return found

    def _judged_ahead(self, reward: Reward, answers: Sequence[Answer]) -> dict[int, First]:
        """The first tries that were made, by place in `answers`; afterwards the workers are this thread's."""
        ahead = self._ahead.get(reward.name)
        if ahead is None:
            return {}
        ahead.end()
        if ahead.reward != reward:
            return {}
        return {index: first for index, answer in enumerate(answers) if (first := ahead.take(answer)) is not None}

    def judge(self, reward: Reward, answers: Sequence[Answer]) -> tuple[list[Verdict | None], Tally]:
        """One verdict an answer, in order; None where the reward has nothing to say.

        Raises:
            RewardError: The function cannot be loaded, failed above the allowed rate, answered no call in time, or did not
                return one judgement an answer.
        """
        begun, tally = time.monotonic(), Tally()
        verdicts: dict[int, Verdict | None] = {}
        known = self._judged_ahead(reward, answers)
        num_ahead, seconds, asked = len(known), sum(first.seconds for first in known.values()), time.monotonic()
        parts = [part for part in _parts(reward, answers, self.workers) if part]
        inline = reward.where == "inline"
        processes = [None] * len(parts) if inline else self._workers_of(reward)[: len(parts)]
        jobs = [(reward, answers, part, process, known, verdicts, tally) for part, process in zip(parts, processes, strict=True)]
        try:
            if inline or len(jobs) < 2:
                for job in jobs:
                    self._work(*job)
            else:
                with ThreadPoolExecutor(len(jobs)) as pool:
                    waiting = [pool.submit(self._work, *job) for job in jobs]
                for done in waiting:
                    done.result()
            tally.seconds = time.monotonic() - begun
            if reward.one_by_one:
                self._singles.judged += len(answers)
                self._singles.ahead += num_ahead
                self._singles.seconds += seconds + time.monotonic() - asked
            self._stop_if_failing(reward, call=tally)
        except RewardError:
            for process in self._processes.get(reward.name, []):
                process.stop()
            raise
        return [verdicts[index] for index in range(len(answers))], tally

    def _workers_of(self, reward: Reward) -> list[Process]:
        """The workers of a reward; another reward of the same name gets fresh ones."""
        held = self._processes.get(reward.name, [])
        if held and held[0].reward != reward:
            for process in held:
                process.stop()
            held = []
        if not held:
            held = [Process(reward, self.limits) for _ in range(self.workers)]
            self._processes[reward.name] = held
        return held

    def _work(
        self,
        reward: Reward,
        answers: Sequence[Answer],
        part: list[_Try],
        process: Process | None,
        known: dict[int, First],
        verdicts: dict[int, Verdict | None],
        tally: Tally,
    ) -> None:
        """Judge the answers of `part` into `verdicts`, each failure once more; `known` are first tries that were made ahead."""
        todo, later = deque(part), list[_Try]()
        while todo:
            first = known.pop(todo[0].indexes[0], None)
            if first is not None:
                judged: Iterable[list[Verdict | None]] = [first.found]
            else:
                open_ones = takewhile(lambda this: this.indexes[0] not in known, todo)
                judged = _judged(reward, process, [[answers[index] for index in this.indexes] for this in open_ones])
            for found in judged:
                this = todo.popleft()
                self._watch(reward, found)
                failed = [i for i, verdict in zip(this.indexes, found, strict=True) if isinstance(verdict, InfraError)]
                again: set[int] = set()
                if failed and not this.again:
                    alone = not reward.takes_list  # a list function is asked about the same list: it may compare
                    again = set(failed if alone else this.indexes)
                    later += [_Try([i], True) for i in failed] if alone else [_Try(this.indexes, True)]
                    tally.retried += len(again)
                for index, verdict in zip(this.indexes, found, strict=True):
                    if index not in again:
                        verdicts[index] = verdict
                        self._count(reward, verdict, tally)
            gone = first.gone if first is not None else process is not None and not process.running
            if later and (not todo or gone):  # a worker that is gone is replaced anyhow
                if process is not None:
                    process.stop()
                todo.extendleft(reversed(later))
                later = []

    def _watch(self, reward: Reward, found: Sequence[Verdict | None]) -> None:
        """Say the first time that a call came to its deadline, and stop where every call does."""
        hung = any(isinstance(verdict, Timeout) for verdict in found)
        with self._lock:
            record = self._records.setdefault(reward.name, _Record())
            record.hangs = record.hangs + 1 if hung else 0
            record.succeeded |= not any(isinstance(verdict, InfraError) for verdict in found)
            tell, record.warned = hung and not record.warned, record.warned or hung
            stuck = record.hangs >= _HANGS and not record.succeeded and self.max_failure_rate < 1
        said = f"no answer within {reward.deadline:g} s"
        if tell:
            warnings.warn(f"reward '{reward.name}': {said}; retrying in a fresh process", stacklevel=2)
        if stuck:
            raise RewardError(
                f"reward '{reward.name}': {said}, {_HANGS} times in a row and no success; "
                f"mend it, or grant it more: --reward FILE.py:FUNCTION@{2 * reward.deadline:g}s"
            )

    def _count(self, reward: Reward, verdict: Verdict | None, tally: Tally) -> None:
        """Remember one final judgement."""
        failed = isinstance(verdict, InfraError)
        with self._lock:
            record = self._records.setdefault(reward.name, _Record())
            record.window.append(failed)
            tally.judged += 1
            tally.failed += failed
            tally.timed_out += isinstance(verdict, Timeout)
            if isinstance(verdict, InfraError) and not record.first:
                record.first = verdict.reason
        if failed:
            self._stop_if_failing(reward)

    def _stop_if_failing(self, reward: Reward, call: Tally | None = None) -> None:
        """Refuse to go on above the allowed rate.

        Few judgements say little: in the middle of a call 50 are needed, or 10 of which more than half failed; at its
        end (`call`) 10, or two or more of which none succeeded.
        """
        with self._lock:
            record = self._records.get(reward.name, _Record())
            count, failed = len(record.window), sum(record.window)
        rate = failed / count if count else 0.0
        if rate <= self.max_failure_rate:
            return
        all_of_call = call is not None and call.judged >= 2 and call.failed == call.judged
        if not (count >= 50 or (count >= 10 and (call is not None or rate > 0.5)) or all_of_call):
            return
        printed = self.printed(reward.name)[-1000:]
        raise RewardError(
            f"reward '{reward.name}' failed on {failed} of its last {count} judgements ({rate:.0%}; allowed "
            f"{self.max_failure_rate:.0%}). The first failure:\n{record.first}" + (f"\nIt printed:\n{printed}" if printed else "")
        )


def _parts(reward: Reward, answers: Sequence[Answer], workers: int) -> list[list[_Try]]:
    """The calls each worker makes, none of which parts a group (or query) where the scope is one."""
    calls: list[list[int]]
    if reward.scope == "sample":
        size = reward.answers_per_call if reward.takes_list else 1
        calls = [list(range(at, min(at + size, len(answers)))) for at in range(0, len(answers), size)]
    else:
        groups: dict[str, list[int]] = {}
        for index, answer in enumerate(answers):
            groups.setdefault(answer.group if reward.scope == "group" else answer.query, []).append(index)
        calls = list(groups.values())
    tries = [_Try(call) for call in calls]
    return [tries[worker::workers] for worker in range(workers)]


def _judged(reward: Reward, process: Process | None, units: list[list[Answer]]) -> Iterator[list[Verdict | None]]:
    """The verdicts of a process, or of the function here; what asking again cannot mend stops the run."""
    try:
        yield from _inline(reward, units) if process is None else process.judge(units)
    except LoadFailed as cause:
        raise RewardError(f"reward '{reward.name}' could not be loaded:\n{cause}") from None
    except ContractBroken as cause:
        raise RewardError(f"reward '{reward.name}' {cause}; a list function returns one value an answer, in order") from None


def _inline(reward: Reward, units: list[list[Answer]]) -> Iterator[list[Verdict | None]]:
    """The verdicts of a function that runs here."""
    judge: Callable[..., object] = reward.fn
    for unit in units:
        try:
            if reward.takes_list:
                yield read_all(judge(unit), len(unit))
            else:
                yield [read(judge(answer)) for answer in unit]
        except ContractBroken:
            raise
        except Exception as error:
            yield [InfraError(reason=trace(error)[-4000:])] * len(unit)


def _stop_all(processes: dict[str, list[Process]], aheads: dict[str, Ahead]) -> None:
    """Kill all workers, those first that threads of their own speak to."""
    for ahead in aheads.values():
        ahead.end(kill=True)
    aheads.clear()
    for held in processes.values():
        for process in held:
            process.stop()
    processes.clear()
