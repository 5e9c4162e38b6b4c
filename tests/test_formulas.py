"""Formulas against numbers worked out by hand."""

import itertools
import math

import pytest
import torch
from build import close, float64

from posttrain.formulas import advantages, divergences, preferences, ratios, reductions, sequences, surrogates

ONE_GROUP = torch.zeros(4, dtype=torch.int64)


def rewards(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def every(values: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def test_group_advantages() -> None:
    r = rewards(1, 0, 0, 0)  # mean 0.25; population std sqrt(3) / 4, sample std 1 / 2
    close(advantages.group_zscore(r, ONE_GROUP, eps=0.0), [1.732051] + [-0.577350] * 3)
    close(advantages.group_zscore_sample(r, ONE_GROUP, eps=0.0), [1.5, -0.5, -0.5, -0.5])
    close(advantages.group_zscore_sample(r, ONE_GROUP, eps=1e-4), [1.499700] + [-0.499900] * 3)
    close(advantages.group_mean_centred(r, ONE_GROUP), [0.75, -0.25, -0.25, -0.25])
    close(advantages.leave_one_out(r, ONE_GROUP), [1.0] + [-0.333333] * 3)


ALL_GROUP_FORMULAS = [
    advantages.group_mean_centred,
    advantages.leave_one_out,
    advantages.group_zscore,
    advantages.group_zscore_sample,
]


@pytest.mark.parametrize("formula", ALL_GROUP_FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(formula, dtype) -> None:
    for reward in (0.0, 1.0, 0.1, 1 / 3, -7.3):
        equal = torch.full((7,), reward, dtype=dtype)
        assert formula(equal, torch.zeros(7, dtype=torch.int64)).tolist() == [0.0] * 7
    noisy = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)  # differ in the last bit
    assert formula(noisy, torch.zeros(3, dtype=torch.int64)).tolist() == [0.0] * 3


@pytest.mark.parametrize("formula", [advantages.group_zscore, advantages.group_zscore_sample])
def test_standardised_advantages_do_not_see_scale_or_shift(formula) -> None:
    r = rewards(0.3, 0.9, 0.1, 0.4)
    close(formula(5 * r + 3, ONE_GROUP, eps=0.0), formula(r, ONE_GROUP, eps=0.0), 1e-12)


@pytest.mark.parametrize("formula", ALL_GROUP_FORMULAS)
def test_groups_may_be_scattered_and_unscored_rows_count_nowhere(formula) -> None:
    r = rewards(1, 9, 0, 0, 0.5, 100)
    group = torch.tensor([0, 1, 0, 0, 1, 0])
    live = torch.tensor([True, True, True, True, True, False])
    found = formula(r, group, live)
    close(found[[0, 2, 3]], formula(rewards(1, 0, 0), torch.zeros(3, dtype=torch.int64)), 1e-12)
    close(found[[1, 4]], formula(rewards(9, 0.5), torch.zeros(2, dtype=torch.int64)), 1e-12)
    assert found[5] == 0


def test_gae() -> None:
    kl = row(-1 + 1.2, -0.5 + 0.4, -2 + 1.5)  # old - reference = 0.2, -0.1, -0.5
    earned = advantages.rewards_less_kl(rewards(1.0), kl, every(kl), beta=0.1)
    close(earned, [[-0.02, 0.01, 1.05]])
    values = row(0.5, 0.6, 0.7)
    expected = {0.95: [0.500375, 0.4425, 0.35], 1.0: [0.54, 0.46, 0.35], 0.0: [0.08, 0.11, 0.35]}
    for lam, wanted in expected.items():
        found, returns = advantages.gae(earned, values, every(values), gamma=1.0, lam=lam)
        close(found, [wanted], 1e-9)
        close(returns, found + values, 1e-12)
    a, returns = advantages.gae(earned, values, every(values), lam=0.95)
    close(returns, [[1.000375, 1.0425, 1.05]], 1e-9)
    close(advantages.whiten(a, every(a)), [[1.120880, 0.186365, -1.307245]])
    close(advantages.whiten_sample(a, every(a)), [[0.915195, 0.152166, -1.067361]])


def test_a_shift_of_the_score_shifts_advantages_by_its_decay() -> None:
    values = row(0.5, -2.0, 0.7)
    kl = row(0.2, -0.1, -0.5)
    mask = every(values)
    low, _ = advantages.gae(advantages.rewards_less_kl(rewards(1.0), kl, mask, beta=0.1), values, mask, lam=0.95)
    high, _ = advantages.gae(advantages.rewards_less_kl(rewards(4.0), kl, mask, beta=0.1), values, mask, lam=0.95)
    close(high - low, [[3 * 0.95**2, 3 * 0.95, 3.0]], 1e-12)  # 2.7075, 2.85, 3


def test_gae_skips_tokens_that_are_not_trained() -> None:
    values, earned = row(0.5, 0.6, 0.7), row(-0.02, 0.01, 1.05)
    wide = torch.full((1, 7), math.nan, dtype=torch.float64)
    mask = torch.tensor([[False, True, False, False, True, True, False]])
    wide_values, wide_rewards = wide.clone(), wide.clone()
    wide_values[mask], wide_rewards[mask] = values[0], earned[0]
    found, returns = advantages.gae(wide_rewards, wide_values, mask, lam=0.95)
    close(found[mask], [0.500375, 0.4425, 0.35], 1e-9)
    assert (found[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_whitening_equal_values_gives_exactly_nothing() -> None:
    for dtype in (torch.float32, torch.float64):
        equal = torch.full((3, 5), 0.1, dtype=dtype)
        assert (advantages.whiten(equal, every(equal)) == 0).all()
        assert (advantages.whiten_sample(equal, every(equal)) == 0).all()


def test_soft_overlong() -> None:
    lengths = torch.tensor([16384, 17408, 18432, 20480, 20481])
    close(advantages.soft_overlong(lengths, max_tokens=20480, cache=4096), [0, -0.25, -0.5, -1, -1])


def test_clip_and_dual_clip() -> None:
    ratio, a = float64([1.25, 1.25, 0.7, 5.0]), torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    cost = surrogates.clipped(ratio, a, low=0.2, high=0.2)
    close(cost, [-1.2, 1.25, 0.8, 5.0], 1e-12)
    cost.sum().backward()
    close(ratio.grad, [0, 1, 0, 1])
    live = float64([1.25])
    wide = surrogates.clipped(live, a[:1], low=0.2, high=0.28)
    close(wide, [-1.25], 1e-12)
    wide.sum().backward()
    close(live.grad, [-1.0])
    close(surrogates.dual_clipped(ratio, a, low=0.2, high=0.2, ceiling=3.0), [-1.2, 1.25, 0.8, 3.0], 1e-12)
    close(surrogates.was_clipped(ratio, a, low=0.2, high=0.2), [1, 0, 1, 0])


def test_clip_gradient_in_the_log_probability() -> None:
    # (rho, A) = (1.3, 1), (1.3, -1), (0.7, 1), (0.7, -1): mean cost 0.05, gradient A rho / 4 where the clip does not bind.
    logprob = float64([[math.log(x) for x in (1.3, 1.3, 0.7, 0.7)]])
    a = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    cost = surrogates.clipped(ratios.token_ratio(logprob, torch.zeros_like(a), every(a)), a, low=0.2, high=0.2)
    close(cost, [[-1.2, 1.3, -0.7, 0.8]], 1e-12)
    close(cost.mean(), 0.05, 1e-12)
    cost.mean().backward()
    close(logprob.grad, [[0, 0.325, -0.175, 0]], 1e-12)


def test_detached_weight_keeps_the_gradient_of_a_clipped_token() -> None:
    logprob = float64([-0.7])
    weight = torch.tensor([1.5], dtype=torch.float64).clamp(max=1.28)
    cost = surrogates.detached_weight(weight, torch.ones(1, dtype=torch.float64), logprob)
    close(cost, [0.896])
    cost.backward()
    close(logprob.grad, [-1.28])


def test_value_clip() -> None:
    value = float64([0.9, 0.1])
    old, returns = torch.full((2,), 0.5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    cost = surrogates.clipped_value_loss(value, old, returns, clip=0.2)
    close(cost, [0.045, 0.405], 1e-12)
    cost.sum().backward()
    close(value.grad, [0.0, -0.9], 1e-12)


def test_kl_estimators() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    d = p.log() - q.log()
    close(divergences.full_kl(p.log(), q.log()), 0.116783)
    close((p * divergences.k1(d)).sum(), 0.116783)
    close((p * divergences.k3(d)).sum(), 0.116783)
    close((p * divergences.k2(d)).sum(), 0.113281)
    for estimator, variance in ((divergences.k1, 0.212924), (divergences.k2, 0.007221), (divergences.k3, 0.011335)):
        x = estimator(d)
        close((p * x**2).sum() - (p * x).sum() ** 2, variance)
    d = rewards(math.log(0.5 / 0.3))
    close([divergences.k1(d)[0], divergences.k2(d)[0], divergences.k3(d)[0]], [0.510826, 0.130471, 0.110826])


def test_kl_losses_have_different_gradients() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)

    def gradient(loss) -> torch.Tensor:
        logits = p.log().clone().requires_grad_()
        logp = logits.log_softmax(-1)
        (p * loss(logp)).sum().backward()  # the sampling distribution carries no gradient
        return logits.grad

    toward = [0.197021, -0.035035, -0.161986]
    close(gradient(lambda logp: divergences.k1(logp - q.log())), [0, 0, 0])
    close(gradient(lambda logp: divergences.k2(logp - q.log())), toward)
    close(gradient(lambda logp: divergences.k3(logp - q.log())), [0.2, 0, -0.2])
    close(gradient(lambda logp: (logp - p.log()).exp() * divergences.k3(logp - q.log())), toward)


def test_divergences_of_impossible_tokens() -> None:
    first = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    second = torch.tensor([[math.log(0.5), math.log(0.5)]], dtype=torch.float64)
    close(divergences.full_kl(first, second), [math.log(2)])


def test_truncated_importance() -> None:
    old, sampler = row(-0.5, -1, -0.2), row(-1.5, -0.9, -0.2)
    mask = every(old)
    close(ratios.truncated_importance(old, sampler, mask, cap=math.inf), [[2.718282, 0.904837, 1]])
    close(ratios.truncated_importance(old, sampler, mask, cap=2.0), [[2, 0.904837, 1]])
    close(ratios.sequence_importance(old, sampler, mask, cap=10.0), [2.459603])
    close(ratios.truncated_importance(old, old, mask, cap=2.0), [[1, 1, 1]])


def test_ratios_are_clamped_and_blind_to_masked_positions() -> None:
    logprob = float64([[50.0, math.nan, 0.5]])
    mask = torch.tensor([[True, False, True]])
    ratio = ratios.token_ratio(logprob, torch.zeros(1, 3, dtype=torch.float64), mask)
    close(ratio, [[math.exp(20.0), 1.0, math.exp(0.5)]], 1e-3)
    ratio.sum().backward()
    close(logprob.grad, [[0.0, 0.0, math.exp(0.5)]])


def test_bradley_terry_and_friends() -> None:
    gap = float64([0.8])  # 1.0 - 0.2
    close(preferences.logistic(gap), [0.371101])
    close(preferences.logistic(gap - 1 / 3), [0.486793])
    close(preferences.logistic(gap - 1), [0.798139])
    soft = preferences.smoothed(gap, 0.8)
    close(soft, [0.531101])
    soft.backward()
    close(gap.grad, [-0.110026])
    best = math.log(0.8 / 0.2)
    close(best, 1.386294)
    close(preferences.smoothed(rewards(best), 0.8), [0.500402])


def test_rankings() -> None:
    for formula, loss, gradient in (
        (preferences.all_pairs, 0.251150, [-0.129381, 0, 0.129381]),
        (preferences.plackett_luce, 0.720868, [-0.334759, -0.024213, 0.358972]),
        (preferences.best_of, 0.407606, None),
    ):
        r = float64([2.0, 1.0, 0.0])
        value = formula(r)
        close(value, loss)
        value.backward()
        close(r.grad.sum(), 0.0)
        if gradient:
            close(r.grad, gradient)
    close((-preferences.plackett_luce(rewards(2, 1, 0))).exp(), 0.486330)
    orders = [list(order) for order in itertools.permutations([2.0, 1.0, 0.0])]
    close((-preferences.plackett_luce(torch.tensor(orders, dtype=torch.float64))).exp().sum(), 1.0, 1e-12)
    two = rewards(0.3, -1.1)
    for formula in (preferences.all_pairs, preferences.plackett_luce):
        close(formula(two), preferences.logistic(two[0] - two[1]), 1e-12)
    close(preferences.all_pairs(torch.zeros(4, dtype=torch.float64)), math.log(2), 1e-12)
    close(preferences.plackett_luce(torch.zeros(4, dtype=torch.float64)), 3.178054)
    for formula in (preferences.all_pairs, preferences.plackett_luce, preferences.best_of):
        close(formula(rewards(2, 1, 0) + 17.0), formula(rewards(2, 1, 0)), 1e-12)


def test_ratings_with_gaps_and_gates() -> None:
    guess = float64([[0.5, 0.2, 0.9], [0.1, 0.4, 0.3]])
    ratings = torch.tensor([[0.6, math.nan, 0.8], [math.nan, 0.4, 0.0]], dtype=torch.float64)
    loss = preferences.present_squared_error(guess, ratings)
    close(loss, 0.0275)
    loss.backward()
    assert torch.isfinite(guess.grad).all()
    gate, marks = rewards(2, 0, -2), rewards(0.6, 0.3, 0.9)
    close((gate / 10).softmax(-1), [0.401760, 0.328933, 0.269307])
    close(preferences.gated(marks, gate, temperature=10.0), 0.582112)


def test_log_odds_stay_finite_at_probability_one() -> None:
    close(preferences.log_odds(rewards(-1.2, -0.75)), [-0.841618, -0.110647])
    assert torch.isfinite(preferences.log_odds(rewards(0.0, -1e-30))).all()


def test_sequences() -> None:
    values, mask = row(1, math.inf, 3, math.nan), torch.tensor([[True, False, True, False]])
    close(sequences.sequence_sum(values, mask), [4])
    close(sequences.sequence_average(values, mask), [2])
    close(sequences.sequence_average(values, mask & False), [0])
    assert sequences.last_trained(mask).tolist() == [[False, False, True, False]]
    close(sequences.reverse_discounted_sum(values, mask, 0.5), [[1 + 0.5 * 3, 3, 3, 0]])
    close(sequences.next_trained(values, mask), [[3, 3, 0, 0]])


def test_reverse_discounted_sum_agrees_with_the_loop() -> None:
    torch.manual_seed(0)
    values, mask = torch.randn(5, 37, dtype=torch.float64), torch.rand(5, 37) < 0.6
    wanted = torch.zeros_like(values)
    for b in range(5):
        later = 0.0
        for t in reversed(range(37)):
            if mask[b, t]:
                later = float(values[b, t]) + 0.9 * later
            wanted[b, t] = later
    found = sequences.reverse_discounted_sum(values, mask, 0.9)
    close(found[mask], wanted[mask], 1e-12)


def test_aggregation_of_one_group() -> None:
    # r = [1, 0, 0, 0], sample standard deviation, ratio 1: token costs are -A; answers of 2, 4, 1 and 3 tokens.
    from build import make_batch

    batch = make_batch([2, 4, 1, 3])
    a = advantages.group_zscore_sample(rewards(1, 0, 0, 0), ONE_GROUP, eps=0.0)
    cost = -a[:, None].expand(batch.mask.shape)

    def mean(reduction) -> torch.Tensor:
        weights, count = reduction(batch)
        return (cost * weights).sum() / count

    close(mean(reductions.sequence_mean), 0.0)
    close(mean(reductions.token_mean), 0.1)  # -(2 * 1.5 - 8 * 0.5) / 10
    close(mean(reductions.sequence_sum_mean), 0.25)
    close(mean(reductions.constant(8)), 0.03125)
    weights, count = reductions.sequence_mean(batch)
    close((weights / count)[:, 1], [0.125, 0.0625, 0.25, 0.083333])
