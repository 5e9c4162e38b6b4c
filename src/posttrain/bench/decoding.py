"""Decoding: the native sampler against transformers' `generate` and its continuous batching.

Both write the same number of tokens after the same prompts with the same weights; answers do not end early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from posttrain.models.model import LanguageModel
from posttrain.samplers import NativeSampler
from posttrain.types import Sampling

from .measure import Row, Seconds, Side, clocked, paired
from .setting import Setting, blank
from .trl import twin

PROMPT = 16
Write = Callable[[], list[list[int]]]
"""Answers every prompt."""


def side(write: Write) -> Side:
    """Rounds of a function that writes answers."""

    def run() -> Seconds:
        return clocked(lambda: float(sum(map(len, write()))))

    return run


def make_prompts(model: LanguageModel, batch: int, length: int) -> list[list[int]]:
    """`batch` different prompts of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.vocab_size, (batch, length), generator=generator).tolist()


def native(model: LanguageModel, prompts: Sequence[Sequence[int]], new: int, *, greedy: bool = False) -> Write:
    """Writes `new` tokens after every prompt with the native sampler."""
    sampler = NativeSampler(model, None, stop_tokens=(), max_batch=len(prompts))
    samples = [blank(prompt, index=i) for i, prompt in enumerate(prompts)]

    def write() -> list[list[int]]:
        sampling = Sampling(max_tokens=new, greedy=greedy)
        return [answer.completion for answer in sampler.sample(samples, sampling=sampling, seed=0, step=0)]

    return write


def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], new: int, *, greedy: bool = False, bf16: bool = False
) -> Write:
    """Writes `new` tokens after every prompt with transformers; log-probabilities are not asked for."""
    module: Any = twin(model).eval()
    if bf16:
        module = module.to(torch.bfloat16)
    given = torch.tensor([list(p) for p in prompts], device=model.device)
    drawn = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, **drawn}

    def write() -> list[list[int]]:
        with torch.no_grad():
            out = module.generate(given, attention_mask=torch.ones_like(given), **settings)
        return out[:, given.shape[1] :].tolist()

    return write


def continuous(model: LanguageModel, prompts: Sequence[Sequence[int]], new: int, *, bf16: bool = False) -> Side | None:
    """Rounds of transformers' continuous batching, `new` tokens after every prompt; None where it has none."""
    from transformers import GenerationConfig

    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
    except ImportError:
        return None

    module: Any = twin(model).eval()
    if bf16:
        module = module.to(torch.bfloat16)
    page = 256
    pages = 2 * len(prompts) * -(-(PROMPT + new) // page)  # left alone it would take most of the machine's memory
    paging = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=len(prompts) * PROMPT)
    config = GenerationConfig(max_new_tokens=new, do_sample=True, eos_token_id=-1, pad_token_id=0, temperature=1.0, top_k=0)

    def write() -> list[list[int]]:
        found = module.generate_batch([list(p) for p in prompts], generation_config=config, continuous_batching_config=paging)
        return [list(output.generated_tokens) for output in found.values()]

    return side(write)


def rows(setting: Setting) -> Iterator[Row]:
    """The comparisons."""
    fp32, bf16, both = setting.precisions
    cases = [
        ("decode_3m_bf16", "3m", 16, bf16, 4.0),
        ("decode_3m_bf16_b64", "3m", 64, bf16, 3.0),
        ("decode_3m_bf16_both", "3m", 16, both, None),
        ("decode_3m_bf16_b64_both", "3m", 64, both, None),
        ("decode_3m_fp32", "3m", 16, fp32, 2.0),
        ("decode_3m_fp32_b64", "3m", 64, fp32, 2.0),
        ("decode_embedded_bf16", "embedded", 16, bf16, 4.0),
        ("decode_embedded_fp32", "embedded", 16, fp32, 2.0),
        ("decode_135m_bf16", "135m", 16, bf16, 3.0),
        ("decode_135m_bf16_both", "135m", 16, both, None),
        ("decode_135m_bf16_b64", "135m", 64, bf16, 3.0),
    ]
    for key, shape, batch, compared, goal in cases:
        if setting.model is not None and shape != "3m":
            continue
        new = 8 if setting.quick else 64
        model = setting.load(shape)
        model.use_precision(compared.ours)
        prompts = make_prompts(model, batch // 4 if setting.quick else batch, PROMPT)
        what = f"{setting.words(shape)}, batch {len(prompts)}, prompt {PROMPT}, {new} new tokens; {compared.words}"
        sides = side(native(model, prompts, new)), side(generate(model, prompts, new, bf16=compared.peer_bf16))
        unit = f"tokens/{setting.unit}s"
        rounds = min(setting.rounds, 5) if shape == "135m" else setting.rounds
        yield paired(key, what, *sides, rounds=rounds, peer_name="transformers generate", unit=unit, goal=goal)
    model = setting.load("3m")
    model.use_precision(bf16.ours)
    new, prompts = 8 if setting.quick else 64, make_prompts(model, 4 if setting.quick else 16, PROMPT)
    what = f"{setting.words('3m')}, batch {len(prompts)}, prompt {PROMPT}, {new} new tokens; {bf16.words}"
    ours, peer = side(native(model, prompts, new)), continuous(model, prompts, new)
    name, unit = "transformers generate_batch", f"tokens/{setting.unit}s"
    yield paired("continuous_3m_bf16", what, ours, peer, rounds=setting.rounds, peer_name=name, unit=unit)


__all__ = ["PROMPT", "continuous", "generate", "make_prompts", "native", "rows", "side"]
