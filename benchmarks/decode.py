"""Decoding: the native sampler against transformers `generate`, in one process, in paired rounds.

Both write the same number of tokens after the same prompts with the same weights; answers do not end early.  What is
compared is tokens per CPU second of the process, on one thread; a round runs both, in alternating order, and the ratio
is that of a round.  Greedy answers are compared before anything is timed.

    python benchmarks/decode.py --model tiny --batch 16 --new 64 --dtype float32 --precision fast

`--model tiny` is the embedded model, `tiny-shape` and `llama-shape` (135 M) have random weights, anything else is a
folder or name that `posttrain.models.load` opens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.samplers import NativeSampler
from posttrain.types import Origin, Sample, Sampling

SHAPES: dict[str, dict[str, int]] = {
    "tiny-shape": {
        "vocab_size": 512,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 683,
        "max_position_embeddings": 2048,
    },
    "llama-shape": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "max_position_embeddings": 2048,
    },
}


def load_model(name: str, dtype: str) -> LanguageModel:
    """The model to decode with."""
    if name in SHAPES:
        return random_model("llama", dtype=dtype, **SHAPES[name])
    from posttrain.models.load import load

    model, _ = load(name, dtype=dtype)
    return model


def make_prompts(model: LanguageModel, batch: int, length: int) -> list[list[int]]:
    """`batch` different prompts of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.vocab_size, (batch, length), generator=generator).tolist()


def native(model: LanguageModel, prompts: Sequence[Sequence[int]], new: int) -> Callable[[bool], list[list[int]]]:
    """Writes `new` tokens after every prompt with the native sampler."""
    sampler = NativeSampler(model, None, stop_tokens=(), max_batch=len(prompts))
    samples = [
        Sample(tokens=list(p), origin=[Origin.USER] * len(p), trained=[False] * len(p), index=i) for i, p in enumerate(prompts)
    ]

    def write(greedy: bool) -> list[list[int]]:
        sampling = Sampling(max_tokens=new, greedy=greedy)
        return [answer.completion for answer in sampler.sample(samples, sampling=sampling, seed=0, step=0)]

    return write


def generate(model: LanguageModel, prompts: Sequence[Sequence[int]], new: int, cache: str) -> Callable[[bool], list[list[int]]]:
    """Writes `new` tokens after every prompt with transformers; log-probabilities are not asked for."""
    module: Any = model.module
    given = torch.tensor([list(p) for p in prompts])
    settings: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": cache}

    def write(greedy: bool) -> list[list[int]]:
        drawn = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        with torch.no_grad():
            out = module.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
                **drawn,
                **settings,
            )
        return out[:, given.shape[1] :].tolist()

    return write


def cpu_seconds(write: Callable[[bool], list[list[int]]], expected: int) -> float:
    """CPU seconds of one run, which must have written `expected` tokens."""
    start = time.process_time()
    found = sum(map(len, write(False)))
    spent = time.process_time() - start
    if found != expected:
        raise RuntimeError(f"{found} tokens were written, not {expected}: the comparison would not be fair")
    return spent


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of answers that are equal to the last token."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def main() -> None:
    """Run the rounds and print what was found."""
    parser = argparse.ArgumentParser(description="Tokens per CPU second: the native sampler against transformers.")
    parser.add_argument("--model", default="tiny", help="tiny, tiny-shape, llama-shape, or a folder")
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--new", type=int, default=64, help="tokens a row")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--precision", default="exact", choices=["exact", "fast", "bf16"], help="ours, of products")
    parser.add_argument("--cache", default="dynamic", choices=["dynamic", "static"], help="of transformers")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds, at least 5")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("fewer than 5 rounds say nothing")
    torch.set_num_threads(1)
    model = load_model(options.model, options.dtype)
    model.use_precision(options.precision)
    prompts = make_prompts(model, options.batch, options.prompt)
    ours, theirs = native(model, prompts, options.new), generate(model, prompts, options.new, options.cache)
    equal = agreement(ours(True), theirs(True))
    expected = options.batch * options.new
    for write in (ours, theirs):
        cpu_seconds(write, expected)
    rates: list[tuple[float, float]] = []
    for number in range(options.rounds):
        pair = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        seconds = {id(write): cpu_seconds(write, expected) for write in pair}
        rates.append((expected / seconds[id(ours)], expected / seconds[id(theirs)]))
    ratios = sorted(own / other for own, other in rates)
    print(f"{vars(options)}, torch {torch.__version__}, {model.num_parameters / 1e6:.1f} M parameters, 1 thread")
    print(f"greedy answers equal: {equal:.0%}")
    for label, column in (("native", 0), ("generate", 1)):
        values = sorted(rate[column] for rate in rates)
        median = statistics.median(values)
        print(f"{label:>9}: {median:8.0f} tokens per CPU second [{values[0]:.0f}, {values[-1]:.0f}]")
    print(f"    ratio: {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}], {len(ratios)} rounds")


if __name__ == "__main__":
    main()
