"""Three ways to one matrix product."""

from __future__ import annotations

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.layout import Layout
from posttrain.models import gemm
from posttrain.models.lora import Lora, apply
from posttrain.models.random import random_model

torch.set_num_threads(1)


def factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).requires_grad_() for shape in ((7, 3, 20), (13, 20), (13,)))


@pytest.mark.parametrize(("linear", "tolerance"), [(gemm.fast, 1e-5), (gemm.bf16, 0.12)])
def test_values_and_gradients_follow_the_exact_product(linear: gemm.Linear, tolerance: float) -> None:
    wanted = torch.randn(7, 3, 13, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, product in (("exact", gemm.exact), ("other", linear)):
        inputs = factors()
        out = product(*inputs)
        (out * wanted).sum().backward()
        found[name] = [out.detach(), *(x.grad for x in inputs)]
    for one, two in zip(found["exact"], found["other"], strict=True):
        assert two.dtype == torch.float32
        assert one.shape == two.shape
        torch.testing.assert_close(two, one, atol=tolerance, rtol=tolerance)


def test_a_frozen_weight_gets_no_gradient() -> None:
    for linear in (gemm.fast, gemm.bf16):
        x, weight, _ = factors()
        linear(x, weight.detach(), None).sum().backward()
        assert x.grad is not None
        linear(x.detach(), weight, None).sum().backward()
        assert weight.grad is not None


@pytest.mark.skipif(not gemm.has_onednn(), reason="this torch has no oneDNN")
def test_fast_reaches_onednn_in_all_three_products(monkeypatch) -> None:
    calls, onednn = [], gemm.onednn
    monkeypatch.setattr(gemm, "onednn", lambda x, weight: calls.append((x.shape, weight.shape)) or onednn(x, weight))
    x, weight, bias = factors()
    gemm.fast(x, weight, bias).sum().backward()
    assert [(tuple(a), tuple(b)) for a, b in calls] == [((21, 20), (13, 20)), ((21, 13), (20, 13)), ((13, 21), (20, 21))]


def test_fast_falls_back_where_onednn_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(gemm, "has_onednn", lambda: False)
    x, weight, bias = factors()
    assert torch.equal(gemm.fast(x, weight, bias), gemm.exact(x, weight, bias))
    assert gemm.probe().choice == "exact"
    wide = [value.double() for value in factors()]
    assert torch.equal(gemm.fast(*wide), gemm.exact(*wide))


def test_the_probe_offers_what_pays() -> None:
    assert gemm.Probe("fast", 4.0, 2.0, 1.0, 1).words() == "quicker here: precision=fast 2.0x, precision=bf16 4.0x"
    assert gemm.Probe("exact", 1.0, 0.0, 1.0, 1).words() == ""


def test_the_probe_says_what_it_chose() -> None:
    record = gemm.probe(tokens=8, width=16, repeats=1).record()
    assert record["choice"] in ("fast", "exact")
    assert record["exact_seconds"] >= 0
    assert record["threads"] == 1


def test_a_recorded_choice_is_repeated() -> None:
    assert gemm.settle("fast", recorded={"choice": "exact"}) == ("exact", {"choice": "exact"})
    assert gemm.settle("bf16") == ("bf16", {"choice": "bf16"})
    choice, record = gemm.settle("fast")
    assert gemm.settle("fast", recorded=record)[0] == choice == record["choice"]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fast", 1e-4), ("bf16", 0.1)])
def test_a_model_in_another_precision(precision: gemm.Precision, tolerance: float, adapted: bool) -> None:
    model, layout = random_model("qwen2"), Layout.of_rows([[3, 4, 5, 6], [7, 8]])
    if adapted:
        pytest.importorskip("peft")
        model = apply(model, Lora(r=4))
        with torch.no_grad():
            for name, weight in model.parameters().items():
                if "lora_B" in name:
                    weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    gradients = []
    for mode in ("exact", precision):
        model.use_precision(mode)
        logits = model.logits(model.trunk(layout).hidden)
        logits.log_softmax(-1)[:, 3].sum().backward()
        gradients.append((logits.detach(), {name: x.grad.clone() for name, x in model.parameters().items()}))
        model.module.zero_grad()
    (exact, exact_grads), (other, other_grads) = gradients
    assert precision == "fast" or not torch.equal(exact, other)
    torch.testing.assert_close(other, exact, atol=tolerance, rtol=0)
    for name, grad in exact_grads.items():
        assert (other_grads[name] - grad).norm() <= tolerance * grad.norm() + 1e-6, name


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"precision is 'fats' .nearest: 'fast'"):
        random_model("llama").use_precision("fats")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has 'exact' only"):
        random_model("gpt2").use_precision("bf16")
    with pytest.raises(ConfigError, match="keeps float32 master weights"):
        random_model("llama", dtype="bfloat16").use_precision("bf16")
