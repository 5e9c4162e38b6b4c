"""What the comparisons share: models and data of the same shapes, this library's step, and TRL's training loop."""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.distributed.world import World
from posttrain.method import Method, Optimizer, Part
from posttrain.models.gemm import Precision
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.pack import pack, units
from posttrain.score import prepare
from posttrain.step import Ready, Stepper, Tally, update
from posttrain.types import Origin, Sample, State

from .decode import SHAPES
from .measure import Seconds

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 512}
NOTHING = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
LR = 1e-5


@dataclass(frozen=True)
class Setting:
    """How large a benchmark is."""

    quick: bool
    rounds: int

    @property
    def shape(self) -> str:
        """In words, for the rows."""
        return "Llama 1 layer d 32" if self.quick else "Llama 4 layers d 256 (3 M)"

    def model(self, seed: int = 0) -> LanguageModel:
        """The model of most comparisons, with the embedded tokenizer's vocabulary."""
        shape = SMALL if self.quick else SHAPES["tiny-shape"]
        return random_model("llama", seed=seed, **{**shape, "vocab_size": len(tokenizer())})


def tokenizer() -> Any:
    """The embedded model's."""
    from transformers import AutoTokenizer

    from posttrain import tiny

    return AutoTokenizer.from_pretrained(tiny.path())


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


class Engine:
    """This library's side: pack, read once, credit, count, forward, backward, clip, AdamW, metrics."""

    def __init__(self, models: dict[str, LanguageModel], method: Method, *, precision: Precision = "exact") -> None:
        self.models, self.method, self.number = models, method, 0
        for model in models.values():
            model.use_precision(precision)
        parameters = {f"policy/{name}": p for name, p in models["policy"].parameters().items()}
        self.stepper = Stepper(Optimizer(lr=LR), parameters, 1_000_000)

    def step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimiser step."""
        world, tally = World(), Tally()
        state = State(step=self.number, total_steps=1_000_000)
        batch = pack(samples, step=self.number)
        batch, seen, state = prepare(
            self.models, self.method, batch, state, token_budget=1 << 20, world=world, on_policy=True
        )
        ready = Ready("", Part(method=self.method), 1.0, batch, seen, state)
        outcome = update(
            self.models,
            self.stepper,
            [(ready, units(batch, self.method.unit))],
            token_budget=1 << 20,
            chunk_bytes=64 << 20,
            world=world,
            tally=tally,
        )
        self.number += 1
        return outcome.metrics | tally.means(world)


def twin(model: LanguageModel) -> Any:
    """The same weights as a transformers module of their own."""
    return copy.deepcopy(model.module)


def trl_settings(**settings: Any) -> dict[str, Any]:
    """Settings of all TRL trainers: CPU, float32, nothing written, nothing reported, no recomputation."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        **settings,
    }


def quiet(trainer: Any) -> None:
    """No line printed at the end of every call of `train`."""
    for callback in list(trainer.callback_handler.callbacks):
        if "Printer" in type(callback).__name__:
            trainer.remove_callback(callback)


class TrlLoop:
    """Rounds of TRL's own training loop, timed from the end of the first step: its start-up is not counted."""

    def __init__(self, trainer: Any, amount: float) -> None:
        from transformers import TrainerCallback

        ends: list[tuple[float, float]] = []

        class Watch(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append((time.process_time(), time.perf_counter()))

        trainer.add_callback(Watch())
        quiet(trainer)
        self.trainer, self.amount, self.ends = trainer, amount, ends

    def __call__(self) -> Seconds:
        """One round."""
        self.ends.clear()
        self.trainer.train()
        first, last = self.ends[0], self.ends[-1]
        return Seconds(last[0] - first[0], last[1] - first[1], self.amount)


def one_thread() -> None:
    """One thread, deterministic weights, and no chatter of the libraries."""
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


__all__ = [
    "NOTHING", "Engine", "Setting", "TrlLoop", "one_thread", "quiet", "ragged", "sample", "tokenizer", "trl_settings", "twin",
]  # fmt: skip
