"""What a person sees while a stage runs: a bar with the time left, and a line of the numbers that mean something.

On a terminal the display is redrawn in place; elsewhere (a log of a build server, a file) plain lines come now and
then.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from posttrain.report.names import duration, number, shares

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

RATE_STEPS = 20
"""The time left is the median duration of this many last steps, times the steps that are left."""


class Live:
    """The progress of one stage.

    Args:
        title: Name of the stage.
        total: Number of steps of the stage, those before a resume included.
        quiet: Show nothing.
        console: Where to write; default is standard output.
        every_seconds: How often a plain line is written where there is no terminal; the first and the last step always
        are.
        clock: Seconds, rising; given by tests.

    Example:
        >>> with Live("grpo", 100, quiet=True) as live:
        ...     live.update(0, {"reward": 0.25}, {"sample": 1.0, "update": 0.5, "other": 0.1})
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        quiet: bool = False,
        console: Console | None = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self.total = max(1, total)
        self._quiet = quiet
        self._every = every_seconds
        self._clock = clock
        self._started = self._last = self._printed = clock()
        self._durations: deque[float] = deque(maxlen=RATE_STEPS)
        self._done = 0
        self._here = 0  # steps done by this process, which is fewer after a resume
        self._said: set[str] = set()
        self._spent: dict[str, float] = {}
        self._metrics: Mapping[str, float] = {}
        self._given = console
        self._console: Console | None = None
        self._display: Any = None

    def __enter__(self) -> Live:
        self._started = self._last = self._printed = self._clock()
        if self._quiet:
            return self
        from rich.console import Console
        from rich.live import Live as Display

        self._console = self._given or Console(highlight=False)
        if self._console.is_terminal:
            self._display = Display(console=self._console, get_renderable=self._render, refresh_per_second=4)
            self._display.__enter__()
        return self

    def update(self, step: int, metrics: Mapping[str, float], phases: Mapping[str, float] | None = None) -> None:
        """Show one step that was done.

        Args:
            step: Its number, from 0.
            metrics: Name -> number (see `names.METRICS`); those not known are not shown.
            phases: Seconds of this step by phase, `other` included; their shares add up to 100 %.
        """
        now = self._clock()
        self._durations.append(now - self._last)
        self._last = now
        self._done = step + 1
        self._here += 1
        self._metrics = dict(metrics)
        spent = dict(self._spent)
        for name, seconds in (phases or {}).items():
            spent[name] = spent.get(name, 0.0) + seconds
        self._spent = spent  # replaced, never changed: the display reads it from its own thread
        if self._console is None or self._display is not None:
            return
        if self._here == 1 or self._done >= self.total or now - self._printed >= self._every:
            self._printed = now
            self._print(" | ".join([f"{self.title} {self._position()}", *readout(metrics), *self._time()]))

    def warn(self, warning: str) -> None:
        """Show a warning in words, once: one that differs from an earlier one in its numbers alone is not repeated."""
        kind = re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", warning)
        if kind in self._said:
            return
        self._said.add(kind)
        self._print(f"! {warning}", style="yellow")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._display is not None:
            self._display.__exit__(kind, error, trace)
            self._display = None
        passed = duration(self._clock() - self._started)
        if kind is not None:
            self._print(f"{self.title} stopped after {self._done:,} of {self._steps(self.total)} and {passed}")
        elif not self._here:
            self._print(f"{self.title} was finished before, nothing to do")
        else:
            self._print(f"{self.title} done: {self._steps(self._done)} in {passed}")

    @staticmethod
    def _steps(count: int) -> str:
        return f"{count:,} step{'' if count == 1 else 's'}"

    def seconds_left(self) -> float | None:
        """Expected seconds to the last step, or None before the first."""
        if not self._durations:
            return None
        return statistics.median(self._durations) * max(0, self.total - self._done)

    def _position(self) -> str:
        return f"{self._done}/{self.total} ({100 * self._done // self.total} %)"

    def _time(self) -> list[str]:
        left = self.seconds_left()
        parts = [] if left is None else [f"{duration(left)} left"]
        if self._spent:
            parts.append("time: " + by_phase(self._spent))
        return parts

    def _print(self, text: str, *, style: str = "") -> None:
        if self._console is not None:
            self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        """The lines of the terminal: bar, numbers, time."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.seconds_left()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.total, completed=self._done, width=32),
            Text(self._position()),
            Text("" if left is None else f"{duration(left)} left", style="cyan"),
        )
        lines: list[RenderableType] = [bar]
        numbers = readout(self._metrics)
        if numbers:
            lines.append(Text("  " + "  ·  ".join(numbers)))
        if self._spent:
            lines.append(Text("  time: " + by_phase(self._spent), style="dim"))
        return Group(*lines)


def readout(metrics: Mapping[str, float]) -> list[str]:
    """The numbers of a step worth a glance, in words; what was not logged is left out.

    Example:
        >>> readout({"reward": 0.41, "reward_low": 0.37, "reward_high": 0.45, "kl": 0.0031, "signal": 0.625})
        ['reward 0.41 [0.37, 0.45]', 'KL 0.0031', 'signal 62.5 %']
    """
    parts = []
    drawn = any(name in metrics for name in ("reward_low", "signal"))  # a reward of answers, not one that a loss implies
    if "reward" in metrics and (drawn or "loss" not in metrics):
        parts.append("reward " + _with_interval(metrics, "reward"))
    else:
        parts += [f"{name} {number(metrics[name])}" for name in ("loss",) if name in metrics]
        parts += [f"accuracy {number(metrics[name], 'share')}" for name in ("accuracy",) if name in metrics]
    for name, title in (("kl", "KL"), ("entropy", "entropy")):
        if name in metrics:
            parts.append(f"{title} {number(metrics[name])}")
    if "length" in metrics:
        parts.append(f"length {metrics['length']:.0f}" if math.isfinite(metrics["length"]) else "length –")
    if "signal" in metrics:
        parts.append(f"signal {number(metrics['signal'], 'share')}")
    if "tokens_per_second" in metrics:
        parts.append(f"{number(metrics['tokens_per_second'], 'rate')} tokens/s")
    return parts


def by_phase(phases: Mapping[str, float]) -> str:
    """Shares of time that add up to 100 %: `sample 62 %, update 30 %, other 8 %`."""
    return ", ".join(f"{name} {share} %" for name, share in shares(phases).items())


def _with_interval(metrics: Mapping[str, float], name: str) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    if low is None or high is None:
        return number(metrics[name])
    return f"{number(metrics[name])} [{number(low)}, {number(high)}]"


@contextlib.contextmanager
def counted(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for work that counts what it has done: gives `(done, total) -> None`, or None where there is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        number = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(number, completed=done, total=total)
