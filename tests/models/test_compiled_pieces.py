"""The compiled pieces of a training step against plain formulas in float64, and against torch where they do not apply."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from small import small_run
from torch import Tensor

from posttrain.compiled import kernels
from posttrain.layout import Behind, Layout
from posttrain.methods import SFT
from posttrain.models import compiled, fused
from posttrain.models.attention import attend, segments_of
from posttrain.models.gemm import Precision
from posttrain.models.random import random_model
from posttrain.wiring import build_models

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler, or POSTTRAIN_COMPILE=0")
ROWS = (5, 1, 40, 33, 8, 64, 130)
FLOAT, BFLOAT = 4e-6, 3e-2
"""Largest differences from float64 of numbers of size 1: of float32, and where results are rounded to bfloat16."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def packed(sizes: tuple[int, ...]) -> Layout:
    return Layout.of(torch.arange(sum(sizes)), sizes)


def plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout, fronts: list[int], window: int | None) -> Tensor:
    """Attention row by row with a mask that is written out."""
    starts, found = [0, *accumulate(layout.sizes)], []
    repeats = q.shape[1] // k.shape[1]
    for row, size in enumerate(layout.sizes):
        own = list(range(starts[row], starts[row] + size))
        front = fronts[row]
        keys = (list(range(starts[front], starts[front] + layout.sizes[front])) if front >= 0 else []) + own
        here, seen = q[own].transpose(0, 1), k[keys].transpose(0, 1).repeat_interleave(repeats, 0)
        scores = here @ seen.transpose(1, 2) * q.shape[-1] ** -0.5
        place, column = torch.arange(size)[:, None] + len(keys) - size, torch.arange(len(keys))[None]
        hidden = (column > place) | (column <= place - (window or len(keys)))
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        found.append((p @ v[keys].transpose(0, 1).repeat_interleave(repeats, 0)).transpose(0, 1).flatten(1))
    return torch.cat(found)


def both_ways(
    layout: Layout, fronts: list[int], heads: tuple[int, int, int], window: int | None, precision: Precision
) -> list[tuple[Tensor, Tensor]]:
    """(result, gradient of everything that goes in) of the formula in float64 and of `attend`."""
    queries, kv, width = heads
    tokens = layout.num_tokens
    upstream, given = drawn(tokens, queries * width, seed=1), drawn(tokens, queries + 2 * kv, width)
    found = []
    for kind in (torch.float64, torch.float32):
        mixed = given.clone().to(kind).requires_grad_()
        parts = mixed.split([queries, kv, kv], 1)  # views with a stride between tokens, as the trunk has them
        if kind == torch.float64:
            out = plain(*parts, layout, fronts, window)
        else:
            assert compiled.attends(*parts)
            out = attend(*parts, layout, scale=width**-0.5, window=window, precision=precision)
        (out.to(kind) * upstream.to(kind)).sum().backward()
        assert mixed.grad is not None
        found.append((out.detach().double(), mixed.grad.double()))
    return found


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 48), (3, 1, 64), (2, 1, 256)], ids=str)
@pytest.mark.parametrize(("precision", "tolerance"), [("fast", FLOAT), ("bf16", BFLOAT)])
def test_attention_of_packed_rows(heads: tuple[int, int, int], window: int | None, precision: Precision, tolerance: float) -> None:
    layout = packed(ROWS)
    (out, grad), (our_out, our_grad) = both_ways(layout, [-1] * len(ROWS), heads, window, precision)
    torch.testing.assert_close(our_out, out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(our_grad, grad, atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("window", [None, 30])
def test_rows_behind_others_share_their_keys_and_add_to_their_gradients(window: int | None) -> None:
    fronts = [-1, -1, 0, 0, 1, -1, 0]  # segments 0 and 1 are common beginnings
    layout = packed((21, 50, 7, 40, 33, 12, 1))
    behind = Behind(torch.tensor(fronts[2:]), torch.tensor([21, 21, 50, 0, 21]), first=2)
    layout = Layout(**{**vars(layout), "behind": behind, "plans": {}})
    assert segments_of(layout)[0].tolist()[3] == [78, 40, 0, 21]
    (out, grad), (our_out, our_grad) = both_ways(layout, fronts, (4, 2, 32), window, "fast")
    torch.testing.assert_close(our_out, out, atol=FLOAT, rtol=FLOAT)
    torch.testing.assert_close(our_grad, grad, atol=4 * FLOAT, rtol=4 * FLOAT)


def test_a_row_is_attended_alike_whatever_stands_beside_it() -> None:
    heads = [drawn(sum(ROWS), count, 32).float() for count in (4, 2, 2)]
    whole = attend(*heads, packed(ROWS), scale=0.2, precision="fast")
    for row, start in enumerate([0, *accumulate(ROWS)][:-1]):
        part = [x[start : start + ROWS[row]] for x in heads]
        alone = attend(*part, packed((ROWS[row],)), scale=0.2, precision="fast")
        assert torch.equal(alone, whole[start : start + ROWS[row]])


def test_large_scores_do_not_overflow_and_nothing_hides_what_is_no_number() -> None:
    q, k, v = (drawn(40, 2, 16, seed=seed).float() for seed in range(3))
    layout = packed((40,))
    big = attend(q * 1e4, k, v, layout, scale=1.0, precision="fast")
    torch.testing.assert_close(big, attend(q * 1e4, k, v, layout, scale=1.0), atol=1e-4, rtol=1e-4)
    k[17, 0, 3] = float("nan")
    bad = attend(q, k, v, layout, scale=1.0, precision="fast").view(40, 2, 16)
    assert bad[17:, 0].isnan().all()
    assert not bad[:17].isnan().any()
    assert not bad[:, 1].isnan().any()


@pytest.mark.parametrize("narrow", [False, True])
def test_norms_alone_and_of_a_sum(narrow: bool) -> None:
    kind = torch.bfloat16 if narrow else torch.float32
    rows, width, tolerance = 23, 50, 2e-2 if narrow else FLOAT
    x, y, weight = drawn(rows, width), drawn(rows, width, seed=1).to(kind).double(), drawn(width, seed=2)
    to_normed, to_sum = drawn(rows, width, seed=3).to(kind).double(), drawn(rows, width, seed=4)
    for summed in (False, True):
        exact = [one.clone().requires_grad_() for one in (x, y, weight)]
        total = exact[0] + exact[1] if summed else exact[0]
        normed = fused.rms_norm(total, exact[2], 1e-5)
        (normed * to_normed + (total * to_sum if summed else 0.0)).sum().backward()
        kinds = (torch.float32, kind, torch.float32)
        ours = [one.to(each).requires_grad_() for one, each in zip((x, y, weight), kinds, strict=True)]
        if summed:
            found, found_total = compiled.add_norm(ours[0], ours[1], ours[2], 1e-5, kind=kind)
            torch.testing.assert_close(found_total.double(), total, atol=FLOAT, rtol=FLOAT)
            ((found.double() * to_normed).sum() + (found_total.double() * to_sum).sum()).backward()
        else:
            found = compiled.rms_norm(ours[0], ours[2], 1e-5, kind=kind)
            (found.double() * to_normed).sum().backward()
        assert found.dtype == kind
        torch.testing.assert_close(found.double(), normed, atol=tolerance, rtol=tolerance)
        for one, other in zip(ours, exact, strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None and other.grad is not None:
                torch.testing.assert_close(one.grad.double(), other.grad, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("narrow", [False, True])
def test_gates(narrow: bool) -> None:
    kind, tolerance = (torch.bfloat16, 2e-2) if narrow else (torch.float32, FLOAT)
    wide, upstream = (3 * drawn(19, 74)).to(kind), drawn(19, 37, seed=1).to(kind)
    exact, ours = wide.double().requires_grad_(), wide.clone().requires_grad_()
    gate, up = exact.chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    (want * upstream.double()).sum().backward()
    got = compiled.swiglu(ours)
    (got * upstream).sum().backward()
    assert exact.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(got.double(), want.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("narrow", [False, True])
def test_heads(narrow: bool) -> None:
    kind, tolerance = (torch.bfloat16, 2e-2) if narrow else (torch.float32, FLOAT)
    queries, kv, width, rows = 3, 2, 10, 7
    mixed, (cos, sin) = drawn(rows, queries + 2 * kv, width).to(kind), drawn(2, rows, width, seed=1)
    exact, ours = mixed.double().requires_grad_(), mixed.clone().requires_grad_()
    want = fused.heads(exact, cos, sin, queries=queries, kv=kv)
    got = compiled.heads(ours, cos.float(), sin.float(), queries=queries, kv=kv)
    for seed, (one, other) in enumerate(zip(want, got, strict=True), start=2):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other.double(), one, atol=FLOAT, rtol=FLOAT)
        upstream = drawn(*one.shape, seed=seed)
        (one * upstream).sum().backward(retain_graph=True)
        (other * upstream.float()).sum().backward(retain_graph=True)
    assert exact.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=3 * tolerance, rtol=tolerance)


def test_what_they_leave_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3, 2, 16)
    assert compiled.attends(x, x, x)
    assert not compiled.attends(x.double(), x.double(), x.double())
    assert not compiled.attends(x[..., :8], x[..., :8], x[..., :8])
    assert not compiled.suits(torch.zeros(3, device="meta"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert not compiled.attends(x, x, x)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_models_compute_the_same_with_and_without_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All families, forward and backward; in float32, where what differs is rounding."""
    layout = Layout.of(torch.arange(3, 60), (20, 30, 7))
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(compiled, "kernels", lambda: None)
        model = random_model(family, head_dim=16)
        model.use_precision("fast")
        hidden = model.trunk(layout).hidden
        (hidden * drawn(*hidden.shape, seed=5).float()).sum().backward()
        grads = {name: weight.grad for name, weight in model.parameters().items() if weight.grad is not None}
        found.append((hidden.detach(), grads))
    (one, own), (other, others) = found
    torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    assert own.keys() == others.keys()
    for name, grad in own.items():
        scale = float(others[name].abs().max()) or 1.0
        torch.testing.assert_close(grad / scale, others[name] / scale, atol=5e-5, rtol=5e-5)


def test_a_run_says_whether_it_has_them_and_warns_where_that_changed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(SFT(), small_model, tmp_path / "run", precision="bf16")
    models, _, record = build_models(run)
    assert record == {"choice": "bf16", "compiled": True}
    assert models["policy"].compiled
    assert not build_models(replace(run, precision="exact"))[2]["compiled"]
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    with pytest.warns(UserWarning, match="compiled kernels are missing, unlike in the part of the run before"):
        assert not build_models(run, recorded=record)[2]["compiled"]
