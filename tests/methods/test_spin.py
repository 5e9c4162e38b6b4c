"""SPIN by hand: the fixture, the exact game on two answers, and its equality with DPO."""

import itertools
import math

import pytest
import torch
from build import close, make_batch, objective, spread

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import hinge
from posttrain.methods.preference.dpo import DPO
from posttrain.methods.preference.spin import SPIN
from posttrain.types import Readings, State


def played(method, policy, opponent):
    """Loss, its gradient by the two summed log-probabilities, and all values, of one pair of (real, generated)."""
    batch = make_batch([4, 3], padding=2)
    rows = [[[total / n] * n for total, n in zip(sums, (4, 3), strict=True)] for sums in (policy, opponent)]
    now = spread(batch, rows[0], elsewhere=math.nan).requires_grad_()  # what stands in the prompt does not matter
    seen = Readings.of(policy={"logprob": now}, reference={"logprob": spread(batch, rows[1], elsewhere=math.nan)})
    loss = objective(method, batch, seen)
    (gradient,) = torch.autograd.grad(loss, now)
    assert (gradient[~batch.mask] == 0).all()
    return loss, gradient[:, 1], method.loss(batch, seen, State())


@pytest.mark.parametrize(
    ("beta", "policy", "loss", "gradient"),
    [
        (0.1, (-11.0, -13.0), 0.693147, 0.05),  # the start of a round
        (0.1, (-10.0, -14.0), 0.598139, 0.045017),
        (5.0, (-10.0, -14.0), 0.000045, 0.000227),
    ],
)
def test_fixture(beta, policy, loss, gradient) -> None:
    found, slope, values = played(SPIN(beta=beta), policy, (-11.0, -13.0))
    close(found, loss)
    close(slope, [-gradient, gradient])
    close(values["margin"], [beta * 2 if policy[0] == -10 else 0.0])
    assert values["accuracy"].tolist() == [float(policy[0] == -10)]  # strictly above


def test_the_demonstration_against_itself_teaches_nothing() -> None:
    theta = torch.tensor([-1.0, -0.3, -2.0], dtype=torch.float64, requires_grad=True)
    batch = make_batch([3, 3])
    logprob = torch.cat([torch.zeros(2, 1, dtype=torch.float64), theta.expand(2, 3)], 1)
    seen = Readings.of(policy={"logprob": logprob}, reference={"logprob": torch.zeros_like(logprob) - 0.5})
    loss = objective(SPIN(beta=0.7), batch, seen)
    close(loss, math.log(2))
    (gradient,) = torch.autograd.grad(loss, theta)
    assert (gradient == 0).all()


def best_response(data: torch.Tensor, opponent: torch.Tensor, lam: float) -> tuple[torch.Tensor, float]:
    """The policy on two answers that minimises the expected loss: real ~ data, generated ~ opponent, independently."""
    logits = opponent.log().clone().requires_grad_()
    batch = make_batch([1] * 8, prompt=0)
    real, generated = (torch.tensor(x) for x in ([0, 0, 1, 1], [0, 1, 0, 1]))
    rows = torch.stack([real, generated], 1).flatten()  # four pairs
    weight = data[real] * opponent[generated]
    solver = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def expected() -> torch.Tensor:
        solver.zero_grad()
        seen = Readings.of(
            policy={"logprob": logits.log_softmax(-1)[rows][:, None]}, reference={"logprob": opponent.log()[rows][:, None]}
        )
        loss = (weight * SPIN(beta=lam).loss(batch, seen, State())["loss"]).sum()
        loss.backward()
        return loss

    solver.step(expected)
    return logits.detach().softmax(-1), float(expected().detach())


DATA = torch.tensor([0.7, 0.3], dtype=torch.float64)
START = torch.tensor([0.4, 0.6], dtype=torch.float64)


@pytest.mark.parametrize(
    ("lam", "wanted"),
    [(1.0, [0.7, 0.3]), (2.0, [0.555006, 0.444994]), (0.5, [0.890909, 0.109091]), (10.0, [0.430407, 0.569593])],
)
def test_optimum_of_a_round(lam, wanted) -> None:
    closed = START * (DATA / START) ** (1 / lam)
    close(closed / closed.sum(), wanted)
    close(best_response(DATA, START, lam)[0], wanted)


def test_rounds_approach_the_data() -> None:
    opponent, away = START, []
    for wanted in ([0.555006, 0.444994], [0.630441, 0.369559], [0.666123, 0.333877], [0.683305, 0.316695]):
        opponent = best_response(DATA, opponent, 2.0)[0]
        close(opponent, wanted, 2e-6)
        away.append(float((opponent[0] / opponent[1] / (DATA[0] / DATA[1])).log()))
    for before, after in itertools.pairwise(away):
        close(after / before, 1 - 1 / 2, 1e-4)


def test_the_data_is_a_fixed_point() -> None:
    policy, loss = best_response(DATA, DATA, 2.0)
    close(policy, DATA)
    close(loss, math.log(2))


def test_it_is_dpo_and_constants_do_not_matter() -> None:
    wanted, slope, _ = played(DPO(beta=0.3), (-9.0, -8.0), (-10.0, -7.5))
    for policy, opponent in (((-9.0, -8.0), (-10.0, -7.5)), ((-6.0, -5.0), (-10.0, -7.5)), ((-9.0, -8.0), (-3.0, -0.5))):
        loss, gradient, _ = played(SPIN(beta=0.3), policy, opponent)
        close(loss, wanted)
        close(gradient, slope)


def test_hinge() -> None:
    close(played(SPIN(beta=0.1, cost=hinge), (-10.0, -14.0), (-11.0, -13.0))[0], 0.8)
    close(played(SPIN(beta=5.0, cost=hinge), (-10.0, -14.0), (-11.0, -13.0))[0], 0.0)


def test_the_opponent_is_read_once_and_never_trained() -> None:
    view = SPIN().views()["reference"]
    assert (view.model, view.once) == ("reference", True)
    assert SPIN.trains == ("policy",)
    with pytest.raises(ConfigError, match="beta"):
        SPIN(beta=-1)
