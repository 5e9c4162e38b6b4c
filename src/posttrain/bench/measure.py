"""Paired timing: both sides run in one process in alternating order, and only the ratio of a round is believed.

Other work on the machine slows both sides of a round alike.  On a CPU, ratios are made of the process's CPU seconds on one
thread, and the ratio of wall seconds stands beside them; on a GPU they are made of wall seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Seconds:
    """What some work took, and how much of it there was."""

    cpu: float
    wall: float
    amount: float  # tokens or steps: what a rate is quoted in


Side = Callable[[], Seconds]
"""Runs one round and says what it took; what it does to warm up is not counted."""


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` above 1 says that this library is quicker, smaller or better by that factor."""

    key: str
    what: str  # shape, batch and precision of both sides
    ratio: float | None  # median over rounds; None where there is no peer
    low: float | None
    high: float | None
    unit: str  # of `ours` and `peer`
    ours: float  # median
    peer: float | None = None
    peer_name: str | None = None
    wall: float | None = None  # the same ratio of wall seconds
    rounds: int = 1
    goal: float | None = None  # least ratio that was aimed at
    mfu: float | None = None  # of the training side here, where the accelerator's peak is known
    peak_mb: float | None = None  # of the accelerator's memory, here
    idle: float | None = None  # share of wall time in which this side did not compute

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


_watched: list[float] | None = None
"""Where a round puts the seconds in which the accelerator computed, while `busy` asks for them."""


def clocked(work: Callable[[], float]) -> Seconds:
    """Run `work`, which returns the amount that it did."""
    _wait()
    cpu, wall = time.process_time(), time.perf_counter()
    amount = work() if _watched is None else _profiled(work, _watched)
    _wait()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall, amount)


def _profiled(work: Callable[[], float], seconds: list[float]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        amount = work()
        _wait()
    seconds.append(sum(event.self_device_time_total for event in profile.key_averages()) / 1e6)
    return amount


def busy(side: Side) -> float:
    """Seconds of a round in which the accelerator computed; the round itself is slower for being watched."""
    global _watched
    _watched = []
    try:
        side()
        return sum(_watched)
    finally:
        _watched = None


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(
    key: str,
    what: str,
    ours: Side,
    peer: Side | None,
    *,
    rounds: int,
    peer_name: str,
    unit: str,
    goal: float | None = None,
    same: bool = True,
) -> Row:
    """Rounds of both sides, A B B A A B ...; one round of each goes before and is not counted.

    Args:
        key: Short name of the comparison.
        what: Shape, batch and precision of both sides.
        ours: This library.
        peer: The other one, on the same work; None where it is not installed.
        rounds: Counted rounds, at least 1.
        peer_name: Name of the other one.
        unit: "tokens/CPU s", "tokens/s", "CPU ms/step" or "ms/step"; without CPU, wall seconds count.
        goal: The least ratio that was aimed at.
        same: Both sides must do the same amount of work; if not, rates are compared.

    Raises:
        RuntimeError: The amounts differ although `same`.
    """
    ours()
    if peer is not None:
        peer()
    found: list[tuple[Seconds, Seconds | None]] = []
    for number in range(rounds):
        if peer is None:
            found.append((ours(), None))
        elif number % 2:
            other, own = peer(), ours()
            found.append((own, other))
        else:
            found.append((ours(), peer()))
    for own, theirs in found:
        if same and theirs is not None and own.amount != theirs.amount:
            raise RuntimeError(f"{key}: {own.amount} was done here and {theirs.amount} there: the comparison would not be fair")
    return _row(key, what, found, peer_name=peer_name if peer else None, unit=unit, goal=goal)


def _row(
    key: str, what: str, found: Sequence[tuple[Seconds, Seconds | None]], *, peer_name: str | None, unit: str, goal: float | None
) -> Row:
    clock = "cpu" if "CPU" in unit else "wall"
    both = [(own, other) for own, other in found if other is not None]
    ratios = [_cost(other, clock) / _cost(own, clock) for own, other in both]
    walls = [_cost(other, "wall") / _cost(own, "wall") for own, other in both]
    return Row(
        key=key,
        what=what,
        ratio=statistics.median(ratios) if ratios else None,
        low=min(ratios, default=None),
        high=max(ratios, default=None),
        unit=unit,
        ours=statistics.median(_quoted(own, unit) for own, _ in found),
        peer=statistics.median(_quoted(other, unit) for _, other in both) if both else None,
        peer_name=peer_name,
        wall=statistics.median(walls) if walls else None,
        rounds=len(found),
        goal=goal,
        idle=statistics.median(max(0.0, 1 - own.cpu / own.wall) for own, _ in found) if clock == "cpu" else None,
    )


def _cost(seconds: Seconds, clock: str) -> float:
    """Seconds a unit of work."""
    return float(getattr(seconds, clock)) / seconds.amount


def _quoted(seconds: Seconds, unit: str) -> float:
    """What took `seconds`, in `unit`."""
    cost = _cost(seconds, "cpu" if "CPU" in unit else "wall")
    return 1e3 * cost if "ms/step" in unit else 1 / cost


def shown(row: Row) -> str:
    """One row as a line of text."""
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
    span = "" if row.low is None or row.high is None else f"[{row.low:.2f}, {row.high:.2f}]"
    goal = "" if row.goal is None else f">= {row.goal:g}" + (" ok" if row.ratio is not None and row.ratio >= row.goal else "")
    values = f"{row.ours:,.6g}" + ("" if row.peer is None else f" | {row.peer:,.6g}")
    return f"{row.key:<26}{ratio:>8}  {span:<16}{goal:<11}{values:>22}  {row.unit}"


def header() -> str:
    """What stands above the lines of `shown`."""
    return f"{'key':<26}{'ratio':>8}  {'[low, high]':<16}{'goal':<11}{'ours | peer':>22}  unit"


__all__ = ["Row", "Seconds", "Side", "busy", "clocked", "header", "paired", "shown"]
