"""The reward of a step, with an interval that can be."""

from __future__ import annotations

import pytest

from posttrain.monitor import sample_metrics
from posttrain.types import Origin, Sample


def samples(rewards: list[list[float]]) -> list[Sample]:
    """Answers of one token, a list of rewards a group."""
    return [
        Sample(tokens=[1, 2], origin=[int(Origin.USER), int(Origin.POLICY)], trained=[False, True], group=str(g), reward=reward)
        for g, group in enumerate(rewards)
        for reward in group
    ]


def test_a_reward_of_few_groups_has_no_interval() -> None:
    found = sample_metrics(samples([[0.0, 0.0], [0.0, 1.0]]), "", groups=True)
    assert found["reward"] == 0.25
    assert not {"reward_low", "reward_high"} & found.keys()
    assert {"reward_low", "reward_high"} <= sample_metrics(samples([[0.0, 1.0]] * 4 + [[1.0, 1.0]]), "", groups=True).keys()


def test_the_interval_of_a_share_stays_one() -> None:
    """Group means 1, 0, 0, 0, 0: 0.2 +- t(4) sqrt(0.2) / sqrt(5) = 0.2 +- 2.776 * 0.2."""
    found = sample_metrics(samples([[1.0, 1.0], *[[0.0, 0.0]] * 4]), "", groups=True)
    assert found["reward_low"] == 0.0
    assert found["reward_high"] == pytest.approx(0.2 + 2.7764 * 0.2, abs=1e-4)


def test_another_reward_is_not_taken_for_a_share() -> None:
    found = sample_metrics(samples([[1.0, 1.0], [-0.5, -0.5], *[[0.0, 0.0]] * 3]), "", groups=True)
    assert found["reward_low"] < 0
