"""GRPO and what changes one thing in it (Dr. GRPO, DAPO, GSPO, CISPO) by hand, on one fixture."""

import pytest
import torch
from build import close, make_batch, objective, spread
from fixture import two_answers

from posttrain.errors import ConfigError
from posttrain.formulas.advantages import group_zscore
from posttrain.formulas.divergences import difference, k3
from posttrain.formulas.ratios import truncated_importance
from posttrain.formulas.reductions import token_mean
from posttrain.methods.policy.cispo import CISPO
from posttrain.methods.policy.dapo import DAPO
from posttrain.methods.policy.dr_grpo import DrGRPO
from posttrain.methods.policy.grpo import GRPO
from posttrain.methods.policy.gspo import GSPO
from posttrain.types import Readings, State

GROUP_METHODS = [GRPO(beta=0.0), DrGRPO(), DAPO(), GSPO(), CISPO()]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (GRPO(beta=0.0), 0.016240),
        (GRPO(beta=0.0, reduce=token_mean), 0.229972),
        (GRPO(beta=0.04), 0.016734),
        (GRPO(beta=0.0, clip_high=0.28), 0.010889),
        (DrGRPO(max_tokens=4), 0.143732),
        (DAPO(), 0.225691),
        (GSPO(), 0.034270),
        (CISPO(cap=1.28), -0.159543),
        (CISPO(cap=1.1), -0.164484),
    ],
)
def test_fixture(method, wanted) -> None:
    for padding in (0, 3):
        batch, seen, logprob = two_answers(padding=padding)
        loss = objective(method, batch, seen)
        close(loss, wanted)
        loss.backward()
        assert torch.isfinite(logprob.grad).all()
        assert (logprob.grad[~batch.mask] == 0).all()


def test_k3_of_the_fixture() -> None:
    batch, seen, _ = two_answers()
    d = difference(seen.policy.logprob, seen.reference.logprob, batch.mask)
    close(k3(d)[batch.mask], [0.004837] * 4 + [0.049859])


def test_gspo_clips_whole_answers() -> None:
    batch, seen, logprob = two_answers()
    objective(GSPO(), batch, seen).backward()
    assert (logprob.grad[0] == 0).all()  # s = 1.051271, A > 0: clipped
    close(logprob.grad[1, 1:], [1.068939 / 3 / 2] * 3)  # s / n through every token, mean over 2 answers


def test_sampler_correction_multiplies_the_surrogate() -> None:
    batch, seen, _ = two_answers()
    sampler = spread(batch, [[-0.9, -0.9], [-0.7, -0.4, -2.4]])
    weight = truncated_importance(seen.old.logprob, sampler, batch.mask, cap=2.0)
    cost = GRPO(beta=0.0).loss(batch, seen, State())["loss"]
    close((cost * weight)[batch.mask].mean(), 0.332111)
    close(cost[batch.mask].mean(), 0.229972)


def test_first_update_is_the_plain_policy_gradient() -> None:
    for method in (GRPO(beta=0.0, reduce=token_mean), DAPO(), CISPO()):
        batch, seen, logprob = two_answers(first_update=True)
        loss = objective(method, batch, seen)
        loss.backward()
        close(logprob.grad[batch.mask], [-0.2, -0.2, 0.2, 0.2, 0.2])  # -A / 5 tokens
    for method in (GRPO(beta=0.0), GSPO()):
        batch, seen, logprob = two_answers(first_update=True)
        objective(method, batch, seen).backward()
        close(logprob.grad[batch.mask], [-1 / 4, -1 / 4, 1 / 6, 1 / 6, 1 / 6])  # -A / n_i, mean over 2 answers
        assert method.loss(batch, seen, State())["clip_fraction"].sum() == 0


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_equal_rewards_teach_nothing(method) -> None:
    for reward in (0.0, 1.0, 0.1):
        batch = make_batch([2, 4, 1, 3], group=[0] * 4, rewards=[reward] * 4)
        credited = method.credit(batch, Readings(), State())
        assert (credited.advantages == 0).all()
        logprob = torch.full(batch.mask.shape, -0.7, dtype=torch.float64, requires_grad=True)
        seen = Readings.of(policy={"logprob": logprob, "entropy": logprob * 0}, old={"logprob": logprob.detach()})
        objective(method, credited, seen).backward()
        assert logprob.grad is None or (logprob.grad == 0).all()


def test_advantages_are_spread_over_trained_tokens() -> None:
    batch = make_batch([2, 4, 1, 3], group=[0] * 4, rewards=[1, 0, 0, 0], padding=1)
    close(GRPO().credit(batch, Readings(), State()).advantages[:, 1], [1.5, -0.5, -0.5, -0.5], 1e-5)
    wide = GRPO(advantage=group_zscore).credit(batch, Readings(), State()).advantages
    close(wide[:, 1], [1.732051] + [-0.577350] * 3, 1e-5)
    assert (wide[~batch.mask] == 0).all()
    close(DrGRPO().credit(batch, Readings(), State()).advantages[:, 1], [0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_groups_of_one_are_refused(method) -> None:
    assert method.least_samples == 2
    with pytest.raises(ConfigError, match="samples_per_prompt"):
        method.credit(make_batch([2, 2], group=[0, 1], rewards=[1, 0]), Readings(), State())


def test_an_unscored_answer_leaves_its_group_alone() -> None:
    batch = make_batch([2, 2, 2], group=[0, 0, 0], rewards=[1, 0, 0])
    mask = batch.mask.clone()
    mask[2] = False  # its reward could not be had
    credited = DrGRPO().credit(batch.with_(mask=mask), Readings(), State())
    close(credited.advantages[:, 1], [0.5, -0.5, 0.0])


def test_dapo_leaves_out_groups_without_signal() -> None:
    batch = make_batch([2] * 6, group=[0, 0, 1, 1, 2, 2], rewards=[1, 1, 1, 0, 0, 0])
    credited = DAPO().credit(batch, Readings(), State())
    assert credited.mask.any(-1).tolist() == [False, False, True, True, False, False]
    assert int(token_mean(credited)[1]) == 4


def test_dapo_punishes_length_softly() -> None:
    batch = make_batch([4, 8, 2, 2], group=[0, 0, 1, 1], rewards=[1, 1, 1, 0])
    method = DAPO(max_tokens=8, cache=4, advantage=lambda r, g, live: r)  # lengths 4 and 8: penalties 0 and -1
    shaped = method.credit(batch, Readings(), State())
    assert shaped.mask.any(-1).tolist() == [False, False, True, True]  # equal before the penalty: no signal
    batch = batch.with_(rewards=torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    close(method.credit(batch, Readings(), State()).advantages[:2, 1], [1.0, -1.0])
    close(DAPO(cache=0, advantage=lambda r, g, live: r).credit(batch, Readings(), State()).advantages[:2, 1], [1.0, 0.0])


def test_dapo_can_leave_out_truncated_answers() -> None:
    batch = make_batch([2, 2], group=[0, 0], rewards=[1, 0], truncated=torch.tensor([False, True]))
    credited = DAPO(drop_truncated=True).credit(batch, Readings(), State())
    assert credited.mask.any(-1).tolist() == [True, False]
    close(credited.advantages[0, 1], 0.707107, 1e-5)  # the cut answer still counts in the group


def test_the_reference_is_read_only_where_it_weighs() -> None:
    assert "reference" in GRPO().views()
    assert "reference" not in GRPO(beta=0.0).views()
    assert GRPO().views()["old"].credit is False


def test_impossible_settings_are_refused() -> None:
    for build in (lambda: GRPO(clip_low=-0.1), lambda: DrGRPO(max_tokens=0), lambda: CISPO(cap=0), lambda: DAPO(cache=-1)):
        with pytest.raises(ConfigError):
            build()
