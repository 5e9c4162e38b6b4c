"""All comparisons in one run.

    python -m benchmarks --json results.json
    python -m benchmarks --quick --only overhead sft

A ratio above 1 says that this library is quicker, or smaller, than the peer; see `measure` for how it is taken.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

from . import dpo, grpo, memory, overhead, sampling, sft
from .measure import Row, table
from .sides import Setting, one_thread

PARTS = {
    "sft": sft.rows,
    "dpo": dpo.rows,
    "grpo": grpo.rows,
    "decode": sampling.rows,
    "overhead": overhead.rows,
    "memory": memory.rows,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that everything runs, measures nothing")
    parser.add_argument("--json", type=Path, help="write the rows and the machine to this file")
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), default=list(PARTS), help="some of the comparisons")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds, at least 5 unless --quick")
    options = parser.parse_args()
    if options.rounds < 5 and not options.quick:
        parser.error("fewer than 5 rounds say nothing")
    one_thread()
    machine = {name: version(name) for name in ("torch", "transformers", "trl")} | {
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": 1,
        "quick": options.quick,
    }
    rows: list[Row] = []
    for part in options.only:
        began = time.perf_counter()
        rows += PARTS[part](Setting(quick=options.quick, rounds=options.rounds))
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
        if options.json:
            found = {"machine": machine, "rows": [row.record() for row in rows]}
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(machine))
    print(table(rows))


if __name__ == "__main__":
    main()
