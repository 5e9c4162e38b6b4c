"""SuperHF and best-of-n by hand: the filter, the cost of kept answers, and the exact rounds on a binary reward."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from build import at, close, float64, make_batch, objective, spread
from small import lines, small_run

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.reductions import sequence_mean, sum_of_row_means
from posttrain.methods.policy.best_of_n import BestOfN, best_rows
from posttrain.methods.policy.superhf import SuperHF
from posttrain.run import train
from posttrain.types import Readings, State

SCORES = [0.1, 0.9, 0.4, 0.9]


def kept(scores, keep: int, *, group=None, threshold=None) -> list[int]:
    batch = make_batch([1] * len(scores), group=group or [0] * len(scores), rewards=scores)
    return best_rows(batch, keep, threshold).nonzero().flatten().tolist()


def test_filter() -> None:
    assert kept(SCORES, 1) == [1]  # the first of ties
    assert kept(SCORES, 2) == [1, 3]
    assert kept(SCORES, 9) == [0, 1, 2, 3]
    assert kept([*SCORES, 0.2, 0.1], 1, group=[0, 0, 0, 0, 1, 1]) == [1, 4]  # per prompt, never across prompts
    assert kept([0.0, 0.0], 1) == [0]
    assert kept(SCORES, 1, threshold=1.0) == []
    assert kept([1.0, 0.0, 1.0, 1.0], 0, threshold=1.0) == [0, 2, 3]  # rejection sampling
    assert kept([1.0, 0.0, 1.0, 1.0], 2, threshold=1.0) == [0, 2]


@pytest.mark.parametrize("change", [lambda r: r + 100, lambda r: 3 * r - 7, math.exp, lambda r: r**3])
def test_only_the_order_of_rewards_matters(change) -> None:
    for keep in (1, 2, 3):
        assert kept([change(score) for score in SCORES], keep) == kept(SCORES, keep)


def test_an_answer_that_was_not_scored_is_never_kept() -> None:
    batch = make_batch([1, 1], group=[0, 0], rewards=[5.0, 1.0])
    mask = batch.mask.clone()
    mask[0] = False
    assert best_rows(batch.with_(mask=mask), 1).tolist() == [False, True]


POLICY, BASE = [[2, 0.5, -1], [0.2, 1, 0.3]], [[1.0, 1, 0], [0.2, 1, 0.3]]


def two_tokens(policy, base):
    """Readings of one row with two trained tokens, from logits."""
    logits, other = float64(policy), torch.tensor(base, dtype=torch.float64)
    place = at([0, 2], beside=other)
    batch = make_batch([2], rewards=[1.0])
    zero = torch.zeros(1, dtype=torch.float64)
    values = {
        "logprob": reads.logprob.fn(logits, place),
        "forward_kl": reads.forward_kl(beside="reference").fn(logits, place),
        "entropy": torch.zeros(2, dtype=torch.float64),
    }
    return batch, Readings.of(policy={name: torch.cat([zero, value])[None] for name, value in values.items()}), logits


def test_two_tokens() -> None:
    batch, seen, logits = two_tokens(POLICY, BASE)
    values = SuperHF().loss(batch, seen, State())
    close(values["loss"][batch.mask].mean(), 0.803522)
    close(values["kl"][batch.mask].mean(), 0.161760)
    loss = objective(SuperHF(), batch, seen)
    close(loss, 0.860138)
    close(objective(SuperHF(beta=0.0), batch, seen), 0.803522)
    close(objective(BestOfN(), batch, seen), 0.803522)
    close(objective(SuperHF(kl_rows=1), batch, seen), 0.860138)
    weights, count = SuperHF(kl_rows=2).terms(State())["kl"].reduce(batch)
    close((weights * values["kl"]).sum() / count, 2 * 0.161760, 2e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    p, base = logits.detach().softmax(-1), torch.tensor(BASE, dtype=torch.float64).softmax(-1)
    target = torch.nn.functional.one_hot(torch.tensor([0, 2]), 3)
    close(gradient, ((p - target) + 0.35 * (p - base)) / 2, 1e-12)


def test_policy_at_the_base() -> None:
    _, seen, logits = two_tokens(BASE, BASE)
    close(seen.policy.forward_kl, torch.zeros(1, 3), 1e-15)
    (gradient,) = torch.autograd.grad(seen.policy.forward_kl.sum(), logits)
    close(gradient, torch.zeros(2, 3), 1e-15)


def test_sum_of_row_means() -> None:
    batch = make_batch([2, 3, 1])
    weights, count = sum_of_row_means(2)(batch)
    close(weights, sequence_mean(batch)[0])
    close(count, 3 / 2)
    values = spread(batch, [[1.0, 3.0], [1.0, 1.0, 4.0], [6.0]])
    close((weights * values).sum() / count, 2 * (2 + 2 + 6) / 3)


def test_own_samples_teach_nothing_in_expectation() -> None:
    logits = float64([0.3, -1.0, 0.7])
    logp = logits.log_softmax(-1)
    batch = make_batch([1] * 3, prompt=0)
    seen = Readings.of(policy={"logprob": logp[:, None], "entropy": torch.zeros(3, 1, dtype=torch.float64)})
    batch = SuperHF(beta=0.0).credit(batch, Readings(), State())  # one answer a prompt: all are kept
    values = SuperHF(beta=0.0).loss(batch, seen, State())["loss"]
    (gradient,) = torch.autograd.grad((logp.exp().detach()[:, None] * values).sum(), logits)
    close(gradient, [0, 0, 0], 1e-12)


def best_of(p: list[float], scores: list[float], n: int) -> torch.Tensor:
    """The exact distribution of what the filter keeps of n draws from p, by going through all of them."""
    draws = list(itertools.product(range(len(p)), repeat=n))
    group = [number for number, _ in enumerate(draws) for _ in range(n)]
    answers = [answer for draw in draws for answer in draw]
    batch = make_batch([1] * len(answers), group=group, rewards=[scores[answer] for answer in answers])
    out = torch.zeros(len(p), dtype=torch.float64)
    for row in best_rows(batch, 1).nonzero().flatten().tolist():
        out[answers[row]] += math.prod(p[answer] for answer in draws[group[row]])
    return out


def optimum(target: torch.Tensor, base: torch.Tensor, beta: float) -> torch.Tensor:
    """The policy over two answers that minimises the method's expected loss, numerically."""
    logits = base.log().clone().requires_grad_()
    solver = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def expected() -> torch.Tensor:
        solver.zero_grad()
        place = at([0, 1], beside=base.log().expand(2, 2))
        rows = logits.expand(2, 2)
        kl = reads.forward_kl(beside="reference").fn(rows, place)
        loss = (target * -reads.logprob.fn(rows, place)).sum() + beta * (target * kl).sum()
        loss.backward()
        return loss

    solver.step(expected)
    return logits.detach().softmax(-1)


def test_rounds_on_a_binary_reward() -> None:
    base = torch.tensor([0.2, 0.8], dtype=torch.float64)
    close(best_of([0.2, 0.8], [1.0, 0.0], 4)[0], 0.5904)
    policy = base
    for wanted in (0.489185, 0.742159, 0.789319, 0.791133):
        policy = optimum(best_of(policy.tolist(), [1.0, 0.0], 4), base, 0.35)
        close(policy[0], wanted)
    for _ in range(6):
        policy = optimum(best_of(policy.tolist(), [1.0, 0.0], 4), base, 0.35)
    close(policy[0], 0.791184)
    free = base
    for wanted in (0.590400, 0.971853, 0.999999):  # without the anchor it collapses
        free = best_of(free.tolist(), [1.0, 0.0], 4)
        close(free[0], wanted)


@pytest.mark.parametrize(("n", "bound"), [(2, 0.193147), (4, 0.636294), (16, 1.835089), (32, 2.496986)])
def test_how_far_best_of_n_moves(n, bound) -> None:
    close(math.log(n) - (n - 1) / n, bound)
    if n <= 4:
        p = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
        found = best_of(p.tolist(), [0.0, 1.0, 2.0, 3.0, 4.0], n)
        assert 0 < float((found * (found / p).log()).sum()) <= bound


@pytest.mark.parametrize(("n", "wanted"), [(2, 0.5642), (4, 1.0294), (16, 1.7660), (32, 2.0697)])
def test_what_the_best_of_normal_scores_is_worth(n, wanted) -> None:
    scores = torch.randn(3000 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    group = torch.arange(3000).repeat_interleave(n).tolist()
    batch = make_batch([1] * len(scores), prompt=0, group=group, rewards=scores.tolist())
    chosen = batch.rewards[best_rows(batch, 1)]
    assert len(chosen) == 3000
    close(chosen.mean(), wanted, 0.05)


@pytest.mark.parametrize("method", [SuperHF(keep=2), BestOfN(keep=2)])
def test_only_kept_rows_bring_a_gradient(method) -> None:
    batch = method.credit(make_batch([2, 1, 3, 2], group=[0] * 4, rewards=SCORES, padding=2), Readings(), State())
    assert batch.mask.any(-1).tolist() == [False, True, False, True]
    logprob = torch.full(batch.mask.shape, -1.0, dtype=torch.float64, requires_grad=True)
    kl = torch.full(batch.mask.shape, 0.5, dtype=torch.float64, requires_grad=True)
    seen = Readings.of(policy={"logprob": logprob, "forward_kl": kl, "entropy": torch.zeros_like(kl)})
    objective(method, batch, seen).backward()
    assert (logprob.grad[~batch.mask] == 0).all()
    close(logprob.grad[batch.mask], [-1 / 3] * 3)
    if isinstance(method, SuperHF):
        assert (kl.grad[~batch.mask] == 0).all()
        close(kl.grad[batch.mask], [0.35 / 3] * 3)


def test_what_is_refused() -> None:
    for wrong in ({"beta": -0.1}, {"keep": 0}, {"kl_rows": -1}):
        with pytest.raises(ConfigError, match="expected"):
            SuperHF(**wrong)
    with pytest.raises(ConfigError, match="keep"):
        BestOfN(keep=-1)
    assert "reference" not in SuperHF(beta=0).views()


@pytest.mark.parametrize("method", [SuperHF(), BestOfN(keep=0, threshold=1.0)])
def test_a_small_run(method, small_model: Path, tmp_path: Path) -> None:
    result = train(small_run(method, small_model, tmp_path / "run"))
    rows = lines(tmp_path / "run")
    assert len(rows) == 4
    stepped = [row for row in rows if "loss" in row]
    assert stepped
    assert all(row["kept_reward"] >= row["reward"] - 1e-9 for row in stepped)
    assert (result.model / "model.safetensors").is_file()
