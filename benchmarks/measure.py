"""Paired timing: both sides run in one process in alternating order, and only the ratio of a round is believed.

Other work on the machine slows both sides of a round alike.  CPU seconds of the process, on one thread, are what ratios
are made of; the ratio of wall seconds stands beside them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


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
    """One comparison: `ratio` above 1 says that this library is quicker (or smaller) by that factor."""

    key: str
    what: str  # shape, batch and precision of both sides
    ratio: float  # median over rounds, of CPU seconds
    low: float
    high: float
    unit: str  # of `ours` and `peer`
    ours: float  # median
    peer: float
    peer_name: str
    wall: float  # the same ratio of wall seconds; 0 where none was taken
    rounds: int

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def clocked(work: Callable[[], float]) -> Seconds:
    """Run `work`, which returns the amount that it did."""
    cpu, wall = time.process_time(), time.perf_counter()
    amount = work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall, amount)


def paired(key: str, what: str, ours: Side, peer: Side, *, rounds: int, peer_name: str, unit: str) -> Row:
    """Rounds of both sides, A B B A A B ...; one round of each goes before and is not counted.

    Args:
        key: Short name of the comparison.
        what: Shape, batch and precision of both sides.
        ours: This library.
        peer: The other one, on the same work: the amounts must be equal.
        rounds: Counted rounds, at least 1.
        peer_name: Name of the other one.
        unit: "tokens/CPU s", or "CPU ms/step" for what is better when small.
    """
    for side in (ours, peer):
        side()
    found: list[tuple[Seconds, Seconds]] = []
    for number in range(rounds):
        if number % 2:
            other, own = peer(), ours()
        else:
            own, other = ours(), peer()
        if own.amount != other.amount:
            raise RuntimeError(f"{key}: {own.amount} was done here and {other.amount} there: the comparison would not be fair")
        found.append((own, other))
    ratios = [other.cpu / own.cpu for own, other in found]
    walls = [other.wall / own.wall for own, other in found]
    return Row(
        key=key,
        what=what,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        unit=unit,
        ours=statistics.median(quoted(own, unit) for own, _ in found),
        peer=statistics.median(quoted(other, unit) for _, other in found),
        peer_name=peer_name,
        wall=statistics.median(walls),
        rounds=rounds,
    )


def quoted(seconds: Seconds, unit: str) -> float:
    """What took `seconds`, in `unit`."""
    return 1e3 * seconds.cpu / seconds.amount if unit.startswith("CPU ms") else seconds.amount / seconds.cpu


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'key':<22}{'ratio':>7}  {'[low, high]':<16}{'wall':>6}{'ours':>12}{'peer':>12}  unit, peer: what"]
    for row in rows:
        span = f"[{row.low:.2f}, {row.high:.2f}]"
        wall = f"{row.wall:.2f}" if row.wall else "-"
        numbers = f"{row.ratio:>7.2f}  {span:<16}{wall:>6}{row.ours:>12.1f}{row.peer:>12.1f}"
        lines.append(f"{row.key:<22}{numbers}  {row.unit}, {row.peer_name}: {row.what}")
    return "\n".join(lines)


__all__ = ["Row", "Seconds", "Side", "clocked", "paired", "table"]
