"""LoRA: on, off, saved, reopened, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import CheckpointError, ConfigError
from posttrain.layout import Layout
from posttrain.models.load import load, save
from posttrain.models.lora import Lora, apply, merge
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model

pytest.importorskip("peft", reason="the extra peft is not installed")
torch.set_num_threads(1)

HERE = Layout.of_rows([[5, 6, 7, 8, 9], [10, 11]])


def logits(model: LanguageModel) -> torch.Tensor:
    return model.logits(model.trunk(HERE).hidden)


def trained(family: str = "llama", dtype: str = "float32", **settings: Any) -> LanguageModel:
    """A random model whose adapters are not zero any more."""
    model = apply(random_model(family, dtype=dtype), Lora(r=4, alpha=8, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.parameters().items():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt_neox"])
def test_fresh_adapters_change_nothing_and_alone_learn(family: str) -> None:
    plain, model = random_model(family), apply(random_model(family), Lora(r=4))
    assert (model.decoder is None) == (family == "gpt_neox")
    torch.testing.assert_close(logits(model), logits(plain))
    assert all("lora_" in name for name in model.parameters())
    assert 0 < sum(weight.numel() for weight in model.parameters().values()) < model.num_parameters / 2
    logits(model).pow(2).sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for n, w in model.parameters().items() if "lora_B" in n)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_off_is_the_model_itself(family: str) -> None:
    model, plain = trained(family), random_model(family)
    on = logits(model)
    assert (on - logits(plain)).abs().max() > 0.01
    with model.adapters_off() as reference:
        assert torch.equal(logits(reference), logits(plain))
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_own_forward_equals_that_of_peft(family: str) -> None:
    model = trained(family)
    theirs = model.module(HERE.tokens[:5][None]).logits[0]
    torch.testing.assert_close(logits(model)[:5], theirs, atol=1e-5, rtol=0)


def test_merging_adds_the_update_and_leaves_the_model() -> None:
    model = trained(dtype="float64")
    on = logits(model)
    merged = merge(model)
    torch.testing.assert_close(logits(merged), on, atol=1e-10, rtol=0)
    assert not merged.has_adapters
    assert len(merged.parameters()) == len(random_model().parameters())
    assert torch.equal(logits(model), on)
    layer = "model.layers.0.self_attn.q_proj"
    names = {name: weight.detach() for name, weight in model.weights()}
    prefix = f"base_model.model.{layer}"
    a, b = names[f"{prefix}.lora_A.default.weight"], names[f"{prefix}.lora_B.default.weight"]
    expected = names[f"{prefix}.base_layer.weight"] + 2.0 * (b @ a)  # alpha / r = 8 / 4
    torch.testing.assert_close(merged.parameters()[f"{layer}.weight"].detach(), expected, atol=1e-12, rtol=0)
    with pytest.raises(ConfigError, match="no LoRA adapters to merge"):
        merge(merged)


def test_adapters_are_saved_alone_and_go_on(tmp_path: Path, tokenizer: Any) -> None:
    base = save(random_model(), tokenizer, tmp_path / "base")
    model, _ = load(base, lora=Lora(r=4), device="cpu")
    with torch.no_grad():
        for name, weight in model.parameters().items():
            if "lora_B" in name:
                weight.fill_(0.05)
    model.add_value_head()
    where = save(model, tokenizer, tmp_path / "adapters")
    assert (where / "adapter_model.safetensors").is_file()
    assert not (where / "model.safetensors").exists()
    again, words = load(where, device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert again.parameters().keys() == model.parameters().keys()
    assert again.fingerprint() == model.fingerprint()
    assert words("w3").input_ids == [7]
    whole = save(merge(again), tokenizer, tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    opened = LanguageModel(AutoModelForCausalLM.from_pretrained(whole))
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="holds LoRA adapters already"):
        load(where, lora=Lora(), device="cpu")
    save(random_model(hidden_size=64), tokenizer, base)
    with pytest.raises(CheckpointError, match=r"the adapters in .* do not fit"):
        load(where, device="cpu")


def test_what_peft_and_transformers_plan_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import peft

    make = peft.get_peft_model

    def noisy(*arguments: Any) -> Any:
        warnings.warn("is_gradient_checkpointing will go", FutureWarning, stacklevel=1)
        return make(*arguments)

    monkeypatch.setattr(peft, "get_peft_model", noisy)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert apply(random_model(), Lora(r=4)).has_adapters


def test_the_seed_decides_the_start() -> None:
    def start(seed: int) -> torch.Tensor:
        before = torch.get_rng_state()
        model = apply(random_model(), Lora(r=4, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        return next(weight for name, weight in model.parameters().items() if "lora_A" in name)

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_dropout_only_when_asked() -> None:
    model = trained(dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.dropout(True)
    assert not torch.equal(logits(model), logits(model))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="r is 0"):
        Lora(r=0)
    with pytest.raises(ConfigError, match=r"dropout is 1.0"):
        Lora(dropout=1.0)
    with pytest.raises(ConfigError, match=r"LoRA targets \['attn'\] cannot be adapted.*'q_proj'"):
        apply(random_model(), Lora(targets=("attn",)))
    with pytest.raises(ConfigError, match="has LoRA adapters already"):
        apply(trained(), Lora())
