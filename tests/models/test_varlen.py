"""Packed rows by the kernel that torch has for GPUs, here with a stand-in of the same signature in plain torch."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain import forward
from posttrain.layout import Behind, Layout
from posttrain.models import torch_compile, varlen
from posttrain.models.attention import attend
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.pack import pack
from posttrain.prefixes import shared_layout
from posttrain.reads import logprob
from posttrain.types import Batch, Origin, Sample, View

torch.set_num_threads(1)


def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`varlen_attn` as flash attention computes it: causal masks and windows are aligned to the bottom right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (query.shape[1] == key.shape[1]) or enable_gqa
    (left, right), repeats, found = window_size, query.shape[1] // key.shape[1], []
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(x.tolist()) for x in (cu_seq_q, cu_seq_k)), strict=True):
        q = query[q0:q1].transpose(0, 1)
        k, v = (x[k0:k1].transpose(0, 1).repeat_interleave(repeats, 0) for x in (key, value))
        place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        column = torch.arange(k1 - k0)[None]
        hidden = torch.zeros(q1 - q0, k1 - k0, dtype=torch.bool)
        if right >= 0:
            hidden |= column > place + right
        if left >= 0:
            hidden |= column < place - left
        scores = (q @ k.transpose(1, 2)) * (scale or q.shape[-1] ** -0.5)
        found.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


def without_groups(query: Tensor, key: Tensor, value: Tensor, *starts: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
    """The kernel of a torch that has no `enable_gqa` yet."""
    return stand_in(query, key, value, *starts, scale=scale, window_size=window_size)


def top_left(query: Tensor, key: Tensor, value: Tensor, *starts: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
    """A kernel whose causal mask is aligned to the other corner, for one segment."""
    seen = torch.ones(len(query), len(key), dtype=torch.bool).tril()
    scores = (query.transpose(0, 1) @ key.permute(1, 2, 0) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value.transpose(0, 1)).transpose(0, 1)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Puts a kernel in the place of torch's, or none."""
    return lambda kernel: monkeypatch.setattr(varlen, "kernel_for", lambda device, dtype, width: kernel)


def batch_of_groups() -> Batch:
    """Ragged groups of one to four rows, some with nothing in common, in no order."""
    drawn = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> list[int]:
        return torch.randint(5, 50, (int(torch.randint(low, high, (1,), generator=drawn)),), generator=drawn).tolist()

    rows = []
    for group, count in enumerate((4, 1, 3, 2, 2)):
        prompt = tokens(5, 25) if group != 3 else tokens(1, 3)
        for _ in range(count):
            answer = tokens(1, 12)
            origin = [int(Origin.USER)] * len(prompt) + [int(Origin.POLICY)] * len(answer)
            trained = [False] * len(prompt) + [True] * len(answer)
            rows.append(Sample(tokens=prompt + answer, origin=origin, trained=trained, group=str(group)))
    order = torch.randperm(len(rows), generator=drawn).tolist()
    return pack([rows[place] for place in order], dtype=torch.float64)


def attended(layout: Layout, heads: tuple[int, int], window: int | None) -> list[Tensor]:
    """The result of `attend` and the gradients of queries, keys and values, in float64."""
    drawn = torch.Generator().manual_seed(1)
    shapes = [(layout.num_tokens, count, 8) for count in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(*shape, dtype=torch.float64, generator=drawn).requires_grad_() for shape in shapes)
    out = attend(q, k, v, Layout(**{**vars(layout), "plans": {}}), scale=0.4, window=window)
    out.backward(torch.randn(out.shape, dtype=torch.float64, generator=drawn))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("kernel", [stand_in, without_groups])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_segments_behind_others_are_those_of_the_grouped_path(
    heads: tuple[int, int], window: int | None, kernel: Any, use: Callable[[Any], None]
) -> None:
    shared = shared_layout(batch_of_groups())
    assert shared is not None
    assert shared.behind is not None
    assert len({int(front) for front in shared.behind.segment}) > 3  # different prompts, and rows behind none
    for layout in (shared, Layout.of(torch.zeros(30, dtype=torch.int64), (3, 9, 9, 8, 1))):
        found = []
        for choice in (None, kernel):
            use(choice)
            found.append(attended(layout, heads, window))
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(two, one, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("mistral", {"sliding_window": 7})])
def test_readings_and_gradients_of_a_model(family: str, options: dict[str, Any], use: Callable[[Any], None]) -> None:
    model, batch = random_model(family, dtype="float64", **options), batch_of_groups()
    found = []
    for choice in (None, stand_in):
        use(choice)
        batch = pack_again(batch)
        values = forward.read({"policy": model}, batch, {"policy": View(reads=(logprob,))}).policy.logprob
        model.module.zero_grad()
        values.sum().backward()
        found.append([values.detach(), *(p.grad.clone() for p in model.parameters().values() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("compile", [False, True])
def test_the_whole_path_of_a_gpu_in_half_precision(
    compile: bool, use: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys, values and what is attended are bfloat16, prompts are shared, and weights and their gradients are float32."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch_compile, "BACKEND", "aot_eager")
    exact, model, batch = random_model("qwen3", dtype="float64"), random_model("qwen3"), batch_of_groups()
    exact.load_weights({name: value.detach().double() for name, value in model.weights()})
    model.use_precision("bf16")
    model.use_compile(compile)
    found = []
    for each in (exact, model):
        use(None if each is exact else stand_in)
        if each is model:
            monkeypatch.setattr(LanguageModel, "_attends_in", torch.bfloat16)
        values = forward.read({"policy": each}, pack_again(batch), {"policy": View(reads=(logprob,))}).policy.logprob
        values.sum().backward()
        grads = [p.grad.flatten().double() for p in each.parameters().values() if p.grad is not None]
        found.append((values[batch.mask].detach().double(), torch.cat(grads)))
    for one, two in zip(*found, strict=True):
        assert 1e-4 < float((one - two).norm() / one.norm()) < 0.06
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters().values())


def pack_again(batch: Batch) -> Batch:
    """The same batch without the layout that it keeps."""
    return batch.with_(mask=batch.mask.clone())


def test_gradients_of_a_beginning_add_up_in_float32() -> None:
    x = torch.ones(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    index = torch.tensor([0] * 1000 + [1])
    varlen._Gather.apply(x, index).backward(torch.full((1001, 1, 1), 1.0, dtype=torch.bfloat16))
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1000.0, 1.0]  # one by one in bfloat16 it would stay at 256


def test_a_mask_of_the_other_alignment_is_seen() -> None:
    here = (torch.device("cpu"), torch.float32)
    assert varlen.sees_fronts(stand_in, *here)
    assert not varlen.sees_fronts(top_left, *here)


def test_a_kernel_of_the_other_alignment_gets_no_segments_behind_others(use: Callable[[Any], None]) -> None:
    layout = Layout.of(torch.arange(9), (4, 3, 2))
    behind = Behind(torch.tensor([0, 0]), torch.tensor([4, 4]), first=1)
    layout = Layout(**{**vars(layout), "behind": behind})
    use(top_left)
    found = attended(layout, (2, 1), None)
    use(None)
    for one, two in zip(found, attended(layout, (2, 1), None), strict=True):
        assert torch.equal(one, two)


def test_which_models_share_on_a_gpu(monkeypatch: pytest.MonkeyPatch, use: Callable[[Any], None]) -> None:
    model = random_model("llama")
    assert model.shares
    assert not random_model("gpt2").shares
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    asked: list[tuple[str, torch.dtype, int]] = []
    monkeypatch.setattr(varlen, "kernel_for", lambda device, dtype, width: asked.append((device.type, dtype, width)))
    assert not model.shares  # without the kernel whole rows stay in groups
    model.use_precision("bf16")
    assert not model.shares
    assert asked == [("cuda", torch.float32, 8), ("cuda", torch.bfloat16, 8)]
    use(stand_in)
    for right in (True, False):
        monkeypatch.setattr(varlen, "sees_fronts", lambda kernel, device, dtype, right=right: right)
        assert model.shares == right


def test_where_the_kernel_applies() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert varlen.kernel_for(cpu, torch.bfloat16, 64) is None
    assert varlen.kernel_for(gpu, torch.float32, 64) is None
    assert varlen.kernel_for(gpu, torch.bfloat16, 60) is None
    assert varlen.kernel_for(gpu, torch.bfloat16, 264) is None


def test_the_stand_in_takes_what_torchs_kernel_takes() -> None:
    kernel = varlen._torchs()
    assert kernel is not None
    theirs, ours = inspect.signature(kernel).parameters, inspect.signature(stand_in).parameters
    assert list(theirs)[:7] == list(ours)[:7]
    assert set(ours) - {"enable_gqa"} <= set(theirs)
    assert theirs["window_size"].default == (-1, -1)
