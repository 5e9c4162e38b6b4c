"""Learning curves: GRPO here and in TRL with the same settings, from the same cold-started model, over several seeds.

    python -m benchmarks.grpo_curves --model runs/cold-start/model --seeds 5 --steps 120 --out curves

Both sides see the same prompts in the same order, the same reward (1 for a right answer, else 0), G answers a prompt at
temperature 1, one update a batch, no KL term, AdamW with a linear schedule and clipping at norm 1.  Answers differ, since the
samplers draw differently.  Accuracy is greedy on the test split by one sampler for all; intervals are Wilson's at 95 % for
one seed and Student's t over seeds.  `ours-bf16` multiplies in bf16 with float32 weights, in
sampling and training, as recipes may.  TRL adds 1e-4 to a group's deviation, and so does this side here; a batch in which no group
has signal is no step here and one of momentum alone in TRL.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.bench.engine import Engine
from posttrain.bench.setting import one_thread
from posttrain.bench.trl import quiet, trl_settings
from posttrain.data.chat import Renderer
from posttrain.formulas.advantages import group_zscore_sample
from posttrain.method import Optimizer
from posttrain.methods import GRPO
from posttrain.models.gemm import Precision
from posttrain.models.load import load
from posttrain.models.model import LanguageModel
from posttrain.report.statistics import mean_interval, proportion_interval
from posttrain.samplers import NativeSampler
from posttrain.step import Stepper
from posttrain.tasks.word_problems import rows, verify
from posttrain.types import Sampling, Score


def judged(text: str, row: dict[str, Any]) -> float:
    """1 for a right answer."""
    verdict = verify(text, row)
    return verdict.value if isinstance(verdict, Score) else 0.0


def accuracy(model: LanguageModel, tokenizer: Any, test: Sequence[dict[str, Any]], max_tokens: int) -> float:
    """Share of right greedy answers."""
    renderer = Renderer(tokenizer)
    sampler = NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
    asked = [renderer.prompt(row["prompt"]).with_(index=i) for i, row in enumerate(test)]
    written = sampler.sample(asked, sampling=Sampling(max_tokens=max_tokens, greedy=True), seed=0, step=0)
    right = [judged(tokenizer.decode(answer.completion), row) for answer, row in zip(written, test, strict=True)]
    return sum(right) / len(right)


def ours(
    args: argparse.Namespace, seed: int, train: Sequence[dict[str, Any]], precision: Precision
) -> tuple[LanguageModel, list[float]]:
    """Train here; returns the model and the mean reward of every step."""
    model, tokenizer = load(args.model)
    method = GRPO(beta=0.0, advantage=partial(group_zscore_sample, eps=1e-4))
    engine = Engine({"policy": model}, method, precision=precision)
    settings = Optimizer(lr=args.lr, beta2=args.beta2, schedule="linear", warmup=args.warmup)
    engine.stepper = Stepper(settings, engine.stepper.parameters, args.steps)
    renderer = Renderer(tokenizer)
    sampler = NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
    curve = []
    for step in range(args.steps):
        part = train[step * args.prompts : (step + 1) * args.prompts]
        repeated = [(number, row) for number, row in enumerate(part) for _ in range(args.group)]
        asked = [
            replace(renderer.prompt(row["prompt"]), group=str(number), index=i) for i, (number, row) in enumerate(repeated)
        ]
        written = sampler.sample(asked, sampling=Sampling(max_tokens=args.max_tokens), seed=seed, step=step)
        rewards = [judged(tokenizer.decode(a.completion), row) for a, (_, row) in zip(written, repeated, strict=True)]
        if len(set(rewards)) > 1:
            engine.step([a.with_(reward=reward) for a, reward in zip(written, rewards, strict=True)])
        curve.append(statistics.mean(rewards))
    return model, curve


def trl(args: argparse.Namespace, seed: int, train: Sequence[dict[str, Any]]) -> tuple[LanguageModel, list[float]]:
    """Train with TRL; returns the model and the mean reward of every step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(args.model)
    curve: list[float] = []

    def reward(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        pairs = zip(completion_ids, number, strict=True)
        found = [judged(tokenizer.decode(ids), train[i]) for ids, i in pairs]
        curve.append(statistics.mean(found))
        return found

    settings = trl_settings(
        max_steps=args.steps,
        seed=seed,
        learning_rate=args.lr,
        adam_beta2=args.beta2,
        lr_scheduler_type="linear",
        warmup_steps=args.warmup,
        max_grad_norm=1.0,
        weight_decay=0.0,
    )
    config = GRPOConfig(
        num_generations=args.group,
        per_device_train_batch_size=args.prompts * args.group,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        shuffle_dataset=False,
        **settings,
    )
    data = Dataset.from_list([{"prompt": row["prompt"], "number": i} for i, row in enumerate(train)])
    trainer: Any = GRPOTrainer(
        model=model.module, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer
    )
    quiet(trainer)
    trainer.train()
    return model, curve


SIDES = {"ours": partial(ours, precision="exact"), "ours-bf16": partial(ours, precision="bf16"), "trl": trl}


def share_of(right: float, count: int) -> str:
    """A share of `count` with its interval."""
    return str(proportion_interval(right * count, count))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the cold-started model: a folder, or 'tiny'")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="answers a prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--beta2", type=float, default=0.98, help="AdamW's second decay")
    parser.add_argument("--warmup", type=int, default=8, help="steps until the full rate, which then falls to 0")
    parser.add_argument("--level", default="demo")
    parser.add_argument("--test", type=int, default=200, help="problems to evaluate on")
    parser.add_argument("--sides", nargs="*", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--out", type=Path, required=True, help="folder for curves.json")
    args = parser.parse_args()
    one_thread()
    args.out.mkdir(parents=True, exist_ok=True)
    test = rows("test", args.test, level=args.level)
    start, tokenizer = load(args.model)
    before = accuracy(start, tokenizer, test, args.max_tokens)
    print(f"before: {share_of(before, len(test))}", flush=True)
    found: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        train = rows("train", args.steps * args.prompts, level=args.level, seed=seed)
        for side in args.sides:
            began = time.process_time()
            model, curve = SIDES[side](args, seed, train)
            spent = time.process_time() - began
            model.use_precision("exact")
            share = accuracy(model, tokenizer, test, args.max_tokens)
            found.append({"side": side, "seed": seed, "accuracy": share, "cpu_seconds": spent, "reward": curve})
            print(f"seed {seed} {side}: {share_of(share, len(test))}, {spent:.0f} CPU s", flush=True)
            settings = {name: str(value) for name, value in vars(args).items()}
            results = {"settings": settings, "before": before, "runs": found}
            (args.out / "curves.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for side in args.sides:
        print(f"{side}: {mean_interval([run['accuracy'] for run in found if run['side'] == side])} over seeds")


if __name__ == "__main__":
    main()
