"""The embedded base model: a real language model of a few million parameters that ships in the package."""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder of the embedded model, in Hugging Face format: weights, configuration, tokenizer, chat template."""
    return Path(__file__).resolve().parent / "weights"
