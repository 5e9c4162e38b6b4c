"""A prompt that several rows begin with is read once: fewer tokens, the same readings and gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain import forward
from posttrain.layout import layout
from posttrain.models import attention
from posttrain.models.attention import SLACK
from posttrain.models.random import random_model
from posttrain.pack import micro_batches, pack, units
from posttrain.prefixes import common_lengths, shared_layout
from posttrain.reads import attention_to_prompt, entropy, logprob, reward, value
from posttrain.types import Batch, Origin, Sample, View


def row(prompt: list[int], answer: list[int], group: str) -> Sample:
    origin = [int(Origin.USER)] * len(prompt) + [int(Origin.POLICY)] * len(answer)
    return Sample(tokens=prompt + answer, origin=origin, trained=[False] * len(prompt) + [True] * len(answer), group=group)


def groups(seed: int = 0, *, longest: int = 30) -> Batch:
    """Groups of one to five rows, prompts and answers of all lengths, in no order."""
    chance = random.Random(seed)
    rows = []
    for group in range(6):
        prompt = [chance.randrange(5, 50) for _ in range(chance.randrange(2, longest))]
        for _ in range(chance.choice([1, 2, 5])):
            answer = [chance.randrange(5, 50) for _ in range(chance.randrange(1, 20))]
            rows.append(row(prompt, answer, str(group)))
    chance.shuffle(rows)
    return pack(rows, dtype=torch.float64)


def gradients(model: Any, batch: Batch, view: View) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for parameter in model.parameters().values():
        parameter.grad = None
    values = forward.read({"policy": model}, batch, {"policy": view}).policy.values
    total = torch.stack([(v * torch.arange(v.numel()).view_as(v).cos()).sum() for v in values.values()]).sum()
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.parameters().items() if p.grad is not None}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns sharing off."""
    return lambda: monkeypatch.setattr(forward, "_shares", lambda model, view: False)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("mistral", {"sliding_window": 7}), ("qwen2", {}), ("qwen3", {}), ("gemma", {})],
)
@pytest.mark.parametrize(("seed", "slack"), [(0, 0), (1, 0), (1, SLACK)])
def test_readings_and_gradients_are_the_same(
    family: str, options: dict[str, Any], seed: int, slack: int, whole: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SLACK", slack)  # at 0 these short rows are many groups
    model = random_model(family, seed=seed, **options)
    model.module.double()
    model.add_value_head()
    model.add_reward_head()
    batch = groups(seed)
    found = shared_layout(batch)
    assert found is not None
    assert found.num_tokens < 0.75 * int(batch.lengths.sum())
    view = View(reads=(logprob, entropy, value, reward))
    total, grads = gradients(model, batch, view)
    whole()
    expected, every = gradients(model, batch, view)
    torch.testing.assert_close(total, expected, atol=1e-9, rtol=1e-9)
    assert grads.keys() == every.keys()
    for name, grad in every.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-9 * float(grad.abs().max()) + 1e-14, rtol=0)


def test_in_float32_the_gradient_is_the_same_to_2e_6(whole: Callable[[], None]) -> None:
    model, batch = random_model("llama", seed=3), groups(3)
    _, grads = gradients(model, batch, View(reads=(logprob,)))
    whole()
    _, every = gradients(model, batch, View(reads=(logprob,)))
    shared, plain = (torch.cat([grad.flatten() for grad in found.values()]) for found in (grads, every))
    assert float((shared - plain).norm() / plain.norm()) < 2e-6


def test_what_rows_have_in_common() -> None:
    rows = [
        row([5, 6, 7, 8], [9, 9], "a"), row([5, 6, 7, 8], [9, 1], "a"),  # the answers' first token is common too
        row([5, 6, 7, 8], [9, 9], "b"),  # alone in its group
        row([5, 6], [7], "c"), row([5, 6], [8], "c"),  # too short to pay
        row([1, 2, 3, 4, 5], [6], "d"), row([1, 2, 3, 4, 5, 6], [6], "d"),  # one row ends where the other goes on
    ]  # fmt: skip
    batch = pack(rows)
    common, first = common_lengths(batch.tokens.numpy(), batch.lengths.numpy(), batch.group.numpy())
    assert common.tolist() == [5, 5, 0, 0, 0, 5, 5]
    assert first.tolist() == [0, 0, 2, 3, 3, 5, 5]


def test_no_sharing_where_it_saves_little_or_rows_are_looked_at() -> None:
    assert shared_layout(pack([row([5, 6, 7, 8], [9] * 60, "a"), row([5, 6, 7, 8], [8] * 60, "a")])) is None
    assert shared_layout(pack([row([5, 6, 7, 8], [9], str(i)) for i in range(3)])) is None
    model, batch = random_model(), groups()
    view = View(reads=(logprob, attention_to_prompt(0)), once=True)
    seen = forward.read({"policy": model}, batch, {"policy": view})  # needs whole rows
    plain = forward.read({"policy": model}, batch, {"policy": View(reads=(logprob,), once=True)})
    torch.testing.assert_close(seen.policy.logprob, plain.policy.logprob, atol=1e-5, rtol=0)


def test_places_point_at_the_same_tokens() -> None:
    batch = groups(4)
    shared, plain = shared_layout(batch), layout(batch)
    assert shared is not None
    every, position = (torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]).nonzero(as_tuple=True)
    for found in (shared, plain):
        at = found.at(every, position)
        assert torch.equal(found.tokens[at], batch.tokens[every, position])
        assert torch.equal(found.positions[at], position)
        assert torch.equal(found.ends, found.at(torch.arange(batch.num_rows), batch.lengths - 1))


def test_micro_batches_keep_groups_side_by_side() -> None:
    batch = groups(5)
    rows = torch.cat(micro_batches(batch, units(batch, "row"), 1 << 20))
    changes = int((batch.group[rows][1:] != batch.group[rows][:-1]).sum())
    assert changes == int(batch.group.max())
