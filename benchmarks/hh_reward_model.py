"""A reward model on HH-RLHF's harmless test pairs, 5-fold, beside the length baseline and a bag of words.

    python -m benchmarks.hh_reward_model ../shared/data/hh-rlhf/harmless-base-test.jsonl.gz --model tiny

Folds go by the first message, so that no conversation stands on both sides.  `--frozen` trains the reward head alone, on hidden
states that are read once: what is affordable on a processor with a model of more than a few million parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.data.chat import renderer_of
from posttrain.data.rows import load_rows
from posttrain.forward import read
from posttrain.method import Optimizer
from posttrain.methods import BradleyTerry
from posttrain.models.load import load
from posttrain.pack import micro_batches, pack
from posttrain.report.statistics import paired_difference, proportion_interval
from posttrain.rewards.model import reward_scores
from posttrain.run import Run, train
from posttrain.types import Read, Sample, View

FOLDS = 5
WORDS = re.compile(r"[a-z']+")


def fold_of(row: dict[str, Any]) -> int:
    """The fold of a pair, by its first message."""
    return hashlib.sha256(str(row["prompt"][0]["content"]).encode()).digest()[0] % FOLDS


def fitted(rows: Sequence[dict[str, Any]], renderer: Any, longest: int) -> list[dict[str, Any]]:
    """Pairs of at most `longest` tokens: early turns are left out first; a pair whose last turn does not fit is dropped."""
    kept = []
    for row in rows:
        prompt = list(row["prompt"])
        while len(prompt) > 1 and max(len(side) for side in renderer.pair({**row, "prompt": prompt})) > longest:
            prompt = prompt[2:] or prompt[-1:]
        if max(len(side) for side in renderer.pair({**row, "prompt": prompt})) <= longest:
            kept.append({**row, "prompt": prompt})
    return kept


def text_of(row: dict[str, Any], side: str) -> str:
    """The answer's text."""
    return " ".join(str(message["content"]) for message in row[side])


def logistic(features: Tensor, *, l2: float) -> Tensor:
    """Weights `[D]` of a logistic regression without intercept on differences `[P, D]`, each of which is to be positive."""
    weights = torch.zeros(features.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = -logsigmoid(features @ weights).mean() + l2 * (weights**2).sum()
        loss.backward()
        return loss

    search.step(closure)
    return weights.detach()


def best_logistic(features: Tensor) -> Tensor:
    """Weights with the penalty that does best on a fifth of the training pairs, fitted again on all."""
    cut = len(features) * 4 // 5

    def held(l2: float) -> float:
        return float(((features[cut:] @ logistic(features[:cut], l2=l2)) > 0).float().mean())

    penalty = max((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), key=held)
    return logistic(features, l2=penalty)


def words(rows: Sequence[dict[str, Any]]) -> Tensor:
    """`[P, V]`: log counts of words of the better answer minus those of the worse one, words of at least 3 pairs."""
    counts = [[Counter(WORDS.findall(text_of(row, side).lower())) for side in ("chosen", "rejected")] for row in rows]
    often = Counter(word for pair in counts for word in set(pair[0]) | set(pair[1]))
    vocabulary = {word: place for place, word in enumerate(sorted(word for word, n in often.items() if n >= 3))}
    out = torch.zeros(len(rows), len(vocabulary))
    for place, pair in enumerate(counts):
        for sign, side in ((1, pair[0]), (-1, pair[1])):
            for word, n in side.items():
                if word in vocabulary:
                    out[place, vocabulary[word]] += sign * float(torch.log1p(torch.tensor(n)))
    return out


def trained_gaps(args: argparse.Namespace, rows: list[dict[str, Any]], fold: int) -> list[tuple[int, float]]:
    """Reward gaps of the pairs of one fold by a model trained on the others."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            method=BradleyTerry(centering=0.01),
            model=args.model,
            data=[row for row in rows if fold_of(row) != fold],
            out=folder,
            epochs=args.epochs,
            prompts_per_step=16,
            precision="bf16",
            optimizer=Optimizer(lr=args.lr, schedule="linear", warmup=0.1),
            seed=args.seed,
            save_every=0,
            quiet=True,
            show=0,
        )
        result = train(run)
        model, tokenizer = load(result.model)
    model.use_quickest()
    renderer = renderer_of(model, tokenizer)
    held = [(place, row) for place, row in enumerate(rows) if fold_of(row) == fold]
    scores = reward_scores(model, [sample for _, row in held for sample in renderer.pair(row)])
    return [(place, scores[2 * i] - scores[2 * i + 1]) for i, (place, _) in enumerate(held)]


def states(model: Any, samples: Sequence[Sample]) -> Tensor:
    """`[S, D]`: the hidden state at the last token of each sample."""
    ends = Read("state", "row", lambda _, hidden, ends: hidden[ends].float())
    batch = pack([replace(sample, trained=[False] * len(sample)) for sample in samples])
    out = torch.zeros(len(samples), model.hidden_size)
    with torch.no_grad():
        for chosen in micro_batches(batch, [[row] for row in range(len(samples))], 4096):
            seen = read({"policy": model}, batch.rows(chosen), {"policy": View(reads=(ends,), grad=False)})
            out[chosen] = seen.policy.state
    return out


def frozen_gaps(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[float]:
    """Gaps of all pairs by a reward head alone, trained on the other folds over a frozen model's states."""
    model, tokenizer = load(args.model)
    model.use_precision("bf16")
    renderer = renderer_of(model, tokenizer)
    pairs = states(model, [sample for row in rows for sample in renderer.pair(row)]).view(len(rows), 2, -1)
    scaled = (pairs - pairs.mean((0, 1))) / pairs.std((0, 1)).clamp(min=1e-6)
    gaps = scaled[:, 0] - scaled[:, 1]  # [P, 2, D] -> [P, D]
    found = [0.0] * len(rows)
    for fold in range(FOLDS):
        inside = torch.tensor([fold_of(row) == fold for row in rows])
        weights = best_logistic(gaps[~inside])
        for place in inside.nonzero().flatten().tolist():
            found[place] = float(gaps[place] @ weights)
    return found


def main() -> None:
    """Print one line a scorer: accuracy on held-out pairs with its interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="HH-RLHF pairs: JSONL, also gzipped")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a row; early turns are left out first")
    parser.add_argument("--frozen", action="store_true", help="train the reward head alone")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    everything = load_rows(args.data, skip_invalid=True)
    rows = fitted(everything, renderer_of(*load(args.model)), args.longest)
    print(f"{len(rows)} of {len(everything)} well-formed pairs have at most {args.longest} tokens")
    lengths = [len(text_of(row, "chosen")) - len(text_of(row, "rejected")) for row in rows]
    bag = words(rows)
    right: dict[str, list[bool]] = {"length": [False] * len(rows), "bag of words": [False] * len(rows)}
    gaps = frozen_gaps(args, rows) if args.frozen else [0.0] * len(rows)
    for fold in range(FOLDS):
        inside = [place for place, row in enumerate(rows) if fold_of(row) == fold]
        outside = [place for place, row in enumerate(rows) if fold_of(row) != fold]
        sign = 1 if sum((lengths[place] > 0) - (lengths[place] < 0) for place in outside) > 0 else -1
        weights = best_logistic(bag[torch.tensor(outside)])
        for place in inside:
            right["length"][place] = sign * lengths[place] > 0
            right["bag of words"][place] = float(bag[place] @ weights) > 0
        if not args.frozen:
            for place, gap in trained_gaps(args, rows, fold):
                gaps[place] = gap
            print(f"fold {fold + 1} of {FOLDS}: {sum(gaps[place] > 0 for place in inside) / len(inside):.3f}", flush=True)
    name = f"{args.model}, {'frozen, head alone' if args.frozen else f'{args.epochs:g} epochs'}"
    right[name] = [gap > 0 for gap in gaps]
    found = {key: proportion_interval(sum(values), len(values)) for key, values in right.items()}
    for key, interval in found.items():
        print(f"{key:28} {100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]")
    shares = {key: {str(place): [float(one)] for place, one in enumerate(values)} for key, values in right.items()}
    for key in ("length", "bag of words"):
        found[f"more than {key}"] = paired_difference(shares[key], shares[name])
        interval = found[f"more than {key}"]
        print(f"more than {key:18} {100 * interval.value:+.1f} points [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]")
    if args.json:
        args.json.write_text(json.dumps({key: [i.value, i.low, i.high, i.n] for key, i in found.items()}, indent=1))


if __name__ == "__main__":
    main()
