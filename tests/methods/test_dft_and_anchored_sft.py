"""DFT and anchored SFT by hand: values, gradients, and where they converge."""

import pytest
import torch
from build import at, close, float64, make_batch, objective

from posttrain import reads
from posttrain.method import Method
from posttrain.methods.sft.asft_anchored import AnchoredSFT
from posttrain.methods.sft.dft import DFT
from posttrain.methods.sft.sft import SFT
from posttrain.types import Readings

LOGITS = [[2.0, 0.5, -1.0], [0.2, 1.0, 0.3]]
REFERENCE = torch.tensor([[1.0, 1.0, 0.0], [0.2, 1.0, 0.3]], dtype=torch.float64)
GOLD = [0, 2]


def scalar(method: Method, logits: torch.Tensor, reference: torch.Tensor = REFERENCE) -> torch.Tensor:
    place = at(GOLD, beside=reference)
    wanted = (reads.logprob, reads.forward_kl(beside="reference"))
    values = {r.name: torch.nn.functional.pad(r.fn(logits, place), (1, 0))[None] for r in wanted}
    return objective(method, make_batch([2]), Readings.of(policy=values))


def test_dft_value_and_gradient() -> None:
    logits = float64(LOGITS)
    close(logits.softmax(-1)[[0, 1], GOLD], [0.785597, 0.255194])
    loss = scalar(DFT(), logits)
    close(loss, 0.269050)
    loss.backward()
    # p (p - e) / 2; without the stop-gradient the second row would push its gold token down.
    close(logits.grad, [[-0.084217, 0.068854, 0.015363], [0.029463, 0.065572, -0.095035]])
    logits = float64(LOGITS)
    (-logits.softmax(-1)[[0, 1], GOLD].mean()).backward()
    close(scalar_gradient(DFT()), logits.grad, 1e-12)


def scalar_gradient(method: Method, reference: torch.Tensor = REFERENCE) -> torch.Tensor:
    logits = float64(LOGITS)
    scalar(method, logits, reference).backward()
    return logits.grad


def test_sft_on_the_same_tokens() -> None:
    close(scalar(SFT(), float64(LOGITS)), 0.803522)
    close(scalar_gradient(SFT()), [[-0.107201, 0.087645, 0.019556], [0.115454, 0.256949, -0.372403]])


def test_anchor() -> None:
    kl = reads.forward_kl(beside="reference").fn(float64(LOGITS), at(GOLD, beside=REFERENCE))
    close(kl, [0.323519, 0.0])
    close(reads.reverse_kl(beside="reference").fn(float64(LOGITS), at(GOLD, beside=REFERENCE)), [0.279523, 0.0])
    close(scalar(AnchoredSFT(lam=0.05), float64(LOGITS)), 0.277138)
    close(
        scalar_gradient(AnchoredSFT(lam=0.05)),
        [[-0.075135, 0.062678, 0.012457], [0.029463, 0.065572, -0.095035]],
    )


def test_anchor_at_zero_or_at_home_is_dft() -> None:
    close(scalar(AnchoredSFT(lam=0.0), float64(LOGITS)), scalar(DFT(), float64(LOGITS)), 1e-12)
    assert "reference" not in AnchoredSFT(lam=0.0).views()
    home = torch.tensor(LOGITS, dtype=torch.float64)
    close(scalar(AnchoredSFT(), float64(LOGITS), home), scalar(DFT(), float64(LOGITS)), 1e-12)
    close(scalar_gradient(AnchoredSFT(), home), scalar_gradient(DFT()), 1e-12)


def converged(loss, steps: int = 400) -> torch.Tensor:
    logits = float64([0.1, 0.0])
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(logits), logits)
        logits = (logits - 0.5 * gradient / logits.softmax(-1)).detach().requires_grad_()  # the natural gradient
    return logits.softmax(-1)


def expected(method: Method, logits: torch.Tensor) -> torch.Tensor:
    """Targets 0 and 1 with probabilities 0.6 and 0.4, a uniform reference."""
    total = torch.zeros((), dtype=torch.float64)
    for target, share in ((0, 0.6), (1, 0.4)):
        place = at([target], beside=torch.zeros(1, 2, dtype=torch.float64))
        wanted = (reads.logprob, reads.forward_kl(beside="reference"))
        read = Readings.of(policy={r.name: r.fn(logits[None], place)[None] for r in wanted})
        total = total + share * objective(method, make_batch([1], prompt=0), read)
    return total


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (AnchoredSFT(lam=0.05), [0.890388, 0.109612]),
        (AnchoredSFT(lam=0.1), [0.809017, 0.190983]),
        (AnchoredSFT(lam=0.5), [0.596291, 0.403709]),
    ],
)
def test_tabular_optimum(method, wanted) -> None:
    close(converged(lambda logits: expected(method, logits)), wanted)


def test_dft_converges_to_the_mode_and_sft_with_an_anchor_to_a_mixture() -> None:
    close(converged(lambda logits: expected(DFT(), logits)), [1.0, 0.0], 1e-2)
    kl = reads.forward_kl(beside="reference")
    flat = torch.zeros(1, 2, dtype=torch.float64)
    mixed = converged(
        lambda logits: expected(SFT(), logits) + 0.05 * kl.fn(logits[None], at([0], beside=flat)).sum()
    )
    close(mixed, [0.595238, 0.404762])  # (0.6 + 0.05 / 2) / 1.05


def test_masked_positions_do_not_matter() -> None:
    batch = make_batch([2], padding=1)
    logprob = torch.tensor([[float("nan"), -0.5, -1.0, float("inf")]], dtype=torch.float64, requires_grad=True)
    objective(DFT(), batch, Readings.of(policy={"logprob": logprob})).backward()
    assert torch.isfinite(logprob.grad).all()
    assert logprob.grad[0, [0, 3]].tolist() == [0.0, 0.0]
