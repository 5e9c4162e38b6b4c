"""Draws against plain reference implementations and exact distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.random import uniform
from posttrain.samplers.draw import check, draw, invert
from posttrain.types import Sampling


def uniforms(count: int, seed: int = 0) -> Tensor:
    return uniform(seed, 0, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def plain_truncation(probabilities: list[float], *, top_k: int, top_p: float) -> list[float]:
    """Top-k, then top-p of what is left, one token after another; no ties."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if top_k:
        order = order[:top_k]
    mass = sum(probabilities[i] for i in order)
    kept, before = [], 0.0
    for i in order:
        if before >= top_p:
            break
        kept.append(i)
        before += probabilities[i] / mass
    total = sum(probabilities[i] for i in kept)
    return [probabilities[i] / total if i in kept else 0.0 for i in range(len(probabilities))]


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    return float(((counts[some] - expected[some]) ** 2 / expected[some]).sum())


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.7), Sampling(top_k=4), Sampling(top_p=0.6)])
def test_draws_have_the_exact_distribution(sampling: Sampling) -> None:
    count = 40_000
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -3.0, 0.9, -0.4])
    drawn = draw(logits.expand(count, -1), uniforms(count), sampling)
    full = (logits / sampling.temperature).softmax(-1)
    wanted = torch.tensor(plain_truncation(full.tolist(), top_k=sampling.top_k, top_p=sampling.top_p))
    assert chi_square(drawn.tokens, wanted) < 24.3  # the 0.1 % point at 7 degrees of freedom; fewer are stricter
    torch.testing.assert_close(drawn.logprobs, full.log()[drawn.tokens])
    torch.testing.assert_close(drawn.sampled_logprobs, wanted.log()[drawn.tokens])


def test_a_draw_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(4, -1)
    drawn = draw(logits, torch.tensor([0.0, 0.49, 0.51, 0.99], dtype=torch.float64), Sampling())
    assert drawn.tokens.tolist() == [0, 0, 1, 2]
    torch.testing.assert_close(drawn.logprobs.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25]))


@pytest.mark.parametrize("vocabulary", [50, 4096, 5000])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.9), (0, 0.05), (20, 0.5), (1, 1.0), (9999, 1.0)])
def test_truncation_against_a_plain_implementation(vocabulary: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 6
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 3
    u = uniforms(rows, seed=5)
    drawn = draw(logits, u, Sampling(top_k=top_k, top_p=top_p, temperature=1.3))
    full = (logits / 1.3).softmax(-1)
    for row in range(rows):
        wanted = torch.tensor(plain_truncation(full[row].tolist(), top_k=top_k, top_p=top_p), dtype=torch.float64)
        token = int(drawn.tokens[row])
        running = wanted.cumsum(-1)
        assert running[token] - wanted[token] <= u[row] + 1e-12
        assert u[row] < running[token] + 1e-12
        assert math.isclose(float(drawn.sampled_logprobs[row]), math.log(wanted[token]), abs_tol=1e-9)
        assert math.isclose(float(drawn.logprobs[row]), math.log(full[row, token]), abs_tol=1e-9)


def test_top_p_over_a_flat_distribution_needs_more_than_the_first_look() -> None:
    logits = torch.arange(1000).double()[None] * 1e-6
    drawn = draw(logits, torch.zeros(1, dtype=torch.float64), Sampling(top_p=0.5))
    assert 498 <= int(drawn.tokens[0]) <= 501  # the upper half of the entries is kept
    assert math.isclose(float(drawn.sampled_logprobs[0]), -math.log(500), abs_tol=1e-2)


def test_equals_are_kept_together() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(300, -1)
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.3)):
        assert set(draw(logits, uniforms(300), sampling).tokens.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("vocabulary", [6, 6000])
def test_an_entry_of_weight_zero_is_never_drawn(vocabulary: int) -> None:
    weights = torch.zeros(1, vocabulary)
    weights[0, 3], weights[0, vocabulary - 2] = 0.1, 0.3
    for u in (0.0, 1e-300, 0.25, 0.25 + 1e-9, 0.9, 1 - 2**-53, 1.0):  # 1.0 stands for any rounding upwards
        entry, total = invert(weights, torch.tensor([u], dtype=torch.float64))
        assert int(entry) in (3, vocabulary - 2), u
        assert math.isclose(float(total), 0.4, rel_tol=1e-6)


def test_blocks_draw_what_a_running_sum_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(500, 4999, generator=generator, dtype=torch.float64) ** 8
    u = uniforms(500)
    plain = torch.searchsorted(weights.cumsum(-1), (u * weights.sum(-1))[:, None], right=True)[:, 0]
    assert torch.equal(invert(weights, u)[0], plain)


def test_greedy_takes_the_largest_and_scores_it_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    drawn = draw(logits, None, Sampling(greedy=True, temperature=0.0))
    assert drawn.tokens.tolist() == [1]
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[:, 1])
    assert drawn.sampled_logprobs.tolist() == [0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.5), Sampling(top_k=2), Sampling(greedy=True)])
def test_logits_that_are_not_finite_draw_nothing(bad: float, sampling: Sampling) -> None:
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0]])
    tokens = draw(logits, uniforms(2), sampling).tokens.tolist()
    assert tokens[0] == -1
    assert tokens[1] >= 0


def test_banned_tokens_are_fine() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    assert draw(logits, torch.tensor([0.99], dtype=torch.float64), Sampling()).tokens.tolist() == [1]


@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        (Sampling(temperature=0.0), "greedy=True"),
        (Sampling(temperature=-1.0), "temperature"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.5), "top_p"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(max_tokens=0), "max_tokens"),
        (Sampling(stop=("",)), "stop string"),
    ],
)
def test_settings_that_mean_nothing_are_refused(sampling: Sampling, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        check(sampling)
