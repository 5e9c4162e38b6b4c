"""PPO by hand: token rewards, advantages, both clips, the adaptive KL weight, and its optimum."""

import math
from pathlib import Path

import pytest
import torch
from build import close, make_batch, objective, spread, trained
from small import lines, small_run
from test_every_method import Rig, difference

from posttrain.errors import ConfigError
from posttrain.formulas.advantages import gae, rewards_less_kl, whiten_keeping_mean, whiten_sample
from posttrain.method import Part
from posttrain.methods.policy.ppo import PPO, adapted, with_pretraining
from posttrain.methods.sft.sft import SFT
from posttrain.run import train
from posttrain.types import Readings, State


def rollout(*, padding: int = 0, score: float = 1.0):
    batch = make_batch([3], padding=padding, rewards=[score])
    old = spread(batch, [[-1.0, -0.5, -2.0]], elsewhere=math.nan)
    return batch, Readings.of(
        old={"logprob": old},
        reference={"logprob": spread(batch, [[-1.2, -0.4, -1.5]])},
        old_critic={"value": spread(batch, [[0.5, 0.6, 0.7]], elsewhere=math.inf)},
    )


@pytest.mark.parametrize("padding", [0, 4])
def test_credit(padding) -> None:
    batch, seen = rollout(padding=padding)
    credited = PPO(beta=0.1).credit(batch, seen, State())
    close(trained(batch, credited.returns), [[1.000375, 1.0425, 1.05]], 1e-9)  # from advantages before whitening
    close(trained(batch, credited.advantages), [[1.120880, 0.186365, -1.307245]])
    assert (credited.advantages[~batch.mask] == 0).all()
    close(credited.columns["kl"], [0.2 - 0.1 - 0.5])
    longer = PPO(beta=0.1, lam=1.0).credit(batch, seen, State())
    close(trained(batch, longer.returns - spread(batch, [[0.5, 0.6, 0.7]])), [[0.54, 0.46, 0.35]], 1e-9)


def test_rewards_of_tokens_and_advantages_before_whitening() -> None:
    batch, seen = rollout()
    rewards = rewards_less_kl(batch.rewards, seen.old.logprob - seen.reference.logprob, batch.mask, beta=0.1)
    close(trained(batch, rewards), [[-0.02, 0.01, 1.05]], 1e-9)
    for lam, wanted in ((0.95, [0.500375, 0.4425, 0.35]), (1.0, [0.54, 0.46, 0.35]), (0.0, [0.08, 0.11, 0.35])):
        advantages, _ = gae(rewards, seen.old_critic.value, batch.mask, lam=lam)
        close(trained(batch, advantages), [wanted], 1e-9)
    advantages, _ = gae(rewards, seen.old_critic.value, batch.mask, lam=0.95)
    close(trained(batch, whiten_sample(advantages, batch.mask)), [[0.915195, 0.152166, -1.067361]])


def test_a_shift_of_the_score_decays_towards_the_start() -> None:
    method, (batch, seen), (other, more) = PPO(beta=0.1), rollout(), rollout(score=4.0)
    shift = method.credit(other, more, State()).returns - method.credit(batch, seen, State()).returns
    close(trained(batch, shift), [[2.7075, 2.85, 3.0]], 1e-9)


def endless(score: float, *, cut: bool, beta: float = 0.05, method: PPO | None = None) -> float:
    """The sum of the token rewards of a four-token answer whose k1 to the reference adds up to 12, as its first return."""
    batch = make_batch([4], rewards=[score]).with_(truncated=torch.tensor([cut]))
    seen = Readings.of(
        old={"logprob": spread(batch, [[-1.0] * 4])},
        reference={"logprob": spread(batch, [[-4.0] * 4])},
        old_critic={"value": torch.zeros_like(batch.logprobs)},
    )
    method = method or PPO(beta=beta, lam=1.0, missing_end=-10.0)
    return float(method.credit(batch, seen, State()).returns[0, 1])


def test_verified_rewards_and_answers_without_an_end() -> None:
    close([endless(10, cut=False), endless(0, cut=False), endless(10, cut=True)], [9.4, -0.6, -10.6], 1e-9)
    close([endless(x, cut=cut, beta=0.0) for x, cut in ((10, False), (0, False), (10, True))], [10, 0, -10], 1e-9)
    close(endless(10, cut=True, method=PPO(beta=0.05, lam=1.0)), 9.4, 1e-9)  # left out, a cut answer keeps what it earned


def test_without_values_and_kl_every_token_earns_the_whole_reward() -> None:
    batch = make_batch([3, 2], rewards=[10.0, 10.0])
    zero = torch.zeros_like(batch.logprobs)
    seen = Readings.of(old={"logprob": zero}, old_critic={"value": zero})
    credited = PPO(beta=0.0, lam=1.0).credit(batch, seen, State())
    assert (credited.returns[batch.mask] == 10).all()
    assert (credited.advantages == 0).all()  # all equal: whitened to 0, not to NaN


def test_whitened_rewards_keep_their_mean() -> None:
    batch = make_batch([3, 1], padding=2)
    rewards = spread(batch, [[1.0, 2.0, 3.0], [6.0]], elsewhere=math.nan)
    deviation = math.sqrt((4 + 1 + 0 + 9) / 4)
    found = whiten_keeping_mean(rewards, batch.mask)
    close(found[batch.mask], [3 - 2 / deviation, 3 - 1 / deviation, 3.0, 3 + 3 / deviation])
    assert (found[~batch.mask] == 0).all()
    close(whiten_keeping_mean(torch.full_like(rewards, 2.0), batch.mask)[batch.mask], [2.0] * 4)
    plain, seen = rollout()
    credited = PPO(beta=0.1, lam=1.0, whiten_rewards=True).credit(plain, seen, State())
    raw = torch.tensor([-0.02, 0.01, 1.05], dtype=torch.float64)
    white = (raw - raw.mean()) / raw.std(correction=0) + raw.mean()
    close(trained(plain, credited.returns), [[white.sum(), white[1:].sum(), white[2]]])


def test_a_shared_critic_costs_the_same_as_a_second_model() -> None:
    batch, seen = rollout()
    values = {**seen.old.values, **seen.old_critic.values}
    shared = Readings.of(old=values, reference=seen.reference.values)
    one, two = PPO(), PPO(shared_critic=True)
    credited = one.credit(batch, seen, State())
    for name in ("advantages", "returns"):
        close(getattr(two.credit(batch, shared, State()), name), getattr(credited, name), 1e-12)
    zero = torch.zeros_like(batch.logprobs)
    now = {"logprob": seen.old.logprob + 0.1, "entropy": zero}
    value = {"value": spread(batch, [[0.4, 0.9, 0.7]])}
    before = {"old": seen.old.values, "old_critic": seen.old_critic.values}
    apart = one.loss(credited, Readings.of(policy=now, critic=value, **before), State())
    together = two.loss(credited, Readings.of(policy={**now, **value}, old=values), State())
    for name, found in apart.items():
        close(torch.nan_to_num(together[name]), torch.nan_to_num(found), 1e-12)
    assert (one.trains, two.trains) == (("policy", "critic"), ("policy",))
    assert {view.model for view in two.views().values()} == {"policy", "reference"}


def test_a_constant_shift_of_the_score_is_whitened_away_at_lambda_one() -> None:
    batch, seen = rollout()
    other, more = rollout(score=4.0)
    method = PPO(beta=0.1, lam=1.0)
    close(method.credit(other, more, State()).advantages, method.credit(batch, seen, State()).advantages, 1e-9)


def update(*, logprob, old, values, old_values, advantages, returns, method: PPO):
    batch = make_batch([len(logprob)])
    batch = batch.with_(advantages=spread(batch, [advantages]), returns=spread(batch, [returns]))
    now = spread(batch, [logprob], elsewhere=math.nan).requires_grad_()
    value = spread(batch, [values], elsewhere=math.nan).requires_grad_()
    seen = Readings.of(
        policy={"logprob": now, "entropy": torch.zeros_like(now)},
        old={"logprob": spread(batch, [old])},
        critic={"value": value},
        old_critic={"value": spread(batch, [old_values])},
    )
    loss = objective(method, batch.with_columns(kl=torch.zeros(1, dtype=torch.float64)), seen)
    loss.backward()
    return loss, now.grad[0, 1:], value.grad[0, 1:]


def test_policy_clip() -> None:
    loss, gradient, _ = update(
        logprob=[math.log(x) for x in (1.3, 1.3, 0.7, 0.7)],
        old=[0.0] * 4,
        values=[0.0] * 4,
        old_values=[0.0] * 4,
        advantages=[1.0, -1.0, 1.0, -1.0],
        returns=[0.0] * 4,
        method=PPO(),
    )
    close(loss, 0.05)  # (-1.2 + 1.3 - 0.7 + 0.8) / 4
    close(gradient, [0, 0.325, -0.175, 0])


def test_value_clip() -> None:
    for value, cost, slope in ((0.9, 0.045, 0.0), (0.1, 0.405, -0.9)):
        loss, _, gradient = update(
            logprob=[-1.0], old=[-1.0], values=[value], old_values=[0.5], advantages=[0.0], returns=[1.0], method=PPO(vf=1.0)
        )
        close(loss, cost)
        close(gradient, [slope])


def test_first_update_is_reinforce_with_a_baseline() -> None:
    _, gradient, _ = update(
        logprob=[-1.0, -0.5],
        old=[-1.0, -0.5],
        values=[0.0] * 2,
        old_values=[0.0] * 2,
        advantages=[0.8, -1.5],
        returns=[0.0] * 2,
        method=PPO(),
    )
    close(gradient, [-0.4, 0.75])  # -A / 2


def test_nothing_is_clipped_in_the_first_update() -> None:
    batch = make_batch([2])
    batch = batch.with_(advantages=spread(batch, [[0.8, -1.5]])).with_columns(kl=torch.zeros(1, dtype=torch.float64))
    logprob, zero = spread(batch, [[-1.0, -0.5]]), torch.zeros_like(batch.logprobs)
    live = {"policy": {"logprob": logprob, "entropy": zero}, "old": {"logprob": logprob}}
    seen = Readings.of(**live, critic={"value": zero}, old_critic={"value": zero})
    assert (PPO().loss(batch, seen, State())["clip_fraction"][batch.mask] == 0).all()


def test_equal_policy_and_reference_cost_nothing() -> None:
    batch, seen = rollout(score=0.0)
    same = Readings.of(
        old={"logprob": seen.old.logprob},
        reference={"logprob": seen.old.logprob},
        old_critic={"value": torch.zeros_like(batch.logprobs)},
    )
    credited = PPO().credit(batch, same, State())
    assert (credited.returns == 0).all()
    assert (credited.advantages == 0).all()


@pytest.mark.parametrize(("kl", "wanted"), [(7.2, 0.201024), (30.0, 0.201024), (6.3, 0.200256), (3.0, 0.198976)])
def test_adaptive_weight(kl, wanted) -> None:
    close(adapted(0.2, kl, target=6.0, horizon=10000.0, num_samples=256), wanted)


def test_adaptive_weight_is_remembered_and_used() -> None:
    method = PPO(beta=0.2, target_kl=6.0)
    batch = make_batch([2] * 256).with_columns(kl=torch.full((256,), 6.3, dtype=torch.float64))
    memory = method.remember(State(memory=method.begin()), batch, {})
    close(memory["beta"], 0.200256)
    close(method.beta_at(State(memory=memory)), 0.200256)
    plain, seen = rollout()
    stiff = method.credit(plain, seen, State(memory={"beta": 0.1}))
    close(trained(plain, stiff.returns), [[1.000375, 1.0425, 1.05]], 1e-9)
    assert PPO().begin() == {}


@pytest.mark.parametrize(
    ("beta", "policy", "value"),
    [
        (1.0, [0.303909, 0.495666, 0.200425], 0.497879),
        (0.5, [0.153357, 0.679897, 0.166747], 0.590921),
        (0.1, [0.000075, 0.995453, 0.004472], None),
    ],
)
def test_optimum_of_a_bandit(beta, policy, value) -> None:
    # The objective that credit states, E[r - beta (log pi - log ref)], followed exactly on three one-token answers.
    r = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    batch = make_batch([1] * 3, prompt=0, rewards=r.tolist())
    logits = reference.log()
    method = PPO(beta=beta, lam=1.0)
    for _ in range(400):
        old = logits.log_softmax(-1)
        zero = torch.zeros(3, 1, dtype=torch.float64)
        seen = Readings.of(
            old={"logprob": old[:, None]}, reference={"logprob": reference.log()[:, None]}, old_critic={"value": zero}
        )
        credited = method.credit(batch, seen, State())
        now = logits.clone().requires_grad_()
        live = {"logprob": now.log_softmax(-1)[:, None], "entropy": zero}
        loss = method.loss(
            credited.with_(advantages=credited.returns),  # no whitening: exact gradients
            Readings.of(policy=live, old=seen.old.values, critic={"value": zero}, old_critic={"value": zero}),
            State(),
        )["loss"]
        (gradient,) = torch.autograd.grad((old.exp()[:, None] * loss).sum(), now)
        logits = (logits - gradient / old.exp()).detach()  # the natural gradient: the same optimum, sooner
    close(logits.softmax(-1), policy)
    if value:
        p = logits.softmax(-1)
        close((p * (r - beta * (p / reference).log())).sum(), value)


def test_pretraining_is_one_more_part() -> None:
    parts = with_pretraining(PPO()).parts()
    assert parts["ptx"].weight == 27.8
    assert parts["ptx"].data == "pretraining"
    assert with_pretraining(PPO(), weight=0).parts()["ptx"].weight_at(State()) == 0
    assert with_pretraining(PPO(target_kl=6.0, beta=0.2)).begin() == {"ppo/beta": 0.2}  # its KL weight adapts there too


@pytest.mark.parametrize("weight", [27.8, 0.0])
def test_without_signal_the_gradient_is_that_of_the_pretraining_text(weight) -> None:
    batch = make_batch([3])
    theta = spread(batch, [[-1.0, -0.4, -2.0]]).requires_grad_()
    value = spread(batch, [[0.3, 0.2, 0.1]])
    seen = Readings.of(
        policy={"logprob": theta, "entropy": torch.zeros_like(value)},
        old={"logprob": theta.detach()},
        critic={"value": value},
        old_critic={"value": value},
    )
    credited = batch.with_(returns=value).with_columns(kl=torch.zeros(1, dtype=torch.float64))  # advantages 0, V = ret
    text = Readings.of(policy={"logprob": theta})
    parts = with_pretraining(PPO(), weight=weight).parts()
    costs = {"ppo": objective(PPO(), credited, seen), "ptx": objective(SFT(), batch, text)}
    total = sum(parts[name].weight_at(State()) * cost for name, cost in costs.items())
    (gradient,) = torch.autograd.grad(total, theta)
    (language,) = torch.autograd.grad(objective(SFT(), batch, text), theta)
    close(gradient, weight * language, 1e-12)


def test_views_follow_the_settings() -> None:
    assert "reference" not in PPO(beta=0).views()
    assert not PPO(beta=0).views()["old"].credit
    assert PPO().views()["old"].credit
    assert PPO.trains == ("policy", "critic")
    with pytest.raises(ConfigError, match="target_kl"):
        PPO(beta=0, target_kl=6.0)


def test_a_shared_critic_through_the_engine(small_model: Path, tmp_path: Path) -> None:
    rig = Rig(Part(method=PPO(shared_critic=True, whiten_rewards=True, missing_end=-1.0)))
    batch = rig.batch()
    whole = rig.gradient(batch)
    assert any(float(grad.abs().max()) > 0 for name, grad in whole.items() if "value" in name)
    for budget in (1, 30):
        assert difference(whole, rig.gradient(batch, budget=budget)) <= 1e-9
    assert difference(whole, rig.gradient(batch, on_policy=True)) <= 1e-9
    train(small_run(PPO(shared_critic=True), small_model, tmp_path / "run", updates=2, samples_per_prompt=1))
    rows = lines(tmp_path / "run")
    assert len(rows) == 4
    assert all(math.isfinite(row["value_loss"]) for row in rows)
    assert rows[-1]["value"] != rows[0]["value"] == 0.0  # the head starts at zero and learns
    assert "model.safetensors" in {path.name for path in (tmp_path / "run" / "model").iterdir()}
