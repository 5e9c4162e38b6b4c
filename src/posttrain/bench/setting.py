"""How large a benchmark is: the models by shape, the ragged rows, the precisions of both sides."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from posttrain.models.gemm import Precision, settle
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.types import Origin, Sample


@dataclass(frozen=True)
class Shape:
    """A model to measure: random weights in this configuration, or one that `load` opens."""

    key: str  # how rows name it
    words: str  # how people name it
    config: dict[str, int] = field(default_factory=dict)
    name: str = ""  # for `load`, where there is no configuration


def _llama(layers: int, width: int, heads: int, kv: int, inner: int, vocabulary: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": width // heads,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
    }


SHAPES = {
    "quick": Shape("quick", "Llama 1 layer d 32", _llama(1, 32, 4, 2, 48, 512)),
    "nothing": Shape("nothing", "Llama 1 layer d 16", _llama(1, 16, 2, 1, 16, 512)),
    "3m": Shape("3m", "Llama 4 layers d 256 (3 M)", _llama(4, 256, 4, 2, 683, 512)),
    "135m": Shape("135m", "Llama 30 layers d 576 (135 M)", _llama(30, 576, 9, 3, 1536, 49152)),
    "500m": Shape("500m", "Llama 24 layers d 1024 (0.5 B)", _llama(24, 1024, 16, 4, 4096, 128256)),
    "1500m": Shape("1500m", "Llama 28 layers d 1536 (1.5 B)", _llama(28, 1536, 12, 2, 8960, 151936)),
    "embedded": Shape("embedded", "the embedded model", name="tiny"),
}
"""The models of the table."""


@dataclass(frozen=True)
class Compared:
    """Precisions of both sides of a row."""

    key: str
    ours: Precision
    peer_bf16: bool

    @property
    def words(self) -> str:
        """Of both sides."""
        mine = {"bf16": "bf16 products, fp32 weights", "fast": "fp32 by oneDNN", "exact": "fp32"}[self.ours]
        return f"ours {mine}; peer {'bf16' if self.peer_bf16 else 'fp32'}"


@dataclass(frozen=True)
class Setting:
    """How large the benchmarks are and where they run."""

    quick: bool = False
    """Tiny shapes: everything runs, nothing is measured."""
    rounds: int = 5
    model: str | None = None
    """A model to measure in place of the shapes of the table."""
    device: str = "cpu"

    def shape(self, key: str) -> Shape:
        """The shape to measure where a row asks for that one."""
        if key == "nothing":
            return SHAPES[key]
        if self.model is not None:
            return Shape("model", self.model, name=self.model)
        return SHAPES["quick" if self.quick and key != "embedded" else key]

    def words(self, key: str) -> str:
        """Of that shape."""
        return self.shape(key).words

    def load(self, key: str, *, seed: int = 0) -> LanguageModel:
        """A model of that shape; random weights differ by seed."""
        shape = self.shape(key)
        if shape.config:
            config: dict[str, Any] = dict(shape.config)
            if config["vocab_size"] == 512:
                config["vocab_size"] = len(tokenizer())
            model = random_model("llama", seed=seed, **config)
        else:
            from posttrain.models.load import load

            model, _ = load(shape.name)
        model.module.to(self.device)
        return model

    @property
    def unit(self) -> str:
        """Of what time is told in."""
        return "CPU " if self.device == "cpu" else ""

    @functools.cached_property
    def fp32(self) -> Compared:
        """Float32 on both sides, here on the back end that a probe finds quickest."""
        return Compared("fp32", settle("fast")[0] if self.device == "cpu" else "exact", False)

    @property
    def precisions(self) -> tuple[Compared, ...]:
        """All comparisons of precision: the peer's default is float32."""
        return self.fp32, Compared("bf16", "bf16", False), Compared("bf16_both", "bf16", True)


@functools.lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The embedded model's: random shapes with a small vocabulary read with it too."""
    from transformers import AutoTokenizer

    from posttrain import tiny

    return AutoTokenizer.from_pretrained(tiny.path())


def has_trl() -> bool:
    """Is there a peer to compare training with?"""
    return find_spec("trl") is not None and find_spec("datasets") is not None


def ragged(count: int, *, low: int, high: int, seed: int = 0) -> list[list[int]]:
    """`count` rows of log-normal length between `low` and `high` tokens."""
    chance = random.Random(seed)
    middle = (low * high) ** 0.5
    lengths = [min(high, max(low, round(middle * chance.lognormvariate(0.0, 0.8)))) for _ in range(count)]
    return [[chance.randrange(40, 300) for _ in range(length)] for length in lengths]


def sample(prompt: Sequence[int], answer: Sequence[int], **fields: Any) -> Sample:
    """A demonstration."""
    origin = [int(Origin.USER)] * len(prompt) + [int(Origin.DEMONSTRATION)] * len(answer)
    trained = [False] * len(prompt) + [True] * len(answer)
    return Sample(tokens=[*prompt, *answer], origin=origin, trained=trained, **fields)


def blank(prompt: Sequence[int], **fields: Any) -> Sample:
    """A prompt alone."""
    return sample(prompt, (), **fields)


def one_thread() -> None:
    """One thread, and no chatter of the libraries."""
    import transformers

    torch.set_num_threads(1)
    if has_trl():
        import datasets

        datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


__all__ = ["SHAPES", "Compared", "Setting", "Shape", "blank", "has_trl", "one_thread", "ragged", "sample", "tokenizer"]
