"""Rankings by hand: all pairs, Plackett-Luce, the best of K, and prompts with different numbers of answers."""

import math

import pytest
import torch
from build import close, float64, make_batch, objective

from posttrain.formulas.preferences import all_pairs, best_of, plackett_luce, ranked, smoothed
from posttrain.formulas.reductions import ranking_mean
from posttrain.methods import AllPairs, BestOfK, BradleyTerry, PlackettLuce
from posttrain.types import Readings

EVERY = [(AllPairs(), all_pairs), (PlackettLuce(), plackett_luce), (BestOfK(), best_of)]


def scalar(method, rewards, group):
    batch = make_batch([2] * len(group), group=group)
    return objective(method, batch, Readings.of(policy={"reward": rewards}))


@pytest.mark.parametrize(
    ("method", "loss", "gradient"),
    [
        (AllPairs(), 0.251150, [-0.129381, 0, 0.129381]),
        (PlackettLuce(), 0.720868, [-0.334759, -0.024213, 0.358972]),
        (BestOfK(), 0.407606, [0.665241 - 1, 0.244728, 0.090031]),  # softmax less the best
    ],
)
def test_one_ranking(method, loss, gradient) -> None:
    rewards = float64([2.0, 1.0, 0.0])
    value = scalar(method, rewards, [0, 0, 0])
    close(value, loss)
    value.backward()
    close(rewards.grad, gradient)
    close(scalar(method, float64([2.0, 1.0, 0.0]) + 17.0, [0, 0, 0]), loss)  # a constant of the prompt's own changes nothing


def test_at_the_start() -> None:
    four = torch.zeros(4, dtype=torch.float64)
    close(scalar(AllPairs(), four, [0] * 4), math.log(2))
    close(scalar(PlackettLuce(), four, [0] * 4), 3.178054)  # ln 24
    close(scalar(BestOfK(), four, [0] * 4), math.log(4))
    values = PlackettLuce().loss(make_batch([2] * 4, group=[0] * 4), Readings.of(policy={"reward": four}), None)
    assert values["accuracy"].tolist() == values["best_first"].tolist() == [0.0]  # ties count as wrong


@pytest.mark.parametrize("method", [AllPairs(), PlackettLuce(), BestOfK()])
def test_two_answers_are_bradley_terry(method) -> None:
    close(scalar(method, float64([1.0, 0.2]), [0, 0]), 0.371101)
    close(scalar(method, float64([1.0, 0.2]), [0, 0]), scalar(BradleyTerry(), float64([1.0, 0.2]), [0, 0]), 1e-12)


@pytest.mark.parametrize(("method", "formula"), EVERY)
def test_rankings_of_different_lengths_stand_in_one_batch(method, formula) -> None:
    lines = [[0.3, -1.1], [2.0, 1.0, 0.0, -0.5], [0.1, 0.4, 0.2]]
    flat = float64([value for line in lines for value in line])
    group = [number for number, line in enumerate(lines) for _ in line]
    value = scalar(method, flat, group)
    value.backward()
    alone = [float64(line) for line in lines]
    mean = sum(formula(line) for line in alone) / 3
    mean.backward()
    close(value, mean, 1e-12)
    close(flat.grad, torch.cat([line.grad for line in alone]), 1e-12)
    order = torch.tensor([2, 0, 6, 3, 1, 7, 4, 8, 5])  # groups may stand between each other: the order within each counts
    close(scalar(method, flat.detach()[order], torch.tensor(group)[order].tolist()), mean, 1e-12)


@pytest.mark.parametrize(("method", "formula"), EVERY)
def test_a_dead_answer_leaves_its_ranking(method, formula) -> None:
    batch = make_batch([2] * 5, group=[0, 0, 0, 7, 7])
    mask = batch.mask.clone()
    mask[0] = mask[4] = False  # the best of the first group; the second keeps one answer, which orders nothing
    rewards = float64([math.nan, 1.0, 0.0, 5.0, math.inf])
    value = objective(method, batch.with_(mask=mask), Readings.of(policy={"reward": rewards}))
    close(value, formula(torch.tensor([1.0, 0.0], dtype=torch.float64)), 1e-12)
    value.backward()
    assert torch.isfinite(rewards.grad).all()
    assert rewards.grad[[0, 3, 4]].tolist() == [0.0] * 3
    close(ranking_mean(batch.with_(mask=mask))[0], [1.0, 0.0])


def test_lines_of_groups() -> None:
    values, there = ranked(torch.arange(5.0), torch.tensor([4, 4, 2, 4, 2]), torch.tensor([True, False, True, True, True]))
    assert values.tolist() == [[2.0, 4.0], [0.0, 3.0]]
    assert there.tolist() == [[True, True], [True, True]]
    none, nobody = ranked(torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))
    assert none.tolist() == [[0.0]]
    assert not nobody.any()


def test_what_is_reported() -> None:
    batch = make_batch([2] * 5, group=[0, 0, 0, 1, 1])
    found = AllPairs().loss(batch, Readings.of(policy={"reward": float64([1.0, 2.0, 0.0, -1.0, -3.0])}), None)
    close(found["accuracy"], [2 / 3, 1.0])
    close(found["best_first"], [0.0, 1.0])
    close(found["reward"], [1.0, -2.0])
    close(found["width"], [2.0, 2.0])


def test_the_least_of_a_soft_label() -> None:
    d = float64(1.386294)  # logit(0.8)
    value = smoothed(d, 0.8)
    close(value, 0.500402)  # the binary entropy of 0.8, not 0
    value.backward()
    close(d.grad, 0.0)
