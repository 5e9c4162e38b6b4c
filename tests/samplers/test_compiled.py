"""The compiled step against the one that it stands in for, and what happens where nothing can be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import compiled
from posttrain.compiled import kernels
from posttrain.errors import NumericsError
from posttrain.forward import read
from posttrain.layout import Layout
from posttrain.models.gemm import Precision, has_onednn, linear_of
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.pack import pack
from posttrain.reads import logprob
from posttrain.samplers import NativeSampler
from posttrain.samplers.cache import CachedStepper
from posttrain.samplers.compiled_step import CompiledStepper, can_step
from posttrain.samplers.draw import draw
from posttrain.samplers.products import product
from posttrain.types import Origin, Sample, Sampling, View

torch.set_num_threads(1)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "one key head each": ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
    "one key head for all": ("llama", {"head_dim": 16, "num_key_value_heads": 1, "num_attention_heads": 3, "hidden_size": 48}),
    "biases": ("qwen2", {"hidden_size": 64}),
    "norms of heads": ("qwen3", {}),
    "window": ("mistral", {"head_dim": 16, "sliding_window": 7}),
    "odd inner width": ("llama", {"head_dim": 48, "intermediate_size": 37}),
    "nine heads to a key head": ("llama", {"head_dim": 16, "num_attention_heads": 9, "num_key_value_heads": 1, "hidden_size": 144}),
}
needs_kernels = pytest.mark.skipif(kernels() is None, reason="no C compiler, or POSTTRAIN_COMPILE=0")


def make(name: str, precision: Precision) -> LanguageModel:
    family, config = MODELS[name]
    model = random_model(family, **config)
    model.use_precision(precision)
    return model


def prompt(*tokens: int, index: int = 0, group: str = "") -> Sample:
    size = len(tokens)
    return Sample(tokens=list(tokens), origin=[int(Origin.USER)] * size, trained=[False] * size, index=index, group=group)


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fast", 2e-4), ("bf16", 0.3)])
def test_every_step_gives_the_logits_of_the_plain_one(name: str, precision: Precision, tolerance: float) -> None:
    model = make(name, precision)
    assert can_step(model)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 61, (size,), generator=generator).tolist()) for size in (3, 9, 1, 20)]
    steppers = [kind(model, slots=6, longest=110, columns=32) for kind in (CachedStepper, CompiledStepper)]
    position = torch.tensor([len(tokens) for tokens in prompts])
    with torch.no_grad():
        for stepper in steppers:
            for slot, prefix in enumerate(stepper.prefill(prompts)):
                stepper.admit(torch.tensor([slot]), prefix)
        for number in range(80):
            tokens = torch.randint(3, 61, (4,), generator=generator)
            if number == 40:  # a row leaves, and another takes its slot
                (prefix,) = steppers[0].prefill([(7, 8, 9)])
                for stepper in steppers:
                    stepper.admit(torch.tensor([1]), prefix)
                position[1] = 3
            if number == 60:
                for stepper in steppers:
                    stepper.move(torch.tensor([3]), torch.tensor([0]), int(position[3]) + 1)
                position[0] = position[3]
            longest = int(position.max()) + 1
            plain, quick = (stepper.step(tokens, position, longest) for stepper in steppers)
            assert quick.dtype == torch.float32
            torch.testing.assert_close(quick, plain, atol=tolerance, rtol=tolerance)
            if precision == "fast":
                assert torch.equal(quick.argmax(-1), plain.argmax(-1))
            position += 1


@needs_kernels
@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_the_sampler_computes_what_the_trainer_computes_to_the_last_bit(name: str, precision: Precision) -> None:
    model = make(name, precision)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 61, (size + 70,), generator=generator).tolist() for size in (5, 1, 33)]
    prompts = [tuple(row[:-70]) for row in rows]
    layout = Layout.of_rows(rows)
    with torch.no_grad():
        trained = model.logits(model.trunk(layout).hidden).split(layout.sizes)  # [T, V] a row
        stepper = CompiledStepper(model, slots=4, longest=110, columns=40)
        for slot, prefix in enumerate(stepper.prefill(prompts)):
            stepper.admit(torch.tensor([slot]), prefix)
            assert torch.equal(prefix.logits, trained[slot][len(prefix.tokens) - 1])
        for number in range(70):
            position = torch.tensor([len(tokens) + number for tokens in prompts])
            tokens = torch.tensor([row[at] for row, at in zip(rows, position.tolist(), strict=True)])
            found = stepper.step(tokens, position, int(position.max()) + 1)
            assert torch.equal(found, torch.stack([own[at] for own, at in zip(trained, position.tolist(), strict=True)]))


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_a_product_of_one_row_is_that_of_the_row_among_others(precision: Precision) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        linear, x = torch.nn.Linear(1536, 64, bias=False), torch.randn(50, 1536)
        made_ready = product(precision, [linear])
        trained = linear_of(precision)(x, linear.weight, None)
        for rows in (1, 2, 16, 50):
            assert torch.equal(made_ready(x[:rows]), trained[:rows])


@needs_kernels
@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_logprobs_of_sampler_and_trainer_differ_by_two_millionths_at_most(precision: Precision) -> None:
    model = make("llama", precision)
    asked = [prompt(*range(3, 5 + i % 7), index=i, group=str(i % 7)) for i in range(21)]
    sampler = NativeSampler(model, None, stop_tokens=(2,), max_batch=5)
    written = sampler.sample(asked, sampling=Sampling(max_tokens=40), seed=0, step=0)
    batch = pack(written)
    seen = read({"policy": model}, batch, {"policy": View(reads=(logprob,), grad=False)})
    assert float(((seen.policy.logprob - batch.logprobs).abs() * batch.mask).max()) <= 2e-6


@needs_kernels
@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_plain_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name, "fast")
    asked = [prompt(*range(3, 5 + i % 7), index=i) for i in range(20)]
    sampler = NativeSampler(model, None, stop_tokens=(2, 5, 9), max_batch=5)
    quick = sampler.sample(asked, sampling=Sampling(max_tokens=30), seed=0, step=0)
    monkeypatch.setattr("posttrain.samplers.native.can_step", lambda _: False)
    plain = sampler.sample(asked, sampling=Sampling(max_tokens=30), seed=0, step=0)
    assert [a.tokens for a in quick] == [a.tokens for a in plain]
    for one, other in zip(quick, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@needs_kernels
@pytest.mark.parametrize("vocabulary", [1, 7, 61, 1000, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_are_those_of_torch(vocabulary: int, temperature: float) -> None:
    stepper = CompiledStepper(make("llama", "fast"), slots=1, longest=8, columns=8)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(400, vocabulary, generator=generator)
    logits[1, :] = -30.0
    if vocabulary > 2:
        logits[0] = float("-inf")
        logits[0, 1] = 2.0
        logits[2, 2:] = -1e9
        logits[3, 0] = float("nan")
        logits[4, 1] = float("inf")
    uniforms = torch.rand(400, dtype=torch.float64, generator=generator)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-53, 1 - 2**-53])
    sampling = Sampling(temperature=temperature)
    ours, theirs = stepper.draw(logits, uniforms, sampling), draw(logits, uniforms, sampling)
    assert torch.equal(ours.tokens < 0, theirs.tokens < 0)
    assert torch.isfinite(ours.logprobs[ours.tokens >= 0]).all()
    assert float((ours.tokens == theirs.tokens).float().mean()) > 0.995  # a draw may stand on the edge of two entries
    same = (ours.tokens == theirs.tokens) & (ours.tokens >= 0)
    torch.testing.assert_close(ours.logprobs[same], theirs.logprobs[same], atol=2e-6, rtol=2e-6)
    likely = logits.softmax(-1).gather(1, ours.tokens.clamp(min=0)[:, None])[:, 0]
    assert (likely[ours.tokens >= 0] > 0).all()


@needs_kernels
@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_broken_weights_are_an_error_here_too(precision: Precision) -> None:
    model = make("llama", precision)
    with torch.no_grad():
        model.module.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        NativeSampler(model, None, stop_tokens=()).sample([prompt(5, 6)], sampling=Sampling(max_tokens=4), seed=0, step=0)


def test_what_cannot_be_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_step(make("llama", "exact"))
    assert not can_step(random_model("llama", head_dim=8))
    gemma = random_model("gemma")
    gemma.use_precision("fast")
    assert not can_step(gemma)
    assert not can_step(random_model("gpt_neox"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert not can_step(make("llama", "fast"))


def test_without_a_compiler_all_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled.build() is None
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert compiled.build() is None
    assert not list((tmp_path / "cache").rglob("*.so"))

    def nobody() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    assert compiled.build() is None


@needs_kernels
def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled.build()
    assert first is not None
    assert first.parent == tmp_path / "posttrain"
    stamp = first.stat().st_mtime_ns
    assert compiled.build() == first
    assert first.stat().st_mtime_ns == stamp
    monkeypatch.setenv("POSTTRAIN_COMPILE", "0")
    assert compiled.build() is None
