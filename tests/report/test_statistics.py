"""Intervals against tables, closed forms and simulation."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from posttrain.errors import ConfigError
from posttrain.report.statistics import (
    bootstrap_interval,
    clustered_interval,
    mean_interval,
    paired_difference,
    pass_at_k,
    pass_at_k_interval,
    proportion_interval,
    share_interval,
    student_quantile,
)


@pytest.mark.parametrize(
    ("freedom", "expected"),  # two-sided 95 %, from the usual table
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (9, 2.262),
        (10, 2.228),
        (29, 2.045),
        (120, 1.980),
        (5000, 1.960),
    ],
)
def test_student_quantiles_are_those_of_the_table(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=6e-4)
    assert student_quantile(0.025, freedom) == pytest.approx(-expected, abs=6e-4)


def test_series_and_expansion_meet() -> None:
    assert student_quantile(0.975, 999) == pytest.approx(student_quantile(0.975, 1000), abs=3e-6)
    assert student_quantile(0.975, 999) > student_quantile(0.975, 1000)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (Wilson)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right: int, n: int, low: float, high: float) -> None:
    found = proportion_interval(right, n)
    assert (found.value, found.n) == (right / n, n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_keeps_a_width_where_all_are_right() -> None:
    found = proportion_interval(10, 10)
    assert found.high == 1.0
    assert found.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)


def test_mean_of_numbers_by_hand() -> None:
    # mean 2.5, s^2 = (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3, t(3) = 3.18245: half = 3.18245 * sqrt(5/3) / 2
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5
    assert found.high - found.value == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, abs=1e-5)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_mean_of_zeros_and_ones_is_a_share() -> None:
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == proportion_interval(3, 4)


def test_what_has_no_interval_says_so() -> None:
    assert math.isnan(mean_interval([]).value)
    one = mean_interval([0.3])
    assert one.value == 0.3
    assert math.isnan(one.low)
    assert math.isnan(mean_interval([0.5, float("nan")]).value)
    assert math.isnan(proportion_interval(0, 0).value)


def test_groups_of_one_size_give_the_interval_of_their_means() -> None:
    values = [0.0, 1.0, 0.5, 0.5, 1.0, 0.9]
    found = clustered_interval(values, ["a", "a", "b", "b", "c", "c"])
    of_means = mean_interval([0.5, 0.5, 0.95])
    assert found.n == 3
    assert (found.value, found.low, found.high) == pytest.approx((of_means.value, of_means.low, of_means.high))


def test_copies_of_a_sample_bring_no_certainty() -> None:
    values = [0.1, 0.6, 0.4, 0.9]
    groups = list(range(4))
    alone = clustered_interval(values, groups)
    copied = clustered_interval(values * 10, groups * 10)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))


def test_groups_that_are_all_right_keep_a_width() -> None:
    assert clustered_interval([1.0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]) == proportion_interval(2, 2)
    assert clustered_interval([0.0] * 4, [0, 0, 1, 1]) == proportion_interval(0, 2)


def test_clustered_intervals_cover_what_they_promise() -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(400):
        values, groups = [], []
        for group in range(12):
            centre = draw.gauss(0.4, 0.2)
            values += [centre + draw.gauss(0, 0.1) for _ in range(6)]
            groups += [group] * 6
        found = clustered_interval(values, groups)
        covered += found.low <= 0.4 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_pass_at_k_equals_counting_all_choices() -> None:
    for n, correct, k in [(6, 2, 3), (5, 0, 2), (5, 5, 1), (7, 1, 7), (8, 3, 1)]:
        answers = [True] * correct + [False] * (n - correct)
        choices = list(itertools.combinations(answers, k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(any(choice) for choice in choices) / len(choices))
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0)])
def test_impossible_pass_at_k_is_refused(n: int, correct: int, k: int) -> None:
    with pytest.raises(ConfigError):
        pass_at_k(n, correct, k)


def test_pass_at_k_interval_holds_the_mean_and_stays_a_share() -> None:
    found = pass_at_k_interval([(8, 0)] * 30 + [(8, 1)] * 10 + [(8, 4)] * 10, 4)
    assert found.value == pytest.approx((10 * 0.5 + 10 * (1 - 1 / 70)) / 50)
    assert 0 <= found.low < found.value < found.high <= 1
    assert pass_at_k_interval([(4, 0)] * 20, 2) == proportion_interval(0, 20)


def test_bootstrap_agrees_with_t_where_there_are_many_values() -> None:
    draw = random.Random(1)
    values = [draw.random() for _ in range(400)]
    boot, student = bootstrap_interval(values), mean_interval(values)
    assert (boot.low, boot.high) == pytest.approx((student.low, student.high), abs=0.002)
    assert bootstrap_interval(values) == boot, "the same numbers give the same interval"


def test_pairing_sees_a_difference_that_two_intervals_hide() -> None:
    draw = random.Random(2)
    before = {str(i): draw.random() for i in range(100)}
    after = {name: score + 0.05 + draw.gauss(0, 0.02) for name, score in before.items()}
    found = paired_difference(before, after)
    assert found.value == pytest.approx(0.05, abs=0.01)
    assert 0.04 < found.low < found.value < found.high < 0.06
    assert mean_interval(list(before.values())).high > mean_interval(list(after.values())).low


def test_paired_difference_takes_common_questions_and_several_answers() -> None:
    found = paired_difference({"a": [0, 1], "b": 1, "left": 0}, {"b": 1.0, "a": [1, 1], "right": 0})
    assert (found.value, found.n) == (0.25, 2)
    assert (found.low, found.high) == (0.0, 0.5)
    with pytest.raises(ConfigError, match="in common"):
        paired_difference({"a": 1}, {"b": 1})


def test_shares_have_an_interval_of_shares_and_from_five_on() -> None:
    """0.1 +- t(4) sqrt(0.05) / sqrt(5) = 0.1 +- 2.776 * 0.1, cut at 0."""
    found = share_interval([0.5, 0.0, 0.0, 0.0, 0.0])
    assert (found.value, found.low) == (0.1, 0.0)
    assert found.high == pytest.approx(0.1 + 2.7764 * 0.1, abs=1e-4)
    assert share_interval([0.5, 1.0, 1.0, 1.0, 1.0]).high == 1.0
    assert not share_interval([0.5, 0.0, 0.0, 0.0]).known
    assert share_interval([1.0, 0.0]) == proportion_interval(1, 2)
    assert not pass_at_k_interval([(4, 1), (4, 2), (4, 0)], 2).known
    assert pass_at_k_interval([(4, 0)] * 3, 2) == proportion_interval(0, 3)
