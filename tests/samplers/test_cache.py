"""The cache's dtypes: keys in bfloat16, as on a GPU, cost no more than the rounding that products in bfloat16 bring anyway."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.models.random import random_model
from posttrain.samplers import cache
from posttrain.samplers.cache import CachedStepper, kept_as


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_keys_in_bfloat16_move_logits_by_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, model = random_model(name), random_model(name)
    model.use_precision("bf16")
    steppers = [CachedStepper(each, slots=4, longest=64, columns=32) for each in (exact, model)]
    monkeypatch.setattr(cache, "kept_as", lambda model: (torch.bfloat16, torch.bfloat16))
    steppers.append(CachedStepper(model, slots=4, longest=64, columns=32))
    assert [stepper._keys[0].dtype for stepper in steppers] == [torch.float32, torch.float32, torch.bfloat16]
    prompts = [tuple(range(3, 3 + size)) for size in (3, 9, 1, 20)]
    position, chance = torch.tensor([len(tokens) for tokens in prompts]), torch.Generator().manual_seed(0)
    found = []
    with torch.no_grad():
        for stepper in steppers:
            for slot, prefix in enumerate(stepper.prefill(prompts)):
                stepper.admit(torch.tensor([slot]), prefix)
        for _ in range(30):
            tokens, longest = torch.randint(3, 61, (4,), generator=chance), int(position.max()) + 1
            found.append(torch.stack([stepper.step(tokens, position, longest) for stepper in steppers]))
            position += 1
    wanted, wide, narrow = torch.stack(found, 1)  # [30, 4, V] each
    scale = wanted.abs().max()
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow, wide)
    assert (narrow - wide).abs().max() < 0.08 * scale
    assert (narrow - wanted).abs().mean() < 1.25 * (wide - wanted).abs().mean() < 0.01 * scale


@pytest.mark.parametrize(
    ("device", "precision", "biased", "wanted"),
    [
        ("cuda", "bf16", False, (torch.bfloat16, torch.bfloat16)),
        ("cpu", "bf16", False, (torch.float32, torch.bfloat16)),
        ("cpu", "bf16", True, (torch.float32, torch.float32)),
        ("cuda", "exact", False, (torch.float32, torch.float32)),
        ("cpu", "fast", False, (torch.float32, torch.float32)),
    ],
)
def test_keys_are_bfloat16_where_the_trainer_multiplies_them_so(device: str, precision: str, biased: bool, wanted: Any) -> None:
    decoder = SimpleNamespace(biased_values=biased)
    model: Any = SimpleNamespace(device=torch.device(device), precision=precision, dtype=torch.float32, decoder=decoder)
    assert kept_as(model) == wanted
