"""Intuitive fine-tuning by hand: propagated weights, mixed embeddings."""

import pytest
import torch
from build import close, float64, make_batch, objective, spread, trained

from posttrain.formulas.reductions import sequence_mean
from posttrain.methods.sft import ift
from posttrain.methods.sft.ift import IFT, mixed_embeddings
from posttrain.methods.sft.sft import SFT
from posttrain.types import Readings

NLL = [1.0, 0.5, 0.25]
MASK = torch.ones(1, 3, dtype=torch.bool)


def seen(batch, nll) -> Readings:
    guess = torch.zeros_like(batch.tokens)
    return Readings.of(guess={"argmax": guess}, policy={"logprob": -spread(batch, nll, elsewhere=float("nan"))})


def test_weights_and_loss() -> None:
    close(ift.propagated(float64([NLL]), MASK, 0.95), [[1.897931, 0.823064, 0.279005]])
    for padding in (0, 2):
        batch = make_batch([3], padding=padding)
        close(objective(IFT(), batch, seen(batch, [NLL])), 0.793071)
    close(float64([NLL]).mean(), 0.583333)


@pytest.mark.parametrize(
    ("relation", "wanted"),
    [
        (ift.propagated, [0.709622, 0.238460, -0.143124]),
        (ift.propagated_detached, [0.632644, 0.274355, 0.093002]),
    ],
)
def test_gradient_through_the_weights_and_without(relation, wanted) -> None:
    nll = float64([NLL])
    (relation(nll, MASK, 0.95) * nll).mean().backward()
    close(nll.grad, [wanted])


@pytest.mark.parametrize(
    ("relation", "wanted"),
    [
        (ift.propagated_squared, [2.480005, 0.466401, 0.053594]),
        (ift.propagated_softmax, [1.280963, 0.929201, 0.789836]),
        (ift.propagated_log, [1.798898, 0.880474, 0.320628]),
    ],
)
def test_other_norms(relation, wanted) -> None:
    weights = relation(float64([NLL]), MASK, 0.95)
    close(weights, [wanted])
    close(weights.mean(), 1.0, 1e-12)


def test_equal_costs() -> None:
    batch = make_batch([3])
    close(ift.propagated(float64([[0.5] * 3]), MASK, 0.95), [[1.474795, 1.008186, 0.517019]])
    close(objective(IFT(), batch, seen(batch, [[0.5] * 3])), 0.5, 1e-12)


@pytest.mark.parametrize(("decay", "wanted"), [(1.0, 2.75), (0.95, 2.688125)])
def test_the_formula_as_printed(decay, wanted) -> None:
    batch = make_batch([3])  # 1 * 1 + 0.5 * (1 + d) + 0.25 * (1 + d + d^2)
    close(objective(IFT(relation=ift.literal, decay=decay), batch, seen(batch, [NLL])), wanted)


def test_without_mixing_and_decay_it_is_sft() -> None:
    batch = make_batch([1, 3], padding=1)
    readings = seen(batch, [[1.0], [0.5, 0.7, 0.9]])
    close(objective(IFT(lam=0, decay=0), batch, readings), 0.85)
    close(objective(SFT(reduce=sequence_mean), batch, readings), 0.85)


def test_rows_do_not_see_each_other_or_untrained_gaps() -> None:
    batch = make_batch([3, 5])
    costs = spread(batch, [NLL, [0.1, 0.2, 0.3, 0.4, 0.5]])
    both = ift.propagated(costs, batch.mask, 0.95)
    close(trained(batch, both)[0], [1.897931, 0.823064, 0.279005])
    gap = torch.tensor([[False, True, False, False, True, True]])
    wide = torch.full(gap.shape, 9.0, dtype=torch.float64)
    wide[gap] = torch.tensor(NLL, dtype=torch.float64)
    close(ift.propagated(wide, gap, 0.95)[gap], [1.897931, 0.823064, 0.279005])


def test_a_row_without_cost_or_without_tokens_is_finite() -> None:
    assert torch.isfinite(ift.propagated(torch.zeros(1, 3, dtype=torch.float64), MASK, 0.95)).all()
    for relation in (ift.propagated, ift.propagated_softmax, ift.propagated_log, ift.literal):
        assert (relation(torch.zeros(1, 3, dtype=torch.float64), MASK & False, 0.95) == 0).all()


def test_mixed_embeddings() -> None:
    table = float64([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    batch = make_batch([1], padding=1, tokens=[[2, 0]])
    guess = Readings.of(guess={"argmax": torch.tensor([[1, 1, 1]])})
    mixed = mixed_embeddings(lambda tokens: table[tokens], batch, guess, lam=0.2)
    close(mixed, [[[2, 2], [0.8, 0.2], [1, 0]]])  # prompt, 0.8 E[0] + 0.2 E[1], padding
    assert not mixed.requires_grad
    right = Readings.of(guess={"argmax": batch.tokens})
    close(mixed_embeddings(lambda t: table[t], batch, right, lam=0.7), table[batch.tokens], 1e-12)
    calm = mixed_embeddings(lambda t: table[t], batch.with_(training=False), guess, lam=0.2)
    close(calm, table[batch.tokens], 0.0)
