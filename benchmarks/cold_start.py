"""The search behind the cold start of the word-problems recipe: learning rates by epochs, judged on validation problems.

    python -m benchmarks.cold_start --work runs/cold-start

Prints one line a setting, best last: greedy accuracy with its interval, and the share of answers that parse.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain.data.chat import renderer_of
from posttrain.evaluation.accuracy import Evaluation
from posttrain.method import Optimizer
from posttrain.methods import method
from posttrain.models.load import load
from posttrain.run import Run, train
from posttrain.tasks import task


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 3e-4, 5e-4, 8e-4])
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 6, 10, 20])
    parser.add_argument("--count", type=int, default=500, help="validation problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/cold-start"))
    args = parser.parse_args()
    problems = task("word-problems")
    evaluation = Evaluation(
        task=problems.name,
        rows=problems.rows("validation", args.count, 0),
        rewards=problems.rewards,
        max_tokens=problems.max_tokens,
    )
    found = []
    for rate in args.rates:
        for epochs in args.epochs:
            run = Run(
                method=method("sft")(),
                data=problems.rows("demonstrations", 100, 0),
                out=args.work / f"{rate:g}-{epochs}-{args.seed}",
                epochs=epochs,
                prompts_per_step=10,
                precision="bf16",
                optimizer=Optimizer(lr=rate, schedule="cosine", warmup=0.1),
                seed=args.seed,
                save_every=0,
                quiet=True,
            )
            model, tokenizer = load(train(run).model)
            model.use_precision("bf16")
            numbers = {n["metric"]: n for n in evaluation.of(model, tokenizer, renderer_of(model, tokenizer)).numbers}
            right, parsed = numbers["accuracy"], numbers["parsed"]
            low, value, high, read = (100 * x for x in (right["low"], right["value"], right["high"], parsed["value"]))
            line = f"lr {rate:g}, {epochs} epochs: {value:.1f} % [{low:.1f}, {high:.1f}], parsed {read:.1f} %"
            found.append((value, line))
            print(found[-1][1], flush=True)
    print("best:", max(found)[1])


if __name__ == "__main__":
    main()
