"""Readings of a frozen reference are made in the first pass over the rows, and are the same in every later one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import lines, same, small_run, weights
from test_restart import assert_same, train_until

from posttrain import score
from posttrain.distributed.world import World
from posttrain.methods import DPO, IPO, SFT
from posttrain.models.random import random_model
from posttrain.pack import pack
from posttrain.recall import Recall, row_keys
from posttrain.run import train
from posttrain.types import Sample, State
from posttrain.wiring import recalls


def rows(count: int = 4, *, first: int = 5) -> Any:
    chance = torch.Generator().manual_seed(first)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (), generator=chance))
        tokens = torch.randint(3, 50, (length,), generator=chance).tolist()
        made.append(Sample(tokens=tokens, origin=[3] * length, trained=[False, *[True] * (length - 1)]))
    return pack(made)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The views of every reading that was made."""
    found: list[list[str]] = []
    real = score._read_once

    def watched(models: Any, batch: Any, views: Any, *rest: Any) -> Any:
        found.append(list(views))
        return real(models, batch, views, *rest)

    monkeypatch.setattr(score, "_read_once", watched)
    return found


@pytest.mark.parametrize("method", [DPO(), IPO()], ids=["dpo", "ipo"])
def test_the_reference_is_read_in_the_first_pass_alone(method: Any, small_model: Path, tmp_path: Path, counted: Any) -> None:
    run = small_run(method, small_model, tmp_path / "a/stage", steps=10)
    train(run)
    with_it = list(counted)
    counted.clear()
    passes = -(-len(run.data) // run.prompts_per_step)
    assert sum("reference" in views for views in with_it) == passes


def test_it_changes_nothing_but_the_last_digits(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small_run(DPO(), small_model, tmp_path / "a/stage", steps=10))
    monkeypatch.setattr(Recall, "covers", staticmethod(lambda *_: []))
    train(small_run(DPO(), small_model, tmp_path / "b/stage", steps=10))
    one, other = weights(tmp_path / "a/stage/model"), weights(tmp_path / "b/stage/model")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)
    for left, right in zip(lines(tmp_path / "a/stage"), lines(tmp_path / "b/stage"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resumed_run_goes_on_with_the_same_numbers(
    step: int, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {out: small_run(DPO(), small_model, tmp_path / out, steps=9) for out in ("a/stage", "b/stage")}
    train(runs["a/stage"])
    train_until(step, runs["b/stage"], monkeypatch)
    train(runs["b/stage"])
    assert_same(tmp_path / "a/stage", tmp_path / "b/stage")


def test_only_rows_that_come_again_are_remembered(small_model: Path, tmp_path: Path) -> None:
    once = small_run(DPO(), small_model, tmp_path / "a", steps=4)
    assert len(once.data) == 4 * once.prompts_per_step
    assert recalls(once, 4) == {}
    assert len(recalls(small_run(DPO(), small_model, tmp_path / "a", steps=5), 5)) == 1
    assert Recall.covers(SFT(), SFT().views()) == []


def test_rows_that_were_not_read_are_not_remembered(small_model: Path) -> None:
    """A pair with a dead half is not read; its living half must not be remembered as zeros."""
    chance = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 50, (6,), generator=chance).tolist() for _ in range(4)]
    alive, dead = [False, *[True] * 5], [False] * 6
    first = pack([Sample(tokens=t, origin=[3] * 6, trained=m) for t, m in zip(tokens, [alive, dead, alive, alive], strict=True)])
    second = pack([Sample(tokens=t, origin=[3] * 6, trained=alive) for t in (tokens[0], tokens[1])])
    models = {name: random_model(seed=seed) for seed, name in enumerate(("policy", "reference"))}
    state, recall = State(step=0, total_steps=9), Recall()
    found = []
    for memory in (recall, recall, None):
        for batch in (first, second):
            made = score.prepare(
                models, DPO(), batch, state, token_budget=999, world=World(), on_policy=True, recall=memory
            )
        found.append(made[1].reference.logprob)
    assert (found[0][second.mask] != 0).all()
    assert all(torch.allclose(one, found[2], atol=1e-5) for one in found)


def test_keys_are_of_tokens_and_mask() -> None:
    batch = rows()
    assert len(set(row_keys(batch))) == 4
    assert row_keys(batch.rows(torch.tensor([2, 0]))) == [row_keys(batch)[2], row_keys(batch)[0]]
    mask = batch.mask.clone()
    mask[1, 1] = False
    assert [a == b for a, b in zip(row_keys(batch), row_keys(batch.with_(mask=mask)), strict=True)] == [True, False, True, True]


def test_a_new_row_is_read_and_the_limit_holds() -> None:
    recall, batch = Recall(limit=200), rows()
    values = torch.where(batch.mask, torch.randn(batch.mask.shape), 0.0)
    recall.keep("reference", batch, values, range(4))
    assert 0 < recall.size <= 200
    full = Recall()
    full.keep("reference", batch, values, range(4))
    order = torch.tensor([3, 1, 0, 2])
    found = full.known(["reference"], batch.rows(order))
    assert found is not None
    assert torch.equal(found["reference"]["logprob"], values[order])
    assert full.known(["reference"], rows(first=9)) is None
    other = Recall()
    other.restore(full.tensors())
    assert other.size == full.size
    assert same(other.tensors(), full.tensors())
    assert other.known(["reference"], batch) is not None
