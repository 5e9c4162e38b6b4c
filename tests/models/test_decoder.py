"""Our own forward against transformers: logits, gradients, windows, incremental use."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.layout import Layout
from posttrain.models.attention import attend
from posttrain.models.decoder import Decoder, supports
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model

torch.set_num_threads(1)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, all heads": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 24}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn rope": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2, window above layer 1": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3, biased": ("qwen3", {"attention_bias": True}),
    "gemma": ("gemma", {}),
}


def rows(sizes: tuple[int, ...] = (5, 40, 7, 38, 1, 20, 20), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (size,), generator=generator).tolist() for size in sizes]


def packed_logits(model: LanguageModel, samples: list[list[int]]) -> list[Tensor]:
    layout = Layout.of_rows(samples)
    return list(model.logits(model.trunk(layout).hidden).split(list(layout.sizes)))


def theirs(model: LanguageModel, sample: list[int]) -> Tensor:
    with torch.no_grad():
        return model.module(torch.tensor([sample])).logits[0]


def wide_norm(self: Any, x: Tensor) -> Tensor:
    weight = self.weight if hasattr(self, "variance_epsilon") else 1 + self.weight
    eps = getattr(self, "variance_epsilon", None) or self.eps
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def wide_rope(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.einsum("bn,d->bnd", position_ids.double(), self.inv_freq.float().double()).repeat(1, 1, 2)
    return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def without_float32(model: LanguageModel) -> LanguageModel:
    """Transformers' model with its two float32 islands (norms and rotary angles) in float64."""
    for module in model.module.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(wide_norm, module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = MethodType(wide_rope, module)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_logits_equal_transformers_row_by_row(variant: str) -> None:
    family, config = VARIANTS[variant]
    model = random_model(family, **config)
    assert model.decoder is not None
    with torch.no_grad():
        ours = packed_logits(model, rows())
    for sample, mine in zip(rows(), ours, strict=True):
        torch.testing.assert_close(mine, theirs(model, sample), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_is_exact_where_transformers_is(variant: str) -> None:
    family, config = VARIANTS[variant]
    model = random_model(family, dtype="float64", **config)
    with torch.no_grad():
        ours = packed_logits(model, rows())
    stock = [theirs(model, sample) for sample in rows()]
    exact = [theirs(without_float32(model), sample) for sample in rows()]
    for mine, rounded, true in zip(ours, stock, exact, strict=True):
        torch.testing.assert_close(mine, rounded, atol=2e-5, rtol=0)  # transformers norms and rotates in float32
        torch.testing.assert_close(mine, true, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", ["llama", "mistral, window", "qwen2", "qwen3", "gemma"])
def test_packed_equals_separate_in_any_order(variant: str) -> None:
    family, config = VARIANTS[variant]
    model = random_model(family, dtype="float64", **config)
    samples = rows()
    with torch.no_grad():
        alone = [packed_logits(model, [sample])[0] for sample in samples]
        together = packed_logits(model, samples)
        turned = packed_logits(model, samples[::-1])[::-1]
    for one, two, three in zip(alone, together, turned, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)
        torch.testing.assert_close(one, three, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", ["llama tied, biased", "mistral, window", "qwen2", "qwen3", "gemma"])
def test_gradients_equal_the_padded_run_of_transformers(variant: str) -> None:
    family, config = VARIANTS[variant]
    model = without_float32(random_model(family, dtype="float64", **config))
    layout = Layout.of_rows(rows())
    weights = torch.randn(layout.num_tokens, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    (model.logits(model.trunk(layout).hidden).log_softmax(-1) * weights).sum().backward()
    ours = {name: x.grad.clone() for name, x in model.parameters().items() if x.grad is not None}
    model.module.zero_grad()

    mask = layout.scatter(torch.ones_like(layout.tokens))
    out = model.module(input_ids=layout.scatter(layout.tokens), attention_mask=mask).logits
    (layout.gather(out).log_softmax(-1) * weights).sum().backward()
    assert set(ours) == set(model.parameters())
    for name, x in model.parameters().items():
        assert ours[name].abs().max() > 0, name
        torch.testing.assert_close(ours[name], x.grad, atol=1e-9, rtol=1e-8, msg=name)


@pytest.mark.parametrize("variant", ["llama", "mistral, window", "qwen3", "gemma"])
def test_one_token_at_a_time_equals_the_whole(variant: str) -> None:
    family, config = VARIANTS[variant]
    model = random_model(family, dtype="float64", **config)
    decoder, sample = model.decoder, rows((12,))[0]
    assert decoder is not None
    keys: list[list[Tensor]] = [[] for _ in range(decoder.num_layers)]
    values: list[list[Tensor]] = [[] for _ in range(decoder.num_layers)]
    steps = []
    with torch.no_grad():
        for position, token in enumerate(sample):
            x = decoder.embed(torch.tensor([token]))
            cos, sin = decoder.rope(torch.tensor([position]))
            for layer in range(decoder.num_layers):
                q, k, v = decoder.qkv(layer, x, cos, sin)
                keys[layer].append(k)
                values[layer].append(v)
                seen = slice(-(decoder.window(layer) or 1000), None)
                past, content = torch.cat(keys[layer][seen]), torch.cat(values[layer][seen])
                repeats = decoder.num_heads // decoder.num_kv_heads
                scores = torch.einsum("nhd,mhd->hnm", q, past.repeat_interleave(repeats, 1)) * decoder.scale
                mixed = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), content.repeat_interleave(repeats, 1))
                x = decoder.finish(layer, x, mixed.flatten(1))
            steps.append(decoder.head(decoder.final(x)))
        whole = packed_logits(model, [sample])[0]
    torch.testing.assert_close(torch.cat(steps), whole, atol=1e-11, rtol=0)


def test_weights_are_shared_by_reference() -> None:
    model = random_model("llama")
    before = packed_logits(model, rows((4,)))[0]
    with torch.no_grad():
        model.module.lm_head.weight.mul_(2)
    torch.testing.assert_close(packed_logits(model, rows((4,)))[0], 2 * before)


def test_windows_are_per_layer() -> None:
    model = random_model("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1)
    assert [model.decoder.window(layer) for layer in range(3)] == [None, 6, 6]
    assert random_model("mistral", sliding_window=9).decoder.window(0) == 9


def test_only_exact_classes_are_supported() -> None:
    stranger = random_model("gpt_neox").module
    assert not supports(stranger)
    with pytest.raises(ConfigError, match="GPTNeoXForCausalLM has no owned forward"):
        Decoder(stranger)
    inner = random_model("llama").module

    class Changed(type(inner)):  # type: ignore[misc]
        pass

    assert not supports(Changed(inner.config))


def test_bfloat16_follows_transformers() -> None:
    model = random_model("llama", dtype="bfloat16")
    with torch.no_grad():
        mine = packed_logits(model, rows((30,)))[0]
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, theirs(model, rows((30,))[0]).float(), atol=0.1, rtol=0.05)


def test_attend_agrees_with_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    layout = Layout.of_rows(rows())
    q, k, v = (torch.randn(layout.num_tokens, h, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    for window in (None, 5):
        found = attend(q, k, v, layout, scale=0.3, window=window)
        for row, start in enumerate(layout.offsets[:-1]):
            for i in range(layout.sizes[row]):
                first = 0 if window is None else max(0, i - window + 1)
                for head in range(4):
                    keys = k[start + first : start + i + 1, head // 2]
                    share = (keys @ q[start + i, head] * 0.3).softmax(0)
                    expected = share @ v[start + first : start + i + 1, head // 2]
                    torch.testing.assert_close(found[start + i, head * 8 : head * 8 + 8], expected, atol=1e-12, rtol=0)
