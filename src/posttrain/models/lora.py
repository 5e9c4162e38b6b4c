"""Low-rank adapters, by PEFT (extra `peft`): applied, saved, reopened, merged.

With its adapters off, the model is its own reference: see `LanguageModel.adapters_off`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.errors import CheckpointError, ConfigError, extra
from posttrain.models.model import LanguageModel, replace_module


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation: each adapted product `W x` becomes `W x + (alpha / r) B A x`, and only A and B are trained.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3.
    """

    r: int = 16
    """The rank of the update."""
    alpha: float = 32
    """Scales the update by `alpha / r`."""
    dropout: float = 0.0
    """Share of the adapters' inputs that is dropped while `LanguageModel.dropout(True)` holds."""
    targets: str | tuple[str, ...] = "all-linear"
    """Which linear layers are adapted: "all-linear" (all but the head) or names, as ("q_proj", "v_proj")."""
    rank_stabilised: bool = False
    """Scale by `alpha / sqrt(r)` instead (rsLoRA, arXiv 2312.03732)."""
    seed: int = 0
    """Decides the weights of A; B starts at zero, so that an adapted model starts as the model itself."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r is {self.r}; expected a rank of at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; expected a share in [0, 1)")


def apply(model: LanguageModel, lora: Lora) -> LanguageModel:
    """Put fresh adapters on a model, by reference.  Only the adapters and extra heads learn.

    Raises:
        MissingExtraError: PEFT is not installed.
        ConfigError: The model has adapters already, or no layer of the names in `targets`.
    """
    peft: Any = extra("peft", "peft")
    if model.has_adapters:
        raise ConfigError("this model has LoRA adapters already; merge them first, or load it without lora")
    wanted = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=wanted,
        use_rslora=lora.rank_stabilised,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        try:
            with _no_news():
                wrapped = peft.get_peft_model(model.module, settings)
        except ValueError as cause:
            linear = sorted({n.rpartition(".")[2] for n, m in model.module.named_modules() if isinstance(m, nn.Linear)})
            raise ConfigError(f"LoRA targets {wanted} cannot be adapted: {cause}; linear layers here: {linear}") from cause
    return replace_module(model, wrapped, model.heads)


@contextmanager
def _no_news() -> Iterator[None]:
    """Inside, what PEFT and transformers plan to change between them is no business of the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def reopen(model: LanguageModel, folder: Path) -> LanguageModel:
    """Put the adapters that `save_adapters` wrote on the model they were trained on; they go on learning.

    Raises:
        CheckpointError: They do not fit this model.
    """
    peft: Any = extra("peft", "peft")
    try:
        with _no_news():
            wrapped = peft.PeftModel.from_pretrained(model.module, str(folder), is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as cause:
        raise CheckpointError(f"the adapters in {folder} do not fit {model.name or 'this model'}: {cause}") from cause
    return replace_module(model, wrapped, model.heads)


def save_adapters(model: LanguageModel, folder: Path) -> None:
    """Write the adapters alone (safetensors) with the name of the model they belong to."""
    module: Any = model.module
    for settings in module.peft_config.values():
        settings.base_model_name_or_path = model.name
    module.save_pretrained(str(folder), save_embedding_layers=False)


def merge(model: LanguageModel) -> LanguageModel:
    """A copy of the model with its adapters added into the weights, which all learn; the model itself stays as it is.

    Raises:
        ConfigError: It has no adapters.
    """
    if not model.has_adapters:
        raise ConfigError("this model has no LoRA adapters to merge")
    module: Any = copy.deepcopy(model.module)
    merged = module.merge_and_unload()
    merged.requires_grad_(True)
    return replace_module(model, merged, copy.deepcopy(model.heads))


__all__ = ["Lora", "apply", "merge", "reopen", "save_adapters"]
