"""Small random models of every family, for tests and trials: real architectures, weights from a seed."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.errors import ConfigError, nearest
from posttrain.models.model import LanguageModel

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48},
    "mistral": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
    "gpt_neox": {"intermediate_size": 64},
    "gpt2": {"n_inner": 64},
}
"""What is set for a family beyond the common shape."""

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(family: str = "llama", *, seed: int = 0, dtype: str = "float32", **config: Any) -> LanguageModel:
    """A small model with random weights, norms and biases included, so that no mistake hides behind ones and zeros.

    Args:
        family: A transformers model type; those of `FAMILIES` are known to work.
        seed: Decides every weight.
        dtype: "float32", "float64" or "bfloat16".
        **config: Fields of the family's transformers configuration.

    Raises:
        ConfigError: Unknown family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ConfigError(f"family is '{family}'{nearest(family, FAMILIES)}")
    settings = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
        with torch.no_grad():
            for name, weight in module.named_parameters():
                spread = 0.3 if weight.ndim == 1 else 1.5 * weight.shape[-1] ** -0.5
                centre = weight.detach().clone() if weight.ndim == 1 else 0.0
                weight.copy_(centre + spread * torch.randn(weight.shape))
                if "embed" in name or "wte" in name or "wpe" in name:
                    weight.mul_(0.5)
    return LanguageModel(module, name=f"random {family}")


__all__ = ["COMMON", "FAMILIES", "random_model"]
