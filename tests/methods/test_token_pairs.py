"""Comparisons at every token: the arithmetic by hand, where it starts, and what goes on behind the shorter answer."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.methods import TokenBradleyTerry
from posttrain.methods.reward.token_pairs import held
from posttrain.pack import pack
from posttrain.types import Readings, Sample, State


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def pair(better: list[int], worse: list[int]) -> list[Sample]:
    """Two answers behind a prompt of two tokens."""
    made = []
    for answer in (better, worse):
        tokens = [1, 2, *answer]
        origin, trained = [3, 3] + [6] * len(answer), [False, False] + [True] * len(answer)
        made.append(Sample(tokens=tokens, origin=origin, trained=trained, group="0"))
    return made


def cost(samples: list[Sample], scores: list[list[float]]) -> dict[str, torch.Tensor]:
    seen = Readings.of(policy={"token_reward": torch.tensor(scores)})
    return TokenBradleyTerry().loss(pack(samples), seen, State())


def test_from_the_first_difference_on_the_shorter_one_held() -> None:
    found = cost(pair([5, 6, 7], [5, 8]), [[0, 0, 9.0, 0.5, 1.0], [0, 0, -9.0, 0.25, 0]])
    assert float(found["loss"]) == pytest.approx((softplus(-0.25) + softplus(-0.75)) / 2)  # token 5 is common and not counted
    assert float(found["gap"]) == pytest.approx(0.75)
    assert float(found["accuracy"]) == 1.0


def test_equal_answers_cost_nothing() -> None:
    assert float(cost(pair([5, 6], [5, 6]), [[0, 0, 1.0, 1.0]] * 2)["loss"]) == 0.0


def test_one_token_is_bradley_terry() -> None:
    assert float(cost(pair([5], [6]), [[0, 0, 1.0], [0, 0, 0.2]])["loss"]) == pytest.approx(0.371101, abs=1e-6)


def test_what_is_held() -> None:
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    assert held(torch.arange(8.0).view(2, 4), mask).tolist() == [[0, 1, 2, 2], [4, 5, 6, 7]]
