"""RLHF and DPO on 300, 1,000 and 3,000 rankings of a scripted annotator: `python -m benchmarks.rlhf_curve --out runs/rlhf-curve`.

The shipped recipe `rlhf` with its stages from the reward model on written once for each size; every size starts from the same
demonstrations and reads the first rankings of one set.  Running again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from posttrain.pipeline import run_recipe
from posttrain.recipe import parse_recipe, shipped

SIZES = (300, 1000, 3000)
SHARED = ("sft", "rankings")


def curve(tree: dict[str, Any], sizes: tuple[int, ...]) -> dict[str, Any]:
    """The recipe with one reward model, PPO and DPO for each size."""
    stages = [stage for stage in tree["stages"] if stage["name"] in SHARED]
    for size in sizes:
        names = {stage["name"]: f"{stage['name']}-{size}" for stage in tree["stages"] if stage["name"] not in SHARED}
        for stage in copy.deepcopy([one for one in tree["stages"] if one["name"] in names]):
            stage["name"] = names[stage["name"]]
            if "normalise" in stage:
                stage["normalise"] = names[stage["normalise"]]
            stage["models"] = {key: names.get(name, name) for key, name in stage.get("models", {}).items()}
            stage["rewards"] = [f"model:{names['rm']}" if name == "model:rm" else name for name in stage.get("rewards", [])]
            if stage["data"].get("count") == max(SIZES):
                stage["data"]["count"] = size
            stages.append(stage)
    policies = ["sft", *(f"{name}-{size}" for size in sizes for name in ("ppo", "dpo"))]
    pairs = {**tree["evaluate"][1], "of": [f"rm-{size}" for size in sizes]}
    return {**tree, "stages": stages, "evaluate": [{**tree["evaluate"][0], "of": policies}, pairs]}


def main() -> None:
    """Run the seeds and print means with their spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf-curve"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    args = parser.parse_args()
    tree = yaml.safe_load(shipped()["rlhf"].read_text(encoding="utf-8"))
    found: dict[tuple[str, str], list[float]] = {}
    for seed in args.seeds:
        folder = args.out / f"seed-{seed}"
        run_recipe(parse_recipe(curve(tree, tuple(args.sizes)), changes={"seed": seed}), folder)
        for number in json.loads((folder / "summary.json").read_text(encoding="utf-8"))["evaluations"]:
            found.setdefault((number["model"], number["metric"]), []).append(number["value"])
    pairs = ("pair_accuracy", "pair_accuracy_equal_length", "gold_pair_accuracy", "length_correlation")
    shown = ("accuracy", "mean@4", "parsed", *pairs)
    for (model, metric), values in found.items():
        if metric in shown:
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"{model:14} {metric:28} {statistics.mean(values):.3f} +- {spread:.3f}   ({each})")


if __name__ == "__main__":
    main()
