"""Online DPO by hand: which answers make a pair, and that what is made of them is DPO."""

import math
from pathlib import Path

import pytest
import torch
from build import close, make_batch, objective
from small import lines, small_run

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import best_and_worst
from posttrain.methods.preference.dpo import DPO
from posttrain.methods.preference.online_dpo import OnlineDPO, sides
from posttrain.pack import units
from posttrain.run import train
from posttrain.types import Readings, State


def test_pair_rule() -> None:
    scores = [0.25, 0.5, 0.5, 0.0]
    assert best_and_worst(scores) == (1, 3)  # the first of ties
    assert best_and_worst([0.5] * 4) is None
    assert best_and_worst([0.0, 1e-8]) is None
    assert best_and_worst([0.0, 1.1e-8]) == (1, 0)
    assert best_and_worst([1.0]) is None
    assert best_and_worst([]) is None
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        permuted = [scores[i] for i in order]
        best, worst = best_and_worst(permuted)  # type: ignore[misc]
        assert (permuted[best], permuted[worst]) == (0.5, 0.0)


def four_groups():
    """Two groups with a pair each, one whose answers score alike, and one of which a single answer was scored."""
    batch = make_batch(
        [2, 3, 1, 2, 2, 3, 1, 1, 2, 2],
        group=[0, 0, 0, 0, 1, 1, 2, 2, 3, 3],
        rewards=[0.25, 0.5, 0.5, 0.0, 0.0, 1.0, 1.0, 1.0, 9.0, 0.0],
        padding=2,
    )
    mask = batch.mask.clone()
    mask[8] = False  # its reward failed
    return batch.with_(mask=mask)


def readings(batch, seed: int = 0) -> Readings:
    draw = torch.Generator().manual_seed(seed)
    policy, reference = (-torch.rand(batch.mask.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    garbage = torch.full_like(policy, math.nan)
    return Readings.of(
        policy={"logprob": torch.where(batch.mask, policy, garbage).requires_grad_()},
        reference={"logprob": torch.where(batch.mask, reference, garbage)},
    )


def test_best_and_worst_stay_in_the_mask() -> None:
    batch = four_groups()
    assert sides(batch).tolist() == [0, 1, 0, -1, -1, 1, 0, 0, 0, 0]
    credited = OnlineDPO().credit(batch, readings(batch), State())
    assert credited.mask.any(-1).tolist() == [False, True, False, True, True, True, False, False, False, False]
    assert credited.advantages[1].unique().tolist() == [0, 1]
    assert [rows[0] for rows in units(credited, "group")] == [0, 4]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_it_is_dpo_on_the_pairs(beta) -> None:
    batch = four_groups()
    seen = readings(batch)
    credited = OnlineDPO(beta=beta).credit(batch, seen, State())
    loss = objective(OnlineDPO(beta=beta), credited, seen)
    (gradient,) = torch.autograd.grad(loss, seen.policy.logprob)
    rows = torch.tensor([1, 3, 5, 4])  # chosen and rejected in turn
    wanted = objective(DPO(beta=beta), batch.rows(rows), seen.rows(rows))
    close(loss, wanted, 1e-12)
    (other,) = torch.autograd.grad(wanted, seen.policy.logprob)
    close(gradient, torch.nan_to_num(other), 1e-12)
    values = OnlineDPO(beta=beta).loss(credited, seen, State())
    dpo = DPO(beta=beta).loss(batch.rows(rows), seen.rows(rows), State())
    for name in ("margin", "accuracy", "chosen_logprob", "rejected_logprob"):
        close(values[name], dpo[name], 1e-12)


def test_policy_at_the_reference() -> None:
    batch = four_groups()
    seen = readings(batch)
    same = Readings.of(policy=seen.policy.values, reference={"logprob": seen.policy.logprob.detach()})
    credited = OnlineDPO().credit(batch, same, State())
    close(objective(OnlineDPO(), credited, same), math.log(2))


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="beta"):
        OnlineDPO(beta=0)
    single = make_batch([2, 2], rewards=[1.0, 0.0])
    with pytest.raises(ConfigError, match="samples_per_prompt"):
        OnlineDPO().credit(single, Readings(), State())


def test_a_small_run(small_model: Path, tmp_path: Path) -> None:
    result = train(small_run(OnlineDPO(), small_model, tmp_path / "run", samples_per_prompt=3))
    rows = lines(tmp_path / "run")
    assert len(rows) == 4
    stepped = [row for row in rows if "loss" in row]
    assert stepped
    close(stepped[0]["loss"], math.log(2), 1e-5)  # before the first update the policy is the reference
    assert all(math.isfinite(row["margin"]) for row in stepped)
    assert (result.model / "model.safetensors").is_file()
