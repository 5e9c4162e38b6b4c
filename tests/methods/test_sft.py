"""SFT by hand: three normalisations, label smoothing, NEFTune."""

import math

import pytest
import torch
from build import at, close, float64, make_batch, objective, spread

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.reductions import sequence_mean, sequence_sum_mean, token_mean
from posttrain.methods.sft.sft import SFT, noisy_embeddings
from posttrain.types import Readings

NLL = [[1.0], [0.5, 0.7, 0.9]]


def seen(batch, **more) -> Readings:
    return Readings.of(policy={"logprob": -spread(batch, NLL), **more})


@pytest.mark.parametrize(("reduce", "wanted"), [(token_mean, 0.775), (sequence_mean, 0.85), (sequence_sum_mean, 1.55)])
def test_normalisations(reduce, wanted) -> None:
    for padding in (0, 3):  # (1 + 2.1) / 4, (1 + 0.7) / 2, (1 + 2.1) / 2
        batch = make_batch([1, 3], padding=padding)
        close(objective(SFT(reduce=reduce), batch, seen(batch)), wanted)


def test_two_micro_batches_share_one_denominator() -> None:
    batch = make_batch([1, 3])
    whole, parts, count = seen(batch), 0.0, 0.0
    for row in (torch.tensor([0]), torch.tensor([1])):
        weights, n = token_mean(batch.rows(row))
        parts += float((SFT().loss(batch.rows(row), whole.rows(row), None)["loss"] * weights).sum())
        count += float(n)
    close(parts / count, 0.775)


def test_masked_positions_do_not_matter() -> None:
    batch = make_batch([1, 3], padding=2)
    wild = Readings.of(policy={"logprob": -spread(batch, NLL, elsewhere=math.nan)})
    close(objective(SFT(), batch, wild), 0.775)


def test_one_token_and_its_gradient() -> None:
    logits = float64([[2.0, 0.5, -1.0]])
    nll = -reads.logprob.fn(logits, at([0]))
    close(nll, [0.241311])
    nll.sum().backward()
    close(logits.grad, [[-0.214403, 0.175290, 0.039113]])


def smoothed(logits: torch.Tensor, eps: float) -> torch.Tensor:
    batch = make_batch([1])
    place = at([0])
    values = {"logprob": reads.logprob.fn(logits, place), "mean_logprob": reads.mean_logprob.fn(logits, place)}
    read = Readings.of(policy={k: torch.cat([torch.zeros(1, dtype=torch.float64), v])[None] for k, v in values.items()})
    return objective(SFT(label_smoothing=eps), batch, read)


def test_label_smoothing() -> None:
    logits = float64([[2.0, 0.5, -1.0]])
    loss = smoothed(logits, 0.1)  # 0.9 * 0.241311 + 0.1 * 1.741311
    close(loss, 0.391311)
    loss.backward()
    close(logits.grad, [[-0.147736, 0.141957, 0.005779]])
    close(smoothed(logits, 0.0), 0.241311)
    assert "mean_logprob" not in [read.name for read in SFT().views()["policy"].reads]


def test_smoothing_is_off_in_evaluation() -> None:
    batch = make_batch([1, 3], training=False)
    close(objective(SFT(label_smoothing=0.1), batch, seen(batch)), 0.775)


@pytest.mark.parametrize(("eps", "wanted"), [(0.0, [0.6, 0.4]), (0.1, [0.59, 0.41])])
def test_tabular_optimum_is_the_distribution_of_the_data(eps, wanted) -> None:
    logits = float64([0.0, 0.0])
    for _ in range(300):
        loss = 0.6 * cost(logits, 0, eps) + 0.4 * cost(logits, 1, eps)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
    close(logits.softmax(-1), wanted)


def cost(logits: torch.Tensor, target: int, eps: float) -> torch.Tensor:
    place = at([target])
    read = Readings.of(
        policy={r.name: r.fn(logits[None], place)[None] for r in (reads.logprob, reads.mean_logprob)}
    )
    return SFT(label_smoothing=eps).loss(make_batch([1], prompt=0), read, None)["loss"].sum()


def embed(tokens: torch.Tensor, depth: int = 16) -> torch.Tensor:
    return torch.ones(*tokens.shape, depth, dtype=torch.float64)


def noise(batch, alpha: float = 5.0) -> torch.Tensor:
    return noisy_embeddings(embed, batch, Readings(), alpha=alpha) - 1


def test_neftune_noise_has_the_stated_width() -> None:
    for answers, depth, wanted in ((3, 16, 0.625), (127, 64, 0.055243)):  # 5 / sqrt(4 * 16), 5 / sqrt(128 * 64)
        assert 5 / math.sqrt((answers + 1) * depth) == pytest.approx(wanted, abs=1e-6)
        rows = make_batch([answers] * 200, padding=2)
        drawn = noisy_embeddings(lambda t, d=depth: embed(t, d), rows, Readings(), alpha=5.0) - 1
        assert wanted * 0.99 < float(drawn.abs().max()) <= wanted + 1e-6
        norms = drawn.flatten(1).norm(dim=1)
        assert float(norms.square().mean().sqrt()) == pytest.approx(5 / math.sqrt(3), rel=0.01)  # 2.886751


def test_neftune_depends_on_the_row_alone() -> None:
    batch = make_batch([3, 5], padding=4, seed=1, step=2)
    whole = noise(batch)
    close(noise(batch.rows(torch.tensor([1]))), whole[1:], 0.0)
    assert (whole[0, 4:] == 0).all()
    close(noise(make_batch([3, 5], seed=1, step=2)), whole[:, :6], 0.0)
    assert not torch.equal(noise(batch.with_(step=3)), whole)


def test_neftune_is_off_at_zero_and_in_evaluation() -> None:
    assert SFT().views()["policy"].embeddings is None
    assert (noise(make_batch([3], training=False)) == 0).all()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        SFT(label_smoothing=1.0)
    with pytest.raises(ConfigError, match="neftune_alpha"):
        SFT(neftune_alpha=-1)
