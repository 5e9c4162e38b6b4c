"""The numbers of RLAIF (arXiv:2309.00267) and of Constitutional AI (arXiv:2212.08073), worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.formulas.preferences import smoothed
from posttrain.judges.probabilities import (
    agreement,
    among,
    clamped,
    debiased,
    expectation,
    mean_wins,
    neither,
    option_logprobs,
    regularised,
    scaled,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def near(value: float) -> object:
    """Equal to six digits after the point."""
    return pytest.approx(value, abs=5.1e-7)


def loss(p: float, d: float) -> float:
    """Soft cross-entropy of a reward difference."""
    return float(smoothed(torch.tensor(d, dtype=torch.float64), p))


# ---------------------------------------------------------------------------------------------------------------- RLAIF


def test_two_orders_are_averaged_as_probabilities() -> None:
    first, swapped = among([-0.5, -1.5])[0], among([-0.9, -0.7])[0]
    assert (first, swapped, 1 - swapped) == (near(0.731059), near(0.450166), near(0.549834))
    assert debiased(first, swapped) == near(0.640446)
    log_odds = (math.log(first / (1 - first)) + math.log((1 - swapped) / swapped)) / 2
    assert sigmoid(log_odds) == near(0.645656)  # what averaging log-odds would give


def test_pure_position_bias_says_nothing_and_teaches_nothing() -> None:
    slot = among([-0.2, -2.0])[0]
    assert (slot, 1 - slot) == (near(0.858149), near(0.141851))
    assert debiased(slot, slot) == 0.5
    d = torch.zeros((), requires_grad=True)
    smoothed(d, debiased(slot, slot)).backward()
    assert d.grad is not None
    assert float(d.grad) == 0.0


def test_swapping_the_completions_mirrors_the_preference_and_leaves_the_loss() -> None:
    p = debiased(among([-0.5, -1.5])[0], among([-0.9, -0.7])[0])
    mirrored = debiased(among([-0.9, -0.7])[0], among([-0.5, -1.5])[0])
    assert mirrored == pytest.approx(1 - p)
    assert loss(p, 0.8) == pytest.approx(loss(mirrored, -0.8))


def test_soft_labels_have_a_minimum_and_hard_ones_do_not() -> None:
    p = 0.640446
    assert (loss(p, 0.0), loss(p, 0.8)) == (near(0.693147), near(0.658744))
    best = math.log(p / (1 - p))
    assert best == pytest.approx(0.577302, abs=3e-6)  # p itself is given to six digits
    assert loss(p, best) == near(0.653161)
    assert min(loss(p, best - 0.01), loss(p, best + 0.01)) > loss(p, best)
    assert loss(1.0, 0.8) == near(0.371101)
    assert loss(1.0, 1.6) < loss(1.0, 0.8)


def test_mass_on_other_tokens_changes_no_preference_and_is_reported() -> None:
    assert among([-0.5, -1.5])[0] == pytest.approx(among([-5.5, -6.5])[0], abs=1e-15)
    assert neither([-0.5, -1.5]) == pytest.approx(1 - math.exp(-0.5) - math.exp(-1.5))
    assert neither([-5.5, -6.5]) > 0.99


def test_expected_score() -> None:
    values = [float(i) for i in range(1, 11)]
    p = [0.0] * 6 + [0.2, 0.5, 0.1, 0.0]

    def score(p: list[float]) -> float:
        return expectation([math.log(x) if x else -math.inf for x in p], values)

    assert score(p) == near(7.875)
    assert scaled(score(p)) == near(0.527778)
    assert score([0.1] * 10) == near(5.5)
    assert scaled(5.5) == 0.0
    assert scaled(score([0.0] * 9 + [1.0])) == near(1.0)
    assert scaled(score([1.0] + [0.0] * 9)) == near(-1.0)
    assert score([x / 7 for x in p]) == pytest.approx(score(p))


def test_the_objective_with_its_kl() -> None:
    assert regularised(0.527778, 0.3, 0.05) == near(0.486389)
    assert regularised(0.527778, 0.3, 0.0) == 0.527778
    assert near(0.052632) == 0.05 / 0.95
    assert regularised(0.527778, 0.3, 0.05) / 0.95 == pytest.approx(0.527778 - 0.05 / 0.95 * 0.3)


def test_agreement_and_mean_wins() -> None:
    assert agreement([0.8, 0.4, 0.55, 0.2], [True, True, True, False]) == 0.75
    assert agreement([0.5, 0.5], [True, False]) == 0.0  # a tie agrees with neither
    wins = [[0.5, 0.9, 0.7, 0.8], [0.1, 0.5, 0.3, 0.6], [0.3, 0.7, 0.5, 0.6], [0.2, 0.4, 0.4, 0.5]]
    assert mean_wins(wins) == [near(0.8), near(0.333333), near(0.533333), near(0.333333)]


# ------------------------------------------------------------------------------------------------------ Constitutional AI


def test_two_options_alone_are_normalised() -> None:
    given = [math.log(0.03), math.log(0.01)]
    assert among(given)[0] == near(0.75)
    assert among([x + 2.0 for x in given])[0] == near(0.75)


def test_an_ensemble_of_principles_averages_probabilities() -> None:
    p = [among(pair)[0] for pair in ([-0.5, -2.0], [-1.2, -0.9], [-3.0, -1.0])]
    assert p == [near(0.817574), near(0.425557), near(0.119203)]
    assert sum(p) / 3 == near(0.454112)
    moved = [clamped(x) for x in p]
    assert moved == [0.6, near(0.425557), 0.4]
    assert sum(moved) / 3 == near(0.475186)


def test_clamping() -> None:
    assert [clamped(x) for x in (0.97, 0.12, 0.5)] == [0.6, 0.4, 0.5]
    many = [i / 50 for i in range(51)]
    assert [clamped(clamped(x)) for x in many] == [clamped(x) for x in many] == sorted(clamped(x) for x in many)
    assert all(clamped(1 - x) == pytest.approx(1 - clamped(x)) for x in many)
    assert (loss(0.6, 1.0), loss(1.0, 1.0)) == (near(0.713262), near(0.313262))
    lowest = math.log(0.6 / 0.4)
    assert lowest == near(0.405465)
    assert loss(0.6, lowest) < min(loss(0.6, lowest - 0.01), loss(0.6, lowest + 0.01))


def test_order_swap() -> None:
    assert debiased(sigmoid(1.5), sigmoid(0.4)) == near(0.609443)
    assert debiased(sigmoid(0.7), sigmoid(0.7)) == 0.5


def test_letters() -> None:
    p = among([-2.0, -1.0, -1.5, -4.0])
    assert p == [near(0.181741), near(0.494023), near(0.299640), near(0.024596)]
    assert sorted("ABCD", key=lambda letter: -p["ABCD".index(letter)]) == ["B", "C", "A", "D"]
    assert p[1] / (p[1] + p[2]) == near(0.622459)
    assert sigmoid(0.5) == near(0.622459)


# -------------------------------------------------------------------------------------------------------------- options


def test_ways_of_writing_add_up_and_longer_options_take_their_mass() -> None:
    ways = [[("1",), (" ", "1")], [("1", "0"), (" ", "1", "0")]]
    p = [[0.5, 0.2], [0.2, 0.05]]
    found = option_logprobs(ways, [[math.log(x) for x in xs] for xs in p])
    assert [math.exp(x) for x in found] == [pytest.approx(0.3 + 0.15), pytest.approx(0.25)]


def test_a_chain_of_beginnings_is_taken_off_once() -> None:
    ways = [[("1",)], [("1", "0")], [("1", "0", "0")]]
    found = option_logprobs(ways, [[math.log(0.6)], [math.log(0.3)], [math.log(0.1)]])
    assert [math.exp(x) for x in found] == [pytest.approx(0.3), pytest.approx(0.2), pytest.approx(0.1)]


def test_no_option_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no option has any probability"):
        among([-math.inf, -math.inf])
    assert option_logprobs([[("a",)], []], [[math.log(0.5)], []]) == [pytest.approx(math.log(0.5)), -math.inf]
