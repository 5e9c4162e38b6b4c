"""Each rule speaks when it should, and a healthy run is left in peace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from posttrain.report.warnings import RULES, warnings_in_words

Row = dict[str, Any]


def steps(count: int, **values: float | Callable[[int], float] | None) -> list[Row]:
    return [
        {"step": step, **{name: value(step) if callable(value) else value for name, value in values.items()}}
        for step in range(count)
    ]


def healthy(count: int) -> list[Row]:
    noise = random.Random(0)
    return steps(
        count,
        reward=lambda step: 0.2 + 0.6 * step / count + noise.gauss(0, 0.03),
        signal=lambda step: 0.6 + noise.gauss(0, 0.05),
        kl=lambda step: 0.04 * step / count,
        entropy=lambda step: 0.6 - 0.2 * step / count,
        truncated=0.02,
        empty=0.0,
        parsed=0.97,
        clip_fraction=0.02,
        logprob_gap=0.0,
        gradient_norm=0.5,
        learning_rate=lambda step: 1e-4 * (1 - step / max(1, count - 1)),
        length=lambda step: 30 + 5 * step / count,
        skipped_updates=0,
        reward_failures=0.0,
        loss=0.01,
        **{"time/sample": 0.6, "time/score": 0.1, "time/update": 0.25, "time/other": 0.05},
    )


@pytest.mark.parametrize("count", [0, 1, 3, 10, 40, 200])
def test_a_healthy_run_is_left_in_peace(count: int) -> None:
    assert warnings_in_words(healthy(count)) == []


CASES = [
    (steps(7, signal=0.0, reward=0.0), "No signal for the last 7 steps", "easier problems"),
    (steps(7, signal=0.0, reward=1.0), "No signal for the last 7 steps", "harder problems"),
    (steps(7, signal=0.0, reward=0.5), "No signal for the last 7 steps", "temperature"),
    (steps(7, signal=0.0, reward=-1.0, all_pass=0.0, all_fail=1.0), "No signal", "easier problems"),
    (steps(12, signal=lambda s: 0.1 * (s % 2)), "in only 5 % of recent groups", "Sample more answers"),
    (steps(20, kl=lambda s: 0.001 * 1.4**s), "leaves its reference fast", "KL weight"),
    (steps(20, kl=2.0), "far from its reference: 2 nats", "evaluate them"),
    (steps(20, entropy=lambda s: 0.5 * 0.7**s), "Entropy has collapsed", "temperature"),
    (steps(20, entropy=lambda s: 0.5 + 0.3 * s), "Entropy has risen", "learning rate"),
    (steps(6, truncated=0.6), "60 % of recent answers are cut", "Raise max_tokens"),
    (steps(6, truncated=0.99), "almost never stops", "stop token"),
    (steps(6, empty=0.8), "80 % of recent answers are empty", "prompt ends"),
    (steps(40, reward=lambda s: 0.3 + 0.02 * math.sin(s)), "Reward is flat", "higher learning rate"),
    (steps(40, reward=lambda s: 0.8 - 0.01 * s), "Reward is falling", "Lower the learning rate"),
    (steps(40, skipped_updates=lambda s: float(s in (3, 9))), "2 updates were skipped in 40 steps", "replay file"),
    (steps(40, skipped_updates=lambda s: float(s == 3)), "1 update was skipped", "not finite"),
    (steps(8, loss=lambda s: float("nan") if s == 2 else 1.0), "Not a number: loss in 1 step", "float32"),
    (steps(8, reward=None), "Not a number: reward in 8 steps", "samples"),
    (steps(8, reward_failures=0.1), "failed for 10 % of recent samples", "deadline"),
    (steps(8, logprob_gap=0.3), "disagree by 0.3 nats", "Sync"),
    (steps(8, parsed=0.0), "Almost no recent answers can be read", "format"),
    (steps(8, parsed=0.3), "Only 30 % of recent answers", "stop token"),
    (steps(8, clip_fraction=0.7), "70 % of recent tokens are clipped", "fewer updates"),
    (steps(8, learning_rate=0.0), "learning rate was zero in 8 steps", "schedule"),
    (steps(8, gradient_norm=0.0), "gradient has been exactly zero", "marked as trained"),
    (steps(30, length=lambda s: 10.0 + 3 * s, reward=0.3), "Answers grew from 16 to 91 tokens", "penalty"),
    (steps(8, **{"time/score": 3.0, "time/sample": 1.0}), "75 % of the time goes into scoring", "workers"),
    (steps(8, **{"time/other": 3.0, "time/sample": 1.0}), "75 % of the time is in no named phase", "disk"),
    (steps(8, **{"time/wait": 1.0, "time/sample": 1.0}), "50 % of the time the trainer waits", "Add samplers"),
]


@pytest.mark.parametrize(("history", "what", "advice"), CASES, ids=[what for _, what, _ in CASES])
def test_a_rule_says_what_is_wrong_and_what_to_do(history: list[Row], what: str, advice: str) -> None:
    said = [warning for warning in warnings_in_words(history) if what in warning]
    assert len(said) == 1, warnings_in_words(history)
    assert advice in said[0]


def test_every_rule_has_a_case() -> None:
    spoken = {
        rule for rule in RULES for history, _, _ in CASES if warnings_in_words(history) and _speaks(rule, history)
    }
    assert spoken == set(RULES)


def _speaks(rule: Any, history: list[Row]) -> bool:
    from posttrain.report.warnings import History

    return rule(History(history)) is not None


def test_without_signal_a_flat_reward_is_not_said_too() -> None:
    said = warnings_in_words(steps(40, signal=0.0, reward=0.0))
    assert len(said) == 1


def test_a_recovered_trouble_is_not_said_any_more() -> None:
    assert warnings_in_words(steps(20, truncated=lambda s: 0.9 if s < 10 else 0.0)) == []


def test_rows_without_a_metric_are_no_zeros() -> None:
    history = steps(10, signal=0.5)
    history += [{"step": 10, "evaluation": 0.4}] * 6
    assert warnings_in_words(history) == []


def test_a_falling_mean_of_a_reward_model_is_no_warning() -> None:
    falling = {"reward": lambda step: 1.0 - 0.02 * step}
    assert any("Reward is falling" in text for text in warnings_in_words(steps(60, **falling)))
    assert not any("Reward is falling" in text for text in warnings_in_words(steps(60, **falling, gap=0.3)))
