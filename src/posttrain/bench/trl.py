"""TRL's own training loop, timed: the peer of the training rows."""

from __future__ import annotations

import copy
import tempfile
import time
from typing import Any

from posttrain.models.model import LanguageModel

from .engine import LR
from .measure import Seconds


def twin(model: LanguageModel) -> Any:
    """The same weights as a transformers module of their own."""
    return copy.deepcopy(model.module)


def trl_settings(*, device: str = "cpu", **settings: Any) -> dict[str, Any]:
    """Settings of all TRL trainers: float32 unless told, nothing written, nothing reported, no recomputation."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "report_to": "none",
        "use_cpu": device == "cpu",
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


__all__ = ["TrlLoop", "quiet", "trl_settings", "twin"]
