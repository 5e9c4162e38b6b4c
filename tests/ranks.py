"""What each rank of `test_distributed.py` runs: three whole runs, a pipeline, and a run that stops, in float64.

    torchrun --nproc-per-node 2 ranks.py MODEL OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from small import demonstrations, jsonl, small_run

from posttrain.distributed.world import World
from posttrain.method import Optimizer
from posttrain.methods import DPO, GRPO, SFT
from posttrain.pipeline import Pipeline
from posttrain.recipe import parse_recipe
from posttrain.run import Run, train
from posttrain.session import Session

STOPS_AT = 3


def runs(model: Path, out: Path) -> dict[str, Run]:
    """The runs by name; each step has more units than ranks, or fewer."""
    exact: dict[str, Any] = {"dtype": "float64", "optimizer": Optimizer(lr=3e-3)}
    sft = {**exact, "data": demonstrations(6), "prompts_per_step": 3}
    return {
        "sft": small_run(SFT(), model, out / "sft", steps=20, **sft),
        "dpo": small_run(DPO(), model, out / "dpo", steps=6, **exact),
        "dpo-few": small_run(DPO(), model, out / "dpo-few", steps=2, prompts_per_step=1, **exact),
        "grpo": small_run(GRPO(), model, out / "grpo", steps=4, updates=2, samples_per_prompt=4, **exact),
        "stopped": small_run(GRPO(), model, out / "stopped", steps=5, prompts_per_step=1, save_every=2, **exact),
    }


def pipeline(model: Path, out: Path, world: World) -> None:
    """Answers to three prompts, all kept, then imitated; two models evaluated."""
    data = {"file": str(jsonl(out.parent / f"{out.name}-{world.rank}.jsonl", demonstrations(3)))}
    sampled = {"name": "write", "sample": "answers", "data": data, "samples": 2, "run": {"sampling": {"max_tokens": 5}}}
    imitated = {"name": "imitate", "train": "sft", "data": {"stage": "write"}, "run": {"steps": 2, "dtype": "float64"}}
    asked = {"of": ["base", "imitate"], "split": "test", "count": 3, "max_tokens": 4, "samples": 2}
    task = {"name": "word-problems", "level": "easy"}
    stages = [{**sampled, "method": {"keep": "all"}}, imitated]
    tree = {"name": "pipeline", "model": str(model), "task": task, "stages": stages, "evaluate": [asked]}
    Pipeline(parse_recipe(tree), out, quiet=True, world=world).run()


def main(model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with World.here() as world:
        todo = runs(model, out)
        stopped = todo.pop("stopped")
        for run in todo.values():
            train(run, world=world)
        pipeline(model, out / "pipeline", world)
        real = Session.score

        def score(session: Session, work: Any, phases: Any) -> Any:
            if session.step == STOPS_AT:
                raise KeyboardInterrupt
            return real(session, work, phases)

        Session.score = score  # type: ignore[method-assign]
        try:
            train(stopped, world=world)
        except KeyboardInterrupt:
            world.barrier("stopped")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
