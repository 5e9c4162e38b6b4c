"""Quicker arithmetic learns as well as exact arithmetic: GRPO over five seeds in every precision."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from small import demonstrations, lines, small_run

from posttrain.method import Optimizer
from posttrain.methods import GRPO
from posttrain.report.statistics import mean_interval
from posttrain.rewards import Answer, Reward
from posttrain.run import train
from posttrain.types import Sampling

SEEDS, STEPS = 5, 60


def share_of_letters(answer: Answer) -> float:
    """Share of lower-case letters: something that every answer can do better."""
    return sum(sign.islower() for sign in answer.text) / max(1, len(answer.text))


LETTERS = Reward("letters", share_of_letters, where="inline")


@pytest.mark.slow
def test_fast_modes_learn_as_well_as_the_exact_one(small_model: Path, tmp_path: Path) -> None:
    gains: dict[str, list[float]] = {}
    for precision in ("exact", "fast", "bf16"):
        for seed in range(SEEDS):
            out = tmp_path / f"{precision}-{seed}"
            changes = {"seed": seed, "precision": precision, "steps": STEPS, "save_every": 0, "sampling": Sampling(max_tokens=12)}
            train(
                small_run(
                    GRPO(beta=0.0), small_model, out, data=demonstrations(16), rewards=(LETTERS,),
                    samples_per_prompt=8, prompts_per_step=4, optimizer=Optimizer(lr=5e-3), **changes,
                )
            )  # fmt: skip
            rewards = [row["reward"] for row in lines(out)]
            gains.setdefault(precision, []).append(statistics.mean(rewards[-8:]) - statistics.mean(rewards[:8]))
    found = {name: mean_interval(values) for name, values in gains.items()}
    print({name: str(interval) for name, interval in found.items()})
    assert all(interval.low > 0 for interval in found.values()), "nothing was learnt"
    for precision in ("fast", "bf16"):
        assert found[precision].low <= found["exact"].high
        assert found["exact"].low <= found[precision].high
