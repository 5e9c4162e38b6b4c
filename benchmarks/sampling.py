"""The native sampler against transformers: `generate` and continuous batching (`generate_batch`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel

from .decode import generate, make_prompts, native
from .measure import Row, Seconds, Side, clocked, paired
from .sides import Setting, twin

PROMPT = 16


def side(write: Callable[[bool], list[list[int]]]) -> Side:
    """Rounds of a function that writes sampled answers."""

    def run() -> Seconds:
        return clocked(lambda: float(sum(map(len, write(False)))))

    return run


def continuous(model: LanguageModel, prompts: Sequence[Sequence[int]], new: int) -> Callable[[bool], list[list[int]]]:
    """Writes `new` tokens after every prompt with transformers' continuous batching."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    module: Any = twin(model).eval()
    page = 256
    pages = 2 * len(prompts) * -(-(PROMPT + new) // page)  # left alone it would take most of the machine's memory
    paging = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=len(prompts) * PROMPT)

    def write(greedy: bool) -> list[list[int]]:
        config = GenerationConfig(
            max_new_tokens=new, do_sample=not greedy, eos_token_id=-1, pad_token_id=0, temperature=1.0, top_k=0
        )
        found = module.generate_batch([list(p) for p in prompts], generation_config=config, continuous_batching_config=paging)
        return [list(output.generated_tokens) for output in found.values()]

    return write


def rows(setting: Setting) -> list[Row]:
    """The comparisons."""
    found = []
    new = 8 if setting.quick else 64
    cases: list[tuple[int, Precision, str]] = [
        (16, "exact", "fp32 exact"),
        (16, "fast", "fp32 oneDNN"),
        (16, "bf16", "bf16 products, fp32 weights"),
        (64, "bf16", "bf16 products, fp32 weights"),
    ]
    for batch, precision, mine in cases:
        if setting.quick:
            batch //= 4
        what = f"{setting.shape}, batch {batch}, prompt {PROMPT}, {new} new tokens; ours {mine}; transformers fp32"
        for name, peer in (("generate", None), ("generate_batch", continuous)):
            model = setting.model()
            model.use_precision(precision)
            prompts = make_prompts(model, batch, PROMPT)
            other = generate(model, prompts, new, "dynamic") if peer is None else peer(model, prompts, new)
            sides = side(native(model, prompts, new)), side(other)
            key = f"{name}/b{batch}-{precision}"
            found.append(
                paired(key, what, *sides, rounds=setting.rounds, peer_name=f"transformers {name}", unit="tokens/CPU s")
            )
    return found
