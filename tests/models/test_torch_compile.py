"""The compiled halves of a layer compute what the decoder computes, in one graph for all layers and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from posttrain.errors import ConfigError
from posttrain.layout import Layout
from posttrain.methods import SFT
from posttrain.models import torch_compile
from posttrain.models.lora import Lora, apply
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.run import train
from posttrain.session import Session
from posttrain.wiring import build_models

torch.set_num_threads(1)
OWN = ("llama", "mistral", "qwen2", "qwen3", "gemma")
ROWS = ((20, 30, 7), (5, 12), (32,), (8, 8))
"""Batches of 57, 17, 32 and 16 tokens: some of them as many as something else of the model is wide."""


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """CompiledLayers are made as for inductor, forward and backward, and then run by torch; `frame_count` is how many were made."""
    torch._dynamo.reset()
    made = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch_compile, "BACKEND", made)
    yield made
    torch._dynamo.reset()


def rows(sizes: tuple[int, ...]) -> Layout:
    return Layout.of(3 + torch.arange(sum(sizes)) % 57, sizes)


def run(model: LanguageModel, here: Layout) -> tuple[Tensor, Tensor]:
    """Hidden states and the gradients of all weights, one after another, in float64."""
    model.module.zero_grad()
    hidden = model.trunk(here).hidden
    hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(hidden.dtype))
    assert all(p.grad.dtype == p.dtype for p in model.parameters().values() if p.grad is not None)
    grads = [p.grad.flatten().double() for p in model.parameters().values() if p.grad is not None]
    return hidden.detach().double(), torch.cat(grads)


def gap(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative differences of hidden states and gradients."""
    one, two = (float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    return one, two


@pytest.mark.parametrize("family", OWN)
def test_values_gradients_and_no_second_compilation(family: str, counter: Any) -> None:
    config = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    eager, ours = (random_model(family, dtype="float64", **config) for _ in range(2))
    for model in (eager, ours):
        model.use_precision("fast")
    ours.use_compile(True)
    for sizes in ROWS:
        assert max(gap(run(ours, rows(sizes)), run(eager, rows(sizes)))) < 1e-13
        assert counter.frame_count == 2, "one graph before attention and one after it, for three layers and all batches"


@pytest.mark.parametrize("family", OWN)
def test_bfloat16_products_round_no_more_than_those_of_the_decoder(family: str, counter: Any) -> None:
    exact, eager, ours = (random_model(family, dtype=dtype) for dtype in ("float64", "float32", "float32"))
    exact.load_weights({name: value.detach().double() for name, value in eager.weights()})
    eager.use_precision("bf16")
    ours.use_precision("bf16")
    ours.use_compile(True)
    for sizes in ROWS[:2]:
        expected = run(exact, rows(sizes))
        for mine, theirs in zip(gap(run(ours, rows(sizes)), expected), gap(run(eager, rows(sizes)), expected), strict=True):
            assert 1e-4 < mine < 1.5 * theirs < 0.1
    assert counter.frame_count == 2


def test_what_attention_reads_is_cast_inside_the_graph(counter: Any) -> None:
    model = random_model("qwen3")
    model.use_precision("bf16")
    assert model.decoder is not None
    x, (cos, sin) = model.embed(torch.arange(3, 20)).detach(), model.decoder.rope(torch.arange(17))
    found = torch_compile.CompiledLayers(model.decoder).qkv(1, x, cos, sin, kind=torch.bfloat16)
    for one, two in zip(found, model.decoder.qkv(1, x, cos, sin), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, two.to(torch.bfloat16), atol=0.02, rtol=0.02)


def test_with_checkpointing_and_without_gradients(counter: Any) -> None:
    plain = random_model("llama", dtype="float64")
    saving = LanguageModel(random_model("llama", dtype="float64").module, precision="fast", checkpointing=True, compile=True)
    for sizes in ROWS[:2]:
        assert max(gap(run(saving, rows(sizes)), run(plain, rows(sizes)))) < 1e-13
    assert counter.frame_count == 2
    with torch.no_grad():
        for sizes in ROWS:
            torch.testing.assert_close(saving.trunk(rows(sizes)).hidden, plain.trunk(rows(sizes)).hidden, atol=1e-12, rtol=0)
    assert counter.frame_count == 4  # without gradients there is another pair
    copy = saving.frozen_copy()
    assert (copy.compile, copy.compiles, copy.precision) == (True, True, "fast")


def test_a_single_token_needs_no_graph_of_its_own(counter: Any) -> None:
    eager, ours = random_model("llama", dtype="float64"), random_model("llama", dtype="float64")
    ours.use_precision("fast")
    ours.use_compile(True)
    assert max(gap(run(ours, rows((1,))), run(eager, rows((1,))))) < 1e-13
    assert counter.frame_count == 0


def test_exact_stays_torchs_own(counter: Any) -> None:
    eager, ours = random_model("llama"), random_model("llama")
    ours.use_compile(True)
    assert ours.compile
    assert not ours.compiles
    for one, two in zip(run(ours, rows((5, 12))), run(eager, rows((5, 12))), strict=True):
        assert torch.equal(one, two)
    assert counter.frame_count == 0


def test_what_it_does_not_do_is_refused(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="compile has no effect on GPT2LMHeadModel"):
        LanguageModel(random_model("gpt2").module, compile=True)
    with pytest.raises(ConfigError, match=r"this model's is 'relu2': leave compile out"):
        random_model("llama", hidden_act="relu2").use_compile(True)
    settings = small_run(SFT(), small_model, tmp_path / "run", precision="bf16")
    with pytest.raises(ConfigError, match=r"precision is 'exact'.* add precision=bf16"):
        replace(settings, precision="exact", compile=True)
    with pytest.raises(ConfigError, match="compile=true and LoRA"):
        replace(settings, compile=True, lora=Lora())
    monkeypatch.setattr("posttrain.models.gemm.settle", lambda precision, recorded=None: ("exact", {"choice": "exact"}))
    with pytest.warns(UserWarning, match="compile has no effect: 'fast' is 'exact' here"):
        build_models(replace(settings, precision="fast", compile=True))


def test_adapters_are_refused() -> None:
    pytest.importorskip("peft")
    model = random_model("llama")
    model.use_compile(True)
    with pytest.raises(ConfigError, match=r"compile needs plain linear layers, and this model has Linear .LoRA"):
        apply(model, Lora(r=2))


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(torch_compile, "BACKEND", broken)
    torch._dynamo.reset()
    model = random_model("llama")
    model.use_precision("fast")
    model.use_compile(True)
    with pytest.raises(ConfigError, match=r"torch.compile failed: .*no compiler here.*leave compile out"):
        model.trunk(rows((5, 12)))


def test_a_run_trains_with_it(small_model: Path, tmp_path: Path, counter: Any) -> None:
    losses = []
    for compile in (False, True):
        out = tmp_path / str(compile)
        losses.append(train(small_run(SFT(), small_model, out, precision="bf16", compile=compile)).metrics["loss"])
    assert counter.frame_count >= 2
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", OWN)
def test_inductors_kernels(family: str) -> None:
    """The same as compiled kernels for this processor."""
    torch._dynamo.reset()
    exact = random_model(family, dtype="float64")
    for precision, tolerance in (("fast", 1e-5), ("bf16", 0.1)):
        model = random_model(family)
        model.use_precision(precision)  # type: ignore[arg-type]
        model.use_compile(True)
        exact.load_weights({name: value.detach().double() for name, value in model.weights()})
        for sizes in ROWS:
            assert max(gap(run(model, rows(sizes)), run(exact, rows(sizes)))) < tolerance


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are made anew, from a batch of another size."""
    checkpoint = Session.checkpoint

    def killed(session: Session, phases: Any) -> None:
        checkpoint(session, phases)
        if session.step == 3:
            raise KeyboardInterrupt

    found = []
    for kill in (False, True):
        settings = small_run(SFT(), small_model, tmp_path / str(kill), precision="bf16", compile=True)
        if kill:
            torch._dynamo.reset()
            monkeypatch.setattr(Session, "checkpoint", killed)
            with pytest.raises(KeyboardInterrupt):
                train(settings)
            monkeypatch.setattr(Session, "checkpoint", checkpoint)
        torch._dynamo.reset()
        found.append((train(settings).model / "model.safetensors").read_bytes())
    assert found[0] == found[1]
