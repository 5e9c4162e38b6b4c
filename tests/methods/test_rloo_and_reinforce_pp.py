"""RLOO and REINFORCE++ by hand."""

import math

import pytest
import torch
from build import close, float64, make_batch, objective, spread, trained
from fixture import two_answers

from posttrain.errors import ConfigError
from posttrain.methods.policy.reinforce_pp import ReinforcePP, ReinforcePPBaseline, discounted_returns
from posttrain.methods.policy.rloo import RLOO
from posttrain.types import Readings, State


def test_rloo_baseline_is_the_others() -> None:
    batch = make_batch([1] * 4, group=[0] * 4, rewards=[1, 0, 0, 0])
    close(RLOO(beta=0).credit(batch, Readings(), State()).advantages[:, 1], [1] + [-0.333333] * 3)
    with pytest.raises(ConfigError, match="samples_per_prompt"):
        RLOO(beta=0).credit(make_batch([1]), Readings(), State())


def test_rloo_loss_is_that_of_whole_answers() -> None:
    batch, seen, logprob = two_answers(padding=2)
    loss = objective(RLOO(beta=0), batch, seen)
    close(loss, -0.45)  # (1.5 - 2.4) / 2
    loss.backward()
    close(logprob.grad[batch.mask], [-0.5, -0.5, 0.5, 0.5, 0.5])


def test_rloo_takes_the_kl_off_the_reward() -> None:
    batch = make_batch([2, 1], group=[0, 0], rewards=[1.0, 0.0])
    seen = Readings.of(
        old={"logprob": spread(batch, [[-1.0, -1.0], [-2.0]])},
        reference={"logprob": spread(batch, [[-1.5, -1.2], [-1.6]])},
    )
    credited = RLOO(beta=0.1).credit(batch, seen, State())
    close(credited.columns["kl"], [0.7, -0.4])
    a = (1 - 0.07) - (0 + 0.04)  # against the one other answer
    close(credited.advantages[:, 1], [a, -a])
    assert set(RLOO(beta=0).views()) == {"policy"}


def test_reinforce_pp_returns() -> None:
    kl, mask = float64([[0.2, -0.1, 0.5]]), torch.ones(1, 3, dtype=torch.bool)
    score = torch.ones(1, dtype=torch.float64)
    close(discounted_returns(score, kl, mask, beta=0.1, gamma=1.0), [[0.94, 0.96, 0.95]])


def test_reinforce_pp_normalises_over_the_batch_and_its_baseline_over_the_group_first() -> None:
    batch = make_batch([1] * 4, group=[0, 0, 1, 1], rewards=[1, 0, 1, 1], padding=1)
    whole = ReinforcePP(beta=0).credit(batch, Readings(), State())
    close(trained(batch, whole.advantages), [[0.577350], [-1.732051], [0.577350], [0.577350]])
    centred = ReinforcePPBaseline(beta=0).credit(batch, Readings(), State())
    close(trained(batch, centred.advantages), [[1.414214], [-1.414214], [0.0], [0.0]])


def test_reinforce_pp_credit_reads_the_kl_of_the_writer() -> None:
    batch = make_batch([3], rewards=[1.0])
    seen = Readings.of(
        old={"logprob": spread(batch, [[-1.0, -1.0, -1.0]], elsewhere=math.nan)},
        reference={"logprob": spread(batch, [[-1.2, -0.9, -1.5]])},
    )
    close(trained(batch, ReinforcePP(beta=0.1).credit(batch, seen, State()).returns), [[0.94, 0.96, 0.95]])
    assert ReinforcePP(beta=0.1).views()["old"].credit
    assert not ReinforcePP(beta=0).views()["old"].credit


def test_losses_on_the_fixture() -> None:
    batch, seen, _ = two_answers()
    plain = batch.with_columns(kl=torch.zeros_like(batch.logprobs))
    close(objective(ReinforcePP(beta=0), plain, seen), 0.016240)
    # k2 = d^2 / 2 with d = [0.1, 0.1], [0.1, 0.1, -0.3]: (0.005 + 0.055 / 3) / 2 = 0.011667, weighed by 0.1
    close(objective(ReinforcePPBaseline(beta=0.1), batch, seen), 0.016240 + 0.1 * 0.011667)


@pytest.mark.parametrize("method", [ReinforcePP(beta=0), ReinforcePPBaseline(beta=0), RLOO(beta=0)])
def test_equal_rewards_teach_nothing(method) -> None:
    batch = make_batch([2, 3, 1, 2], group=[0, 0, 1, 1], rewards=[0.1] * 4)
    assert (method.credit(batch, Readings(), State()).advantages == 0).all()
