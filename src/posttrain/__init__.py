"""Post-training of language models: supervised fine-tuning, preferences, and reinforcement learning.

Importing this package imports nothing heavy; every public name is loaded when it is first used.

Example (ten lines from a base model to a fine-tuned one):
    >>> from posttrain import Run, train, methods, tasks                                        # doctest: +SKIP
    >>> task = tasks.task("word-problems")                                                      # doctest: +SKIP
    >>> run = Run(method=methods.SFT(), model="tiny", data=task.rows("demonstrations", 100), out="runs/sft")
    ...                                                                                         # doctest: +SKIP
    >>> train(run)                                                                              # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.errors import PosttrainError
    from posttrain.method import Method, Optimizer, Part, Sum
    from posttrain.pipeline import run_recipe
    from posttrain.rewards.reward import Reward
    from posttrain.run import Run, train
    from posttrain.types import Batch, Read, Readings, Sample, Sampling, State, Term, Verdict, View

__version__ = "0.1.0"

_HOMES = {
    "Batch": "posttrain.types",
    "Method": "posttrain.method",
    "Optimizer": "posttrain.method",
    "Part": "posttrain.method",
    "PosttrainError": "posttrain.errors",
    "Read": "posttrain.types",
    "Readings": "posttrain.types",
    "Reward": "posttrain.rewards.reward",
    "Run": "posttrain.run",
    "Sample": "posttrain.types",
    "Sampling": "posttrain.types",
    "State": "posttrain.types",
    "Sum": "posttrain.method",
    "Term": "posttrain.types",
    "Verdict": "posttrain.types",
    "View": "posttrain.types",
    "run_recipe": "posttrain.pipeline",
    "train": "posttrain.run",
}

__all__ = [
    "Batch",
    "Method",
    "Optimizer",
    "Part",
    "PosttrainError",
    "Read",
    "Readings",
    "Reward",
    "Run",
    "Sample",
    "Sampling",
    "State",
    "Sum",
    "Term",
    "Verdict",
    "View",
    "run_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'posttrain' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
