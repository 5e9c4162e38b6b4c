"""Scores of steps by hand: one number from several, labels, choosing among answers, advantages."""

import itertools
import math

import pytest
import torch
from build import close

from posttrain.formulas import steps
from posttrain.formulas.advantages import group_zscore, group_zscore_sample
from posttrain.options import function_named


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_one_score_from_several() -> None:
    p = scores(0.9, 0.8, 0.95)
    close(steps.product(p), 0.684)
    close(steps.log_product(p), -0.379797)
    close(steps.minimum(p), 0.8)
    close(steps.mean(p), 0.883333)
    close(steps.last(p), 0.95)


EVERY = (steps.product, steps.minimum, steps.mean, steps.last)


def test_aggregators_may_disagree() -> None:
    a, b = scores(0.99, 0.99, 0.6, 0.99), scores(*[0.9] * 6)
    close([steps.product(a), steps.product(b)], [0.582179, 0.531441])
    close([steps.minimum(a), steps.minimum(b)], [0.6, 0.9])
    close([steps.mean(a), steps.mean(b)], [0.8925, 0.9])
    for aggregate in EVERY:
        close(aggregate(scores(0.7)), 0.7, 1e-12)


@pytest.mark.parametrize("aggregate", EVERY)
def test_padding_counts_nowhere(aggregate) -> None:
    p = torch.tensor([[0.9, 0.8, 0.95], [0.6, math.nan, 0.0], [math.nan] * 3], dtype=torch.float64)
    there = torch.tensor([[True] * 3, [True, False, False], [False] * 3])
    found = aggregate(p, there)
    close(found[:2], [aggregate(p[0]), 0.6], 1e-12)
    assert torch.isfinite(found).all()


def test_a_long_product_does_not_vanish() -> None:
    p = torch.full((5000,), 0.5)
    close(steps.log_product(p), 5000 * math.log(0.5), 1e-2)
    assert steps.product(p) == 0.0


def test_three_classes() -> None:
    logits = scores(-1, 0.5, 1.5)
    close(logits.softmax(-1), [0.056612, 0.253716, 0.689672])
    close(steps.positive_only(logits), 0.689672)
    close(steps.neutral_is_right(logits), 0.943388)


def test_labels_to_the_first_wrong_step() -> None:
    labels = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [math.nan, 0.5, 0, math.nan, 1]])
    found = steps.to_first_wrong(labels)
    assert (~found.isnan()).tolist() == [[True] * 3 + [False] * 2, [True] * 5, [False, True, True, False, False]]
    assert steps.every_step(labels) is labels
    assert steps.labels_of_ratings([1, 0, -1, None]) == [1.0, 1.0, 0.0, None]
    assert function_named("to_first_wrong") is steps.to_first_wrong


@pytest.mark.parametrize(("q", "n", "expected"), [(0.1, 8, 0.569533), (0.5, 4, 0.9375)])
def test_labels_from_rollouts(q: float, n: int, expected: float) -> None:
    right = torch.tensor(list(itertools.product([False, True], repeat=n)))  # every outcome of n completions, [2^n, n]
    chance = torch.where(right, q, 1 - q).double().prod(-1)
    soft, hard = steps.soft_labels(right).double(), steps.hard_labels(right).double()
    close((chance * hard).sum(), expected)  # 1 - (1 - q)^n
    close((chance * soft).sum(), q)  # whatever n
    assert torch.equal(hard, (soft > 0).double())
    for last in (True, False):  # the last step has one outcome: the answer is right or it is not
        assert steps.soft_labels(torch.tensor([last])) == steps.hard_labels(torch.tensor([last])) == float(last)


def test_best_of_n_without_bias() -> None:
    ranked = [0.9, 0.7, 0.5, 0.3]
    close([steps.best_of_n(ranked, [0, 1, 1, 0], n) for n in (1, 2, 3, 4)], [0.5, 0.5, 0.25, 0.0])
    close([steps.best_of_n(ranked, [1, 1, 0, 0], n) for n in (1, 2, 3, 4)], [0.5, 0.833333, 1.0, 1.0])  # pass@n
    mixed, right = [0.3, 0.9, 0.5, 0.7, 0.1], [1, 0, 1, 0, 1]
    for n in range(1, 6):  # the mean over all choices of n
        drawn = [max(chosen, key=lambda i: mixed[i]) for chosen in itertools.combinations(range(5), n)]
        close(steps.best_of_n(mixed, right, n), sum(right[i] for i in drawn) / len(drawn))


def test_votes() -> None:
    answers, given = ["A", "A", "A", "B"], [0.2, 0.2, 0.2, 0.9]
    assert steps.weighted_vote(answers, given) == "B"
    assert steps.majority(answers) == "A"
    assert answers[max(range(4), key=lambda i: given[i])] == "B"  # best of n
    assert steps.weighted_vote(answers, [0.5] * 4) == steps.majority(answers)
    assert steps.majority(["x", "y"]) == "x"


@pytest.mark.parametrize(
    ("advantages", "first", "second"),
    [
        (steps.process_advantages, [1.432230, 0.895144, 0.716115], [-1.432230, -1.969316]),
        (steps.process_advantages_sample, [1.281025, 0.800641, 0.640513], [-1.281025, -1.761410]),
    ],
)
def test_advantages_of_steps(advantages, first, second) -> None:
    rewards = torch.full((2, 8), math.nan, dtype=torch.float64)
    ends = torch.zeros(2, 8, dtype=torch.bool)
    for row, places, values in ((0, [1, 3, 6], [0.9, 0.8, 0.95]), (1, [2, 4], [0.9, 0.2])):
        rewards[row, places] = scores(*values)
        ends[row, places] = True
    found = advantages(rewards, ends, torch.tensor([5, 5]), eps=0.0)
    close(found[0], [first[0]] * 2 + [first[1]] * 2 + [first[2]] * 3 + [0])
    close(found[1], [second[0]] * 3 + [second[1]] * 2 + [0] * 3)
    assert advantages(torch.where(ends, 0.1, math.nan), ends, torch.tensor([5, 5])).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize(
    ("advantages", "zscore"),
    [(steps.process_advantages, group_zscore), (steps.process_advantages_sample, group_zscore_sample)],
)
def test_one_step_an_answer_is_grpo(advantages, zscore) -> None:
    rewards, group = scores(1, 0, 0, 1, 1, 0), torch.tensor([0, 0, 0, 1, 1, 1])
    close(advantages(rewards[:, None], torch.ones(6, 1, dtype=torch.bool), group)[:, 0], zscore(rewards, group), 1e-12)
