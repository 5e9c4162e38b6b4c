"""How often does a sample change with what is written beside it?  Zero in float64 and with `exact=True`.

The same prompts are answered in several orders, numbers and batch widths.  In float32 the last digits of the logits hang
on the composition of the batch, and now and then a draw falls between two of them; everything after it differs.

    python benchmarks/composition.py --dtype float32
"""

from __future__ import annotations

import argparse
import random

import torch

from posttrain.models.random import random_model
from posttrain.samplers import NativeSampler
from posttrain.types import Origin, Sample, Sampling


def main() -> None:
    """Answer in several compositions and count the first differences."""
    parser = argparse.ArgumentParser(description="Rate at which a sample depends on the batch that it is written in.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--precision", default="exact", choices=["exact", "fast", "bf16"])
    parser.add_argument("--exact", action="store_true", help="the sampler's fixed-shape mode")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = random_model(dtype=options.dtype, vocab_size=512, hidden_size=128, intermediate_size=256)
    model.use_precision(options.precision)
    chance = random.Random(0)
    prompts = []
    for index in range(options.prompts):
        tokens = [chance.randrange(3, 512) for _ in range(chance.randint(2, 24))]
        length = len(tokens)
        prompts.append(Sample(tokens=tokens, origin=[Origin.USER] * length, trained=[False] * length, index=index))

    def write(some: list[Sample], width: int) -> dict[int, Sample]:
        sampler = NativeSampler(model, None, stop_tokens=(2, 3), max_batch=width, exact=options.exact)
        answers = sampler.sample(some, sampling=Sampling(max_tokens=options.new), seed=0, step=0)
        return {answer.index: answer for answer in answers}

    first = write(prompts, 64)
    tokens = changed = rows = 0
    gap = 0.0
    for some, width in [(prompts, 16), (chance.sample(prompts, len(prompts)), 33), (prompts[::3], 64), (prompts[:8], 1)]:
        for index, answer in write(some, width).items():
            wanted = first[index]
            same = next((t for t, (a, b) in enumerate(zip(answer.tokens, wanted.tokens, strict=False)) if a != b), None)
            rows += 1
            changed += answer.tokens != wanted.tokens
            tokens += len(answer.completion) if same is None else same + 1 - answer.prompt_length
            until = len(answer) if same is None else same
            pairs = zip((answer.logprobs or [])[:until], (wanted.logprobs or [])[:until], strict=True)
            gap = max([gap, *(abs(a - b) for a, b in pairs)])
    print(f"{vars(options)}: {changed} of {rows} samples differ; {changed / tokens:.1e} of {tokens} draws")
    print(f"largest difference of a log-probability before the first difference: {gap:.1e}")


if __name__ == "__main__":
    main()
