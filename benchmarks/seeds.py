"""A recipe over several seeds: what each evaluation says, seed by seed.

    python -m benchmarks.seeds word-problems --seeds 0 1 2 3 4 --work runs/seeds

Runs are resumable: a seed that is done is read, not run again.  Prints one line a seed and metric, and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from posttrain.pipeline import run_recipe
from posttrain.recipe import load_recipe
from posttrain.report.summary import read_summary


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        out = args.work / f"{Path(args.recipe).stem}-{seed}"
        began = time.perf_counter()
        run_recipe(load_recipe(args.recipe, changes={"seed": seed}), out, quiet=True)
        seconds = time.perf_counter() - began
        found = read_summary(out)
        for number in found["evaluations"]:
            rows.append({"seed": seed, "seconds": seconds, **number})
        for metric in dict.fromkeys(n["metric"] for n in found["evaluations"]):
            values = [n for n in found["evaluations"] if n["metric"] == metric]
            shown = "  ".join(f"{n['model']} {_share(n['value'])} [{_share(n['low'])}, {_share(n['high'])}]" for n in values)
            print(f"seed {seed}  {metric}: {shown}", flush=True)
        print(f"seed {seed}  {seconds:.0f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
