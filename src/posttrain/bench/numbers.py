"""What is counted and not timed: real tokens among those computed, and how far sampler and trainer are apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain import reads
from posttrain.forward import read
from posttrain.layout import Layout
from posttrain.method import Method
from posttrain.methods import DPO, GRPO, PPO, SFT, BradleyTerry
from posttrain.models.attention import plan
from posttrain.models.compiled import QUERIES, attends
from posttrain.models.model import LanguageModel
from posttrain.pack import pack
from posttrain.samplers import NativeSampler
from posttrain.tasks import task
from posttrain.types import Sample, Sampling, View

from .decoding import make_prompts
from .engine import Engine
from .measure import Row
from .setting import Setting, blank, ragged, sample, tokenizer


class Watched:
    """Counts what the trunk of a model computes."""

    def __init__(self, model: LanguageModel) -> None:
        self.products = self.attended = self.real = 0  # a layer: tokens of linear layers, of attention, and real ones
        decoder, trunk = model.decoder, model.trunk
        assert decoder is not None
        qkv = decoder.qkv

        def multiplied(layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            self.products += len(x)
            return qkv(layer, x, cos, sin)

        def laid_out(layout: Layout, **settings: Any) -> Any:
            self.real += model.num_layers * sum(layout.sizes)
            self.attended += model.num_layers * attended(model, layout)
            return trunk(layout, **settings)

        decoder.qkv = multiplied  # type: ignore[method-assign]
        model.trunk = laid_out  # type: ignore[method-assign]


def attended(model: LanguageModel, layout: Layout) -> int:
    """Queries that attention computes: blocks of rows where it is compiled, else groups padded to their longest row."""
    assert model.decoder is not None
    heads = torch.empty(0, 1, model.decoder.head_dim)
    if model.precision != "exact" and attends(heads, heads, heads):
        return sum(-(-size // QUERIES) * QUERIES for size in layout.sizes)
    return sum(group.rows * group.width for group in plan(layout).groups)


def ragged_samples(method: Method) -> list[Sample]:
    """16 ragged rows: pairs where the method wants pairs, groups of 4 otherwise."""
    answers, prompts = ragged(16, low=16, high=256, seed=5), ragged(16, low=8, high=64, seed=6)
    each = 2 if method.unit == "pair" else 4
    told: dict[str, Any] = {} if method.rows != "prompts" else {"reward": 0.0}
    found = []
    for i, answer in enumerate(answers):
        prompt = prompts[i // each] if method.rows != "demonstrations" else prompts[i]
        if "reward" in told:
            told["reward"] = float(i % 3)
            told["logprobs"] = [0.0] * (len(prompt) + len(answer))
        found.append(sample(prompt, answer, group=str(i // each), index=i, **told))
    return found


def shares(setting: Setting, method: Method) -> tuple[float, float, float]:
    """Shares of real tokens in products and in attention, and that of the same rows in a padded batch."""
    models = {name: setting.load("3m") for name in ("policy", "reference", "critic")}
    models["critic"].add_value_head()
    models["policy"].add_reward_head()
    watched = [Watched(model) for model in models.values()]
    samples = ragged_samples(method)
    Engine(models, method, precision=setting.fp32.ours).step(samples)
    products, queries = sum(each.products for each in watched), sum(each.attended for each in watched)
    real = sum(each.real for each in watched)
    lengths = [len(row) for row in samples]
    return real / products, real / queries, sum(lengths) / (len(lengths) * max(lengths))


def real_tokens(setting: Setting) -> Iterator[Row]:
    """The worst of the methods, in products and in attention."""
    methods: dict[str, Method] = {"SFT": SFT(), "reward model": BradleyTerry(), "DPO": DPO(), "PPO": PPO(), "GRPO": GRPO()}
    found = {name: shares(setting, method) for name, method in methods.items()}
    rows = "16 ragged rows of 24 to 320 tokens; the peer's are padded to the longest"
    for place, key, where in ((0, "real_tokens", "linear layers compute"), (1, "real_tokens_attention", "attention computes")):
        worst = min(found, key=lambda name: found[name][place])
        own, other = 100 * found[worst][place], 100 * found[worst][2]
        what = f"share of real tokens in what {where}, worst of {', '.join(methods)}: {worst}; {rows}"
        ratio = own / other
        yield Row(key, what, ratio, ratio, ratio, "%", own, other, "padded batches")


def gap(model: LanguageModel, prompts: Sequence[Sequence[int]], new: int) -> float:
    """The largest difference of a log-probability between sampler and trainer, in nats."""
    sampler = NativeSampler(model, None, stop_tokens=())
    asked = [blank(prompt, index=i) for i, prompt in enumerate(prompts)]
    written = sampler.sample(asked, sampling=Sampling(max_tokens=new), seed=0, step=0)
    batch = pack(written, step=0).to(model.device)
    seen = read({"policy": model}, batch, {"policy": View(reads=(reads.logprob,), grad=False)})
    return float(((seen.policy.logprob - batch.logprobs).abs() * batch.mask).max())


def logprob_gap(setting: Setting) -> Iterator[Row]:
    """After word problems, which the embedded model knows, and after random tokens, which none does."""
    count, new = (8, 8) if setting.quick else (64, 64)
    problems = task("word-problems", level="demo").rows("test", count)
    texts = [problem["prompt"][-1]["content"] for problem in problems]
    model = setting.load("embedded")
    for key, kind, prompts in (
        ("logprob_gap", "word problems", tokenizer()(texts)["input_ids"]),
        ("logprob_gap_random", "random tokens", make_prompts(model, count, 16)),
    ):
        model.use_precision(setting.fp32.ours)
        found = gap(model, prompts, new)
        mode = setting.fp32.words.partition(";")[0]
        what = f"{setting.words('embedded')}, {count} answers of {new} after {kind}, largest |sampler - trainer|; {mode}"
        yield Row(key, what, None, None, None, "nats", found)


def rows(setting: Setting) -> Iterator[Row]:
    """All of them."""
    yield from real_tokens(setting)
    yield from logprob_gap(setting)


__all__ = ["rows"]
