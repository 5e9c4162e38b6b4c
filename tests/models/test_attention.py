"""How rows are grouped, and that grouping changes nothing."""

from __future__ import annotations

import pytest
import torch

from posttrain.layout import Layout
from posttrain.models import attention
from posttrain.models.attention import PADDING, SLACK, attend, groups_of, plan, window_mask
from posttrain.pack import pack
from posttrain.prefixes import shared_layout
from posttrain.types import Sample

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as short as these would be one group."""
    monkeypatch.setattr(attention, "SLACK", 0)


def layout_of(*sizes: int) -> Layout:
    return Layout.of(torch.zeros(sum(sizes), dtype=torch.int64), sizes)


def test_groups_hold_every_row_once_with_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = tuple(torch.randint(1, 200, (17,), generator=generator).tolist())
        groups = groups_of(sizes)
        assert sorted(row for group in groups for row in group) == list(range(17))
        for group in groups:
            total = max(sizes[row] for row in group) * len(group)
            assert total - sum(sizes[row] for row in group) <= PADDING * total + 1e-9


def test_short_rows_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert groups_of((3, 16, 9)) == [[0], [1], [2]]
    monkeypatch.setattr(attention, "SLACK", SLACK)
    assert groups_of((3, 16, 9)) == [[0, 1, 2]]
    assert groups_of((3, 160, 9)) == [[0, 2], [1]]


def test_equal_lengths_are_one_group_without_gather() -> None:
    the_plan = plan(layout_of(7, 7, 7))
    assert [(group.rows, group.width, group.first) for group in the_plan.groups] == [(3, 7, 0)]
    assert the_plan.back is None


def test_the_plan_is_worked_out_once_a_layout() -> None:
    layout = layout_of(3, 9)
    assert plan(layout) is plan(layout)


def test_window_mask_by_hand() -> None:
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert window_mask(4, 2, torch.device("cpu")).int().tolist() == expected


def test_a_window_longer_than_the_rows_needs_no_mask(monkeypatch) -> None:
    monkeypatch.setattr(attention, "window_mask", lambda *_: 1 / 0)
    layout = layout_of(5, 3)
    x = torch.randn(8, 2, 4)
    torch.testing.assert_close(attend(x, x, x, layout, scale=1.0, window=5), attend(x, x, x, layout, scale=1.0))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_folded_attention_is_that_of_torch(monkeypatch, window, shared) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [[5, 6, 7, 8, 9, 3], [5, 6, 7, 8, 4, 4], [1, 2, 3, 4, 5, 5, 5], [1, 2, 3, 4, 5, 9, 9]]
    rows = [Sample(tokens=row, origin=[3] * len(row), trained=[True] * len(row), group=str(i // 2)) for i, row in enumerate(tokens)]
    here = (shared_layout(pack(rows)) if shared else None) or layout_of(3, 9, 9, 8, 1)
    assert (here.behind is not None) == shared
    found = {}
    for longest in (0, 512):
        monkeypatch.setattr(attention, "LONGEST", longest)
        generator.manual_seed(1)
        q, k, v = (torch.randn(here.num_tokens, h, 4, dtype=torch.float64, generator=generator).requires_grad_() for h in (4, 2, 2))
        out = attend(q, k, v, here, scale=0.5, window=window, precision="fast")
        (out * torch.arange(16)).sum().backward()
        found[longest] = [out.detach(), q.grad, k.grad, v.grad]
    for one, two in zip(found[0], found[512], strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


def test_narrow_products_stay_near() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for precision in ("exact", "bf16"):
        generator.manual_seed(1)
        q, k, v = (torch.randn(30, h, 4, generator=generator).requires_grad_() for h in (4, 2, 2))
        out = attend(q, k, v, layout_of(3, 9, 9, 8, 1), scale=0.5, precision=precision)
        out.sum().backward()
        found.append([out.detach(), q.grad, k.grad, v.grad])
    assert not torch.equal(found[0][0], found[1][0])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=0.03, rtol=0.03)


def test_gradients_in_float64() -> None:
    layout = layout_of(3, 9, 9, 8, 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, h, 4, dtype=torch.float64, generator=generator).requires_grad_() for h in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, layout, scale=0.5), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, layout, scale=0.5, window=3), (q, k, v))


def test_other_rows_and_later_tokens_have_no_influence() -> None:
    layout = layout_of(6, 5, 6)
    x = torch.randn(17, 2, 4, requires_grad=True)
    attend(x, x, x, layout, scale=0.5)[6 + 2].sum().backward()  # token 2 of row 1
    touched = x.grad.abs().sum((1, 2)) > 0
    assert touched.nonzero()[:, 0].tolist() == [6, 7, 8]


def test_rows_come_back_in_their_own_order() -> None:
    layout = layout_of(3, 9, 3, 9)
    assert [group.rows for group in plan(layout).groups] == [2, 2]
    x = torch.randn(24, 2, 4, generator=torch.Generator().manual_seed(0))
    together = attend(x, x, x, layout, scale=0.5).split([3, 9, 3, 9])
    for one, part in zip(x.split([3, 9, 3, 9]), together, strict=True):
        torch.testing.assert_close(part, attend(one, one, one, layout_of(len(one)), scale=0.5))
