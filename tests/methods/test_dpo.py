"""DPO by hand, on the fixture that all of its family share."""

import math

import pytest
import torch
from build import close, make_batch, objective, spread

from posttrain.errors import ConfigError
from posttrain.methods.preference.dpo import DPO
from posttrain.types import Readings


def fixture(*, padding: int = 0, prompt: int = 1, policy=(-12.0, -15.0), reference=(-13.0, -14.5)):
    """Sums of log-probabilities over 10 chosen and 20 rejected tokens."""
    batch = make_batch([10, 20], prompt=prompt, padding=padding)
    logprob = spread(batch, [[policy[0] / 10] * 10, [policy[1] / 20] * 20], elsewhere=math.nan).requires_grad_()
    fixed = spread(batch, [[reference[0] / 10] * 10, [reference[1] / 20] * 20]).requires_grad_()
    return batch, Readings.of(policy={"logprob": logprob}, reference={"logprob": fixed.detach()}), logprob


def test_value_gradient_and_metrics() -> None:
    batch, seen, logprob = fixture()  # h = (-12 + 13) - (-15 + 14.5) = 1.5
    loss = objective(DPO(beta=0.1), batch, seen)
    close(loss, 0.620957)  # log(1 + exp(-0.15))
    loss.backward()
    close(logprob.grad[0], [0.0] + [-0.046257] * 10 + [0.0] * 10)  # -0.1 sigmoid(-0.15) on each chosen token
    close(logprob.grad[1], [0.0] + [0.046257] * 20)
    values = DPO(beta=0.1).loss(batch, seen, None)
    close([values["chosen_reward"][0], values["rejected_reward"][0], values["margin"][0]], [0.1, -0.05, 0.15])
    close([values["chosen_logprob"][0], values["rejected_logprob"][0]], [-12, -15])
    assert values["accuracy"].tolist() == [1.0]


def test_policy_at_the_reference() -> None:
    batch, seen, _ = fixture(reference=(-12.0, -15.0))
    close(objective(DPO(), batch, seen), math.log(2))


@pytest.mark.parametrize(("padding", "prompt"), [(5, 1), (0, 9), (3, 4)])
def test_padding_and_prompt_length_do_not_matter(padding, prompt) -> None:
    batch, seen, _ = fixture(padding=padding, prompt=prompt)
    close(objective(DPO(), batch, seen), 0.620957)


def test_tabular_optimum_is_that_of_rewards_with_a_kl() -> None:
    # Expected Bradley-Terry preferences between three one-token answers with rewards r converge to ref exp(r / beta) / Z.
    r, beta = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64), 0.5
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    orders = [(i, j) for i in range(3) for j in range(3) if i != j]
    chosen = torch.sigmoid(torch.stack([r[i] - r[j] for i, j in orders]))
    answers = torch.tensor(orders).flatten()  # rows of pairs: chosen, rejected
    batch = make_batch([1] * len(answers), prompt=0)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        logprob = logits.log_softmax(-1)
        seen = Readings.of(policy={"logprob": logprob[answers, None]}, reference={"logprob": reference.log()[answers, None]})
        loss = (chosen * DPO(beta=beta).loss(batch, seen, None)["loss"]).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
    close(logits.softmax(-1), [0.153357, 0.679897, 0.166747])


def test_beta_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="beta"):
        DPO(beta=0)
