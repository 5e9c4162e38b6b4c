"""Models by name: the embedded one, a real small one, any Hugging Face folder or hub name; and back to a folder."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import CheckpointError, ConfigError, extra, nearest
from posttrain.models.gguf import load_gguf, no_progress_bars, smollm2_file
from posttrain.models.heads import load_heads, save_heads
from posttrain.models.lora import Lora, apply, merge, reopen, save_adapters
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.models.rates import default_lr

NAMES = ("tiny", "smollm2")
"""Short names: the model inside this package, and SmolLM2-135M-Instruct of the extra `smollm2`."""

DTYPES = ("float32", "bfloat16", "float16", "float64")


def load(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    lora: Lora | None = None,
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
    local_files_only: bool = False,
    four_bit: bool = False,
) -> tuple[LanguageModel, Any]:
    """Open a model and its tokenizer.

    Args:
        name_or_path: "tiny", "smollm2", a Hugging Face folder (full model or LoRA adapters), a .gguf file, or a hub
            name.
        dtype: Of the weights: "float32", "bfloat16", "float16" or "float64".
        device: Where to put it; a GPU when there is one, by default.
        lora: Put fresh adapters on it, so that only these learn.
        trust_remote_code: Run Python code that comes with the model.  Off: a model that needs it is refused.
        chat_template: A Jinja template, or a file that holds one, in place of the tokenizer's own.
        local_files_only: Never ask the hub over the network.
        four_bit: Keep frozen weights in 4 bits under LoRA; needs a GPU and bitsandbytes.

    Returns:
        The model, with the extra heads that were saved beside it, and its transformers tokenizer.

    Raises:
        ConfigError: No such model, or one that cannot be used; the message says what was found.
        CheckpointError: A folder whose weights are missing, partial or pickled.
        MissingExtraError: An optional dependency is not installed.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is '{dtype}'{nearest(dtype, DTYPES)}")
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if four_bit and (where.type != "cuda" or lora is None):
        raise ConfigError("four_bit keeps frozen weights on a GPU: it needs device='cuda' and lora=Lora()")
    found = resolve(name_or_path)
    name = str(name_or_path if str(name_or_path) in NAMES or isinstance(found, str) else found.resolve())
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    if isinstance(found, Path) and (found / "adapter_config.json").is_file():
        if lora is not None or four_bit:
            raise ConfigError(
                f"{found} holds LoRA adapters already; leave lora (and four_bit) out to go on with them, or merge them first"
            )
        base, tokenizer = load(_base_of(found), dtype=dtype, device=where, chat_template=None, **options)
        model = reopen(base, found)
        if (found / "tokenizer_config.json").is_file():
            tokenizer = _tokenizer(found, options)
    elif isinstance(found, Path) and found.suffix == ".gguf":
        module, tokenizer = load_gguf(found, getattr(torch, dtype))
        model = LanguageModel(module.to(where), name=name)
    else:
        module = _module(found, getattr(torch, dtype), where, options, four_bit=four_bit)
        tokenizer = _tokenizer(found, options)
        model = LanguageModel(module, name=name)
    if isinstance(found, Path) and found.is_dir():
        for head, layer in load_heads(found).to(where).items():
            model.heads[head] = layer
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
    if len(tokenizer) > model.vocab_size:
        raise ConfigError(f"the tokenizer of {found} knows {len(tokenizer)} tokens, but the model only {model.vocab_size}")
    return (apply(model, lora) if lora is not None else model), tokenizer


def resolve(name: str | Path) -> Path | str:
    """Where a model is: a folder or .gguf file that exists and can be opened, or a name to ask the hub for.

    Raises:
        ConfigError: It looks like a path and is none; the message holds the nearest names.
    """
    if str(name) == "tiny":
        from posttrain import tiny

        return Path(tiny.path())
    if str(name) == "smollm2":
        return smollm2_file()
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ConfigError(f"{path} is a file; expected a model folder (with config.json), a .gguf file or a hub name")
    text = str(name)
    local = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or path.parent.is_dir()
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or (local and "/" in text) or isinstance(name, Path):
        raise ConfigError(f"{text} is not a folder{_siblings(path)}")
    return text


def _siblings(path: Path) -> str:
    """The folders whose names are near a missing one, as a hint."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    folders = [str(x) for x in sorted(parent.iterdir()) if x.is_dir()] if parent.is_dir() else []
    return nearest(str(path), [*folders[:200], *NAMES])


def _checked(folder: Path) -> Path:
    """A folder that holds a model, or an error that says what it lacks."""
    files = sorted(x.name for x in folder.iterdir())
    if "adapter_config.json" in files:
        return folder
    if "config.json" not in files:
        inside = [x for x in sorted(folder.iterdir()) if (x / "config.json").is_file() or (x / "adapter_config.json").is_file()]
        hint = f"; {inside[0]} is one" if inside else f" (it holds {', '.join(files[:8]) or 'nothing'})"
        raise ConfigError(f"{folder} is not a model folder: it has no config.json{hint}")
    if not any(file.endswith(".safetensors") and file != "heads.safetensors" for file in files):
        pickled = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
        if pickled:
            raise CheckpointError(
                f"{folder} holds its weights as pickle ({pickled[0]}), which can run code when opened; if you trust them, "
                "convert them once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
            )
        raise CheckpointError(f"{folder} has a config.json but no weights; expected *.safetensors")
    return folder


def _base_of(folder: Path) -> str:
    """The name of the model that an adapter folder belongs to."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder}/adapter_config.json does not name its model (base_model_name_or_path)")
    return str(base)


def _module(found: Path | str, dtype: torch.dtype, device: torch.device, options: dict[str, Any], *, four_bit: bool) -> Any:
    """The transformers model, whole: weights that the file lacks are an error, not random numbers."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    settings = _config(found, options)
    more: dict[str, Any] = {"quantization_config": _four_bit()} if four_bit else {}
    try:
        with no_progress_bars():
            opened: Any = AutoModelForCausalLM.from_pretrained(
                str(found),
                config=settings,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
                **more,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as cause:
        if isinstance(cause, ValueError) and "Unrecognized configuration class" in str(cause):
            raise ConfigError(f"{found} ({settings.model_type}) is not a causal language model") from cause
        raise CheckpointError(f"the weights of {found} could not be opened: {cause}") from cause
    module, info = opened
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"the weights of {found} lack {len(missing)} tensors, the first is '{missing[0]}'")
    return module if four_bit else module.to(device)


def _config(found: Path | str, options: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if isinstance(found, str) and not options["local_files_only"]:
        _ask_hub(found)
    try:
        return AutoConfig.from_pretrained(str(found), **options)
    except (OSError, ValueError, KeyError) as cause:
        if isinstance(found, str):
            raise ConfigError(f"{_nowhere(found)}: {_first_line(cause)}") from cause
        try:
            kept = json.loads((found / "config.json").read_text(encoding="utf-8"))
        except ValueError as broken:
            raise ConfigError(f"{found / 'config.json'} is not JSON: {broken}") from broken
        if "auto_map" in kept and not options["trust_remote_code"]:
            raise ConfigError(f"{found} brings Python code of its own; pass trust_remote_code=True if you trust it") from cause
        kind = str(kept.get("model_type", ""))
        if kind not in CONFIG_MAPPING:
            hint = nearest(kind, list(CONFIG_MAPPING)) if kind else ""
            raise ConfigError(f"the model_type '{kind}' of {found} is unknown to this transformers{hint}") from cause
        raise ConfigError(f"{found / 'config.json'} cannot be used: {cause}") from cause


def _ask_hub(name: str) -> None:
    """Ask the hub once whether it has a model that is not stored here, before transformers asks again and again.

    Raises:
        ConfigError: It has not, or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        with errors_only("huggingface_hub", "transformers"):
            huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as cause:  # of the hub's client, or of whichever client that uses
        raise ConfigError(f"{_nowhere(name)}: {_first_line(cause)}") from cause


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Inside, loggers of these names say errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _nowhere(name: str) -> str:
    return f"there is no folder '{name}'{nearest(name, NAMES)}, and the hub gave no model of that name"


def _first_line(cause: BaseException) -> str:
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)


def _tokenizer(found: Path | str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if _is_generic(found):
            return PreTrainedTokenizerFast.from_pretrained(str(found), **options)
        return AutoTokenizer.from_pretrained(str(found), **options)
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise ConfigError(f"{found} has no tokenizer that can be opened (expected tokenizer.json): {cause}") from cause


def _is_generic(found: Path | str) -> bool:
    """Does a folder say that its tokenizer.json is all there is to its tokenizer?

    AutoTokenizer asks the model's type too, and builds Qwen's own tokenizer for any Qwen2 model, whatever the folder holds.
    """
    if isinstance(found, str) or not (found / "tokenizer.json").is_file():
        return False
    settings = found / "tokenizer_config.json"
    kind = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
    return kind in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _template(source: str | Path) -> str:
    """A chat template, given as itself or as the name of a file."""
    if "{" in str(source):
        return str(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template '{source}' is neither a Jinja template (it has no '{{') nor a file")
    return path.read_text(encoding="utf-8")


def _four_bit() -> Any:
    extra("bitsandbytes", "four-bit")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def save(model: LanguageModel, tokenizer: Any, folder: str | Path) -> Path:
    """Write a model as a Hugging Face folder, safetensors only; with LoRA, the adapters alone.

    A full model opens with `AutoModelForCausalLM.from_pretrained(folder)` and in vLLM; adapters open with `load`, and
    become a full model by `merge`.  Extra heads stand beside them in heads.safetensors and are named in config.json.

    Returns:
        The folder.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if model.has_adapters:
        save_adapters(model, target)
    else:
        module: Any = model.module
        if len(model.heads):
            module.config.posttrain_heads = sorted(model.heads)
        with no_progress_bars():
            module.save_pretrained(str(target))
    save_heads(model.heads, target)
    tokenizer.save_pretrained(str(target))
    return target


__all__ = ["NAMES", "Lora", "default_lr", "load", "merge", "random_model", "resolve", "save"]
