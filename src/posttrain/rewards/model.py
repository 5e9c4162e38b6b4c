"""A reward model as a reward: what its scalar head says at the last token of an answer.

`model:FOLDER` names one in a run or a recipe (`model:STAGE` there); it is read beside the trainer, in this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError, DataError
from posttrain.forward import read
from posttrain.pack import micro_batches, pack
from posttrain.rewards.reward import Answer
from posttrain.types import Origin, Read, Sample, View

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel

__all__ = ["RewardModel", "as_it_stands", "normalised", "opened", "reward_scores", "step_scores"]

BUDGET = 8192
"""Real tokens of one forward."""


@torch.no_grad()
def reward_scores(model: LanguageModel, samples: Sequence[Sample], *, budget: int = BUDGET) -> list[float]:
    """The reward head at the last token of each sample, `[S]`.

    Raises:
        ConfigError: The model has no reward head.
    """
    return [float(value) for value in _read(model, samples, reads.reward, budget)]


@torch.no_grad()
def step_scores(
    model: LanguageModel, samples: Sequence[Sample], ends: Sequence[Sequence[int]], *, budget: int = BUDGET
) -> list[list[float]]:
    """A process reward model's chance that each step is right: sigmoid of its head at the step's last token.

    Args:
        model: Trained with `process_reward`.
        samples: S answers.
        ends: For each, the places in its tokens of those that end its steps, `[S][K]`.
        budget: Real tokens of one forward.

    Raises:
        ConfigError: The model has no reward head.
    """
    marked = [
        replace(sample, trained=[place in set(each) for place in range(len(sample))])
        for sample, each in zip(samples, ends, strict=True)
    ]
    values = _read(model, marked, reads.token_reward, budget)
    return [[value[end].sigmoid().item() for end in each] for value, each in zip(values, ends, strict=True)]


def _read(model: LanguageModel, samples: Sequence[Sample], quantity: Read, budget: int) -> list[Tensor]:
    """One reading of every sample, `[]` or `[T]` each."""
    if "reward" not in model.heads:
        raise ConfigError("this model has no reward head; train one with bradley_terry, plackett_luce, outcome_reward, ...")
    if not samples:
        return []
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    batch = pack(samples, dtype=wide).to(model.device)
    view = {"policy": View(reads=(quantity,), grad=False)}
    found: dict[int, Tensor] = {}
    for rows in micro_batches(batch, [[row] for row in range(len(samples))], budget):
        values = getattr(read({"policy": model}, batch.rows(rows.to(model.device)), view).policy, quantity.name).cpu()
        found |= dict(zip(rows.tolist(), values, strict=True))
    return [found[row] for row in range(len(samples))]


@torch.no_grad()
def normalised(model: LanguageModel, samples: Sequence[Sample]) -> tuple[float, float]:
    """Rescale a reward head so that these answers score 0 on average with standard deviation 1; the order stays.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, section 2.1.

    Returns:
        Mean and standard deviation before.

    Raises:
        DataError: The answers all score the same, so that there is no scale.
    """
    scores = torch.tensor(reward_scores(model, samples), dtype=torch.float64)
    mean, std = float(scores.mean()), float(scores.std(unbiased=False)) if len(samples) else 0.0
    if not std > 0:
        raise DataError(f"the reward model gives all {len(samples)} answers the same score; expected answers that differ")
    head = model.add_reward_head()
    head.weight.div_(std)
    head.bias.sub_(mean).div_(std)
    return mean, std


@lru_cache(maxsize=4)
def opened(folder: str, stamp: float) -> tuple[LanguageModel, Any, Any]:  # noqa: ARG001
    """Model, tokenizer and renderer of a folder; read again where its weights changed (`stamp`)."""
    from posttrain.data.chat import renderer_of
    from posttrain.models.load import load

    model, tokenizer = load(folder)
    model.use_quickest()
    model.module.requires_grad_(False)
    return model, tokenizer, renderer_of(model, tokenizer)


def as_it_stands(answer: Answer, renderer: Any) -> Sample:
    """An answer as a row for a model: the very tokens where its tokenizer reads them as the same text, else rendered anew.

    Raises:
        ConfigError: The answer's tokens are another tokenizer's, and its prompt is not known as messages.
    """
    if answer.tokens and renderer.decode(answer.tokens[: answer.num_prompt_tokens]) == answer.prompt:
        number = answer.num_prompt_tokens
        origin = [int(Origin.USER)] * number + [int(Origin.POLICY)] * (len(answer.tokens) - number)
        return Sample(tokens=list(answer.tokens), origin=origin, trained=[False] * len(answer.tokens))
    if not answer.messages:
        raise ConfigError("a reward model with another tokenizer needs the prompt as messages; give rows with 'prompt'")
    row = {"prompt": answer.messages, "completion": [{"role": "assistant", "content": answer.text}]}
    made: Sample = renderer.demonstrations(row)[-1]
    return made


@dataclass(frozen=True)
class RewardModel:
    """Scores answers by a model's reward head."""

    folder: str

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer."""
        weights = Path(self.folder) / "model.safetensors"
        model, _, renderer = opened(self.folder, weights.stat().st_mtime if weights.exists() else 0.0)
        return reward_scores(model, [as_it_stands(answer, renderer) for answer in answers])
