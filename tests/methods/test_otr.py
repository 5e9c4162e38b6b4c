"""One-token rollouts by hand: fixed samples, the exact expectation, its limits, and the sampler against both."""

import dataclasses

import pytest
import torch
from build import at, close, float64, make_batch, objective

from posttrain.methods.sft.otr import OTR, ExactOTR, exact, sampled, sampled_cost
from posttrain.types import Readings

LOGITS = [[2.0, 0.5, -1.0]]
PLACE = at([0])
DFT_GRADIENT = torch.tensor([[-0.168434, 0.137708, 0.030727]], dtype=torch.float64)


def graded(fn) -> tuple[float, torch.Tensor]:
    logits = float64(LOGITS)
    value = fn(logits)[:, 0].sum()
    value.backward()
    return float(value.detach()), logits.grad


def fixed(samples: list[int], beta: float = -0.1):
    return graded(lambda z: sampled_cost(z, PLACE, samples=torch.tensor([samples]), beta=beta))


def test_fixed_samples() -> None:
    loss, gradient = fixed([0, 1, 0, 2])
    close(loss, -0.003910)
    close(gradient, [[-0.146481, 0.103881, 0.042601]])
    close(sampled_cost(float64(LOGITS), PLACE, samples=torch.tensor([[0, 1, 0, 2]]), beta=0.0)[0, 1], 0.5)


def test_no_hit() -> None:
    close(fixed([1, 2])[1], [[-0.078560, 0.032471, 0.046089]])
    close(fixed([1, 2], beta=0.0)[1], [[0, 0, 0]])


def test_exact_at_kappa_one_is_scaled_dft() -> None:
    loss, gradient = graded(lambda z: exact(z, PLACE, kappa=1.0, beta=-0.1))
    close(loss, 0.146372)
    close(gradient, [[-0.185278, 0.151478, 0.033799]])
    close(gradient, 1.1 * DFT_GRADIENT, 2e-6)


def test_exact_at_kappa_above_one() -> None:
    close((torch.tensor(LOGITS) / 1.3).softmax(-1), [[0.706758, 0.222926, 0.070316]])
    loss, gradient = graded(lambda z: exact(z, PLACE, kappa=1.3, beta=-0.1))
    close(loss, 0.108939)
    close(gradient, [[-0.174568, 0.141040, 0.033528]])


def test_limits() -> None:
    close(graded(lambda z: exact(z, PLACE, kappa=1.0, beta=1.0))[1], [[0, 0, 0]])
    close(graded(lambda z: exact(z, PLACE, kappa=1.3, beta=1.0))[1], [[0.078839, -0.047636, -0.031203]])
    close(graded(lambda z: exact(z, PLACE, kappa=1e9, beta=0.0))[1], [[-0.071468, 0.058430, 0.013038]])  # SFT / V


@pytest.mark.parametrize(
    ("num_samples", "wanted"),
    [
        (4, [0.030921, 0.028991, 0.012346]),
        (32, [0.010932, 0.010250, 0.004365]),
        (256, [0.003865, 0.003624, 0.001543]),
    ],
)
def test_sampling_is_unbiased_and_its_noise_falls_with_the_root_of_k(num_samples, wanted) -> None:
    n = 4000
    logits = torch.tensor(LOGITS, dtype=torch.float64).expand(n, 3).clone().requires_grad_()
    sampled(logits, at([0] * n), kappa=1.3, beta=-0.1, num_samples=num_samples)[:, 0].sum().backward()
    expectation = torch.tensor([-0.174568, 0.141040, 0.033528], dtype=torch.float64)
    spread = torch.tensor(wanted, dtype=torch.float64)
    assert ((logits.grad.mean(0) - expectation).abs() < 4 * spread / n**0.5 + 1e-6).all()
    assert ((logits.grad.std(0) / spread - 1).abs() < 0.06).all()


@pytest.mark.parametrize(("beta", "wanted"), [(0.0, [0.852835, 0.147165]), (-0.1, [0.896812, 0.103188])])
def test_tabular_fixed_point(beta, wanted) -> None:
    logits = float64([0.4, 0.0])
    for _ in range(500):
        costs = [exact(logits[None], at([x]), kappa=1.3, beta=beta)[0, 0] for x in (0, 1)]
        (gradient,) = torch.autograd.grad(0.6 * costs[0] + 0.4 * costs[1], logits)
        logits = (logits - 0.5 * gradient / logits.softmax(-1)).detach().requires_grad_()  # the natural gradient
    close(logits.softmax(-1), wanted)


def test_the_same_key_draws_the_same_whatever_stands_beside_it() -> None:
    place = at([0, 1, 2, 0], step=5)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draw = OTR(num_samples=8).views()["policy"].reads[0].fn
    whole = draw(logits, place)
    keys = ("target", "temperature", "row", "position", "index")
    part = dataclasses.replace(place, **{name: getattr(place, name)[2:] for name in keys})
    close(draw(logits[2:], part), whole[2:], 1e-12)
    assert not torch.equal(draw(logits, at([0, 1, 2, 0], step=6)), whole)


@pytest.mark.parametrize("method", [OTR(), ExactOTR()])
def test_masked_positions_do_not_matter(method) -> None:
    batch = make_batch([1], padding=1)
    values = torch.tensor([[[float("nan")] * 2, [0.3, 0.5], [float("inf")] * 2]], dtype=torch.float64)
    close(objective(method, batch, Readings.of(policy={"rollout": values})), 0.3)
