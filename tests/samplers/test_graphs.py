"""Steps as CUDA graphs: with an emulation that replays operations and nothing of Python, the samples are those of plain steps."""

from __future__ import annotations

import gc
import inspect
import random
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import EmulatedRecorder, Tape
from torch import Tensor

from posttrain.models import compiled
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.samplers import NativeSampler, cache, graphs, native, products
from posttrain.samplers.cache import CachedStepper
from posttrain.samplers.graphs import CudaRecorder, Graphs, GraphStepper, recorder_of, size_of
from posttrain.types import Origin, Sample, Sampling

MODELS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "mistral": {"sliding_window": 7}}
DRAWS = {
    "sampled": Sampling(temperature=0.9, max_tokens=40),
    "greedy": Sampling(greedy=True, max_tokens=40),
    "truncated": Sampling(top_p=0.9, top_k=20, max_tokens=40),
}
STOP = (2, 5, 9)


def prompt(tokens: list[int], index: int) -> Sample:
    return Sample(tokens=tokens, origin=[int(Origin.USER)] * len(tokens), trained=[False] * len(tokens), index=index)


def ragged(count: int = 9, copies: int = 3, *, longest: int = 13) -> list[Sample]:
    chance = random.Random(1)
    texts = [[chance.randrange(3, 61) for _ in range(chance.randint(1, longest))] for _ in range(count)]
    return [prompt(list(texts[i // copies]), i) for i in range(count * copies)]


def write(model: LanguageModel, prompts: list[Sample], sampling: Sampling, **settings: Any) -> list[Sample]:
    made = NativeSampler(model, None, **{"stop_tokens": STOP, "max_batch": 5, **settings})
    return made.sample(prompts, sampling=sampling, seed=3, step=1)


def same(found: list[Sample], wanted: list[Sample], gap: float = 1e-4) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.finish == theirs.finish
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=gap)
        assert ours.sampled_logprobs == pytest.approx(theirs.sampled_logprobs, abs=gap)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> type[EmulatedRecorder]:
    """Every sampler steps with emulated graphs."""
    EmulatedRecorder.reset()
    monkeypatch.setattr(native, "recorder_of", lambda model: EmulatedRecorder)
    return EmulatedRecorder


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """A warning that no test expects is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_plain_steps(name: str, draws: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prompts, rows that end and are replaced, gaps that close, windows: all with graphs that are replayed."""
    model, prompts = random_model(name, **MODELS[name]), ragged()
    wanted = write(model, prompts, DRAWS[draws])
    monkeypatch.setattr(native, "recorder_of", lambda model: EmulatedRecorder)
    EmulatedRecorder.reset()
    same(write(model, prompts, DRAWS[draws]), wanted)
    assert len({len(sample) for sample in wanted}) > 5
    assert EmulatedRecorder.replayed > 60


@pytest.mark.parametrize("width", [1, 2, 3, 16, 17, 25, 64])
def test_every_number_of_rows_is_right_at_the_edges_of_sizes(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = random_model(), ragged(22, 3)
    wanted = write(model, prompts, DRAWS["sampled"], max_batch=width)
    monkeypatch.setattr(native, "recorder_of", lambda model: EmulatedRecorder)
    same(write(model, prompts, DRAWS["sampled"], max_batch=width), wanted)


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_that_grows_drops_its_graphs(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(max_position_embeddings=600)
    prompts = [*ragged(5, 1), prompt([3 + i % 50 for i in range(150)], 90), prompt([4] * 33, 91)]
    sampling = Sampling(max_tokens=330)
    wanted = write(model, prompts, sampling, stop_tokens=(), max_batch=3)
    monkeypatch.setattr(native, "recorder_of", lambda model: EmulatedRecorder)
    monkeypatch.setattr(graphs, "WHOLE", graphs.WHOLE if whole else 0)
    EmulatedRecorder.reset()
    same(write(model, prompts, sampling, stop_tokens=(), max_batch=3), wanted)
    assert EmulatedRecorder.made == (1 if whole else 2)
    assert EmulatedRecorder.recorded < 30


@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_quick_precisions_are_replayed(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own operations, as on a GPU; keys in bfloat16 as there."""
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    monkeypatch.setattr(native, "can_step", lambda model: False)
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    if precision == "bf16":
        monkeypatch.setattr(cache, "kept_as", lambda model: (torch.bfloat16, torch.bfloat16))
    model, prompts = random_model("qwen3"), ragged()
    model.use_precision(precision)
    wanted = write(model, prompts, DRAWS["sampled"])
    monkeypatch.setattr(native, "recorder_of", lambda model: EmulatedRecorder)
    found = write(model, prompts, DRAWS["sampled"])
    if precision == "fast":
        same(found, wanted)
    else:  # other shapes round otherwise, which moves a few draws
        pairs = [(ours, theirs) for ours, theirs in zip(found, wanted, strict=True) if ours.tokens == theirs.tokens]
        assert len(pairs) > 0.7 * len(wanted)
        for ours, theirs in pairs:
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=0.1)


class Forgetful(EmulatedRecorder):
    """Its replays stop half-way."""

    def replay(self, tape: Tape) -> None:
        tape.calls = tape.calls[: len(tape.calls) // 2]
        tape.replay()


class Refusing(EmulatedRecorder):
    """Cannot record what it ran."""

    def record(self, body: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(
    ("kind", "words"), [(Forgetful, "something else when replayed"), (Refusing, "could not be recorded .*not p")]
)
def test_a_graph_that_fails_is_told_once_and_nothing_is_lost(kind: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = random_model(), ragged()
    wanted = write(model, prompts, DRAWS["sampled"])
    monkeypatch.setattr(native, "recorder_of", lambda model: kind)
    made = NativeSampler(model, None, stop_tokens=STOP, max_batch=5)
    with pytest.warns(UserWarning, match=words) as told:
        found = made.sample(prompts, sampling=DRAWS["sampled"], seed=3, step=1)
    assert len(told) == 1
    same(found, wanted)
    same(made.sample(prompts, sampling=DRAWS["sampled"], seed=3, step=1), wanted)  # without another try, and warning


def test_a_step_that_asks_the_device_is_not_recorded(emulated: type[EmulatedRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = random_model(), ragged()
    original = CachedStepper._read

    def asking(self: CachedStepper, tokens: Tensor, positions: Tensor) -> Tensor:
        assert int(positions.max()) >= 0
        return original(self, tokens, positions)

    monkeypatch.setattr(CachedStepper, "_read", asking)
    with pytest.warns(UserWarning, match="'item' waits for the device"):
        write(model, prompts, DRAWS["sampled"])
    assert emulated.recorded == 0


def test_what_python_put_into_a_graph_is_noticed() -> None:
    """A number that changes on the host stays in the graph what it was."""
    made, x, out, host = Graphs(EmulatedRecorder, 1e-3), torch.ones(3), torch.zeros(3), [1.0]

    def body() -> None:
        out.copy_(x * host[0])

    assert made.run("a", body, [out])
    host[0] = 2.0
    with pytest.warns(UserWarning, match="something else"):
        assert made.run("a", body, [out])
    assert out.tolist() == [2.0] * 3
    assert made.failed
    assert not made.run("a", body, [out])


def test_a_graph_is_run_then_checked_then_replayed() -> None:
    made, x, out, runs = Graphs(EmulatedRecorder, 1e-3), torch.ones(3), torch.zeros(3), []

    def body() -> None:
        runs.append(1)
        out.copy_(x * 2)

    for step in range(5):
        x.fill_(step)
        assert made.run("a", body, [out])
        assert out.tolist() == [2.0 * step] * 3
    assert len(runs) == 3  # warm, recorded, checked
    x.fill_(float("nan"))
    made.run("b", body, [out])
    made.run("b", body, [out])
    assert not made.failed  # not finite in both: the draw says so


def test_the_emulation_refuses_and_forgets_as_cuda_does() -> None:
    x, out = torch.arange(4.0), torch.zeros(4)
    for waiting in (lambda: x.nonzero(), lambda: x[x > 1], lambda: x.sum().item(), lambda: torch.tensor([1.0]), lambda: bool(x[0])):
        with pytest.raises(RuntimeError, match="waits for the device"):
            EmulatedRecorder().warm(waiting)  # type: ignore[arg-type]
    kept = []

    def body() -> None:
        kept.append(x + 1)
        out.add_(kept[0])

    replay = EmulatedRecorder().record(body)
    assert out.tolist() == [0.0] * 4  # recording runs nothing
    replay()
    replay()
    assert out.tolist() == [2.0, 4.0, 6.0, 8.0]
    assert kept[0].isnan().all()  # the pool is everybody's


def test_sizes_are_few_and_near() -> None:
    sizes = [size_of(count) for count in range(1, 4097)]
    assert sizes == sorted(sizes)
    assert all(count <= size < 2 * count or size == count for count, size in enumerate(sizes, start=1))
    assert all(size <= 1.5 * count for count, size in enumerate(sizes, start=1) if count > 16)
    assert len(set(sizes)) == 21
    assert all(size % 32 == 0 for size in sizes if size >= 64)  # columns


def test_graphs_are_for_cached_steps_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Any = SimpleNamespace(device=torch.device("cuda"), decoder=object())
    monkeypatch.delenv("POSTTRAIN_GRAPHS", raising=False)
    assert recorder_of(there) is not None
    assert recorder_of(random_model()) is None
    assert recorder_of(SimpleNamespace(device=torch.device("cuda"), decoder=None)) is None  # type: ignore[arg-type]
    monkeypatch.setenv("POSTTRAIN_GRAPHS", "0")
    assert recorder_of(there) is None


def test_an_exact_sampler_has_no_graphs(emulated: type[EmulatedRecorder]) -> None:
    write(random_model(), ragged(3, 1), DRAWS["greedy"], exact=True)
    assert emulated.made == 0


def test_cuda_is_called_as_its_signatures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see them: a side stream that waits, a watch on synchronisation that ends, capture inside the stream."""
    calls: list[str] = []

    class Stream:
        def __init__(self, **_: Any) -> None: ...

        def wait_stream(self, other: Any) -> None:
            calls.append("wait")

    @contextmanager
    def stream(_: Any) -> Iterator[None]:
        calls.append("stream")
        yield
        calls.append("back")

    signature = inspect.signature(torch.cuda.graph)

    @contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        signature.bind(*args, **kwargs)
        calls.append("begin")
        yield
        calls.append("end")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    fakes = {"Stream": Stream, "stream": stream, "graph": graph, "CUDAGraph": Graph, "graph_pool_handle": lambda: (0, 1)}
    fakes |= {"current_stream": lambda device: Stream(), "get_sync_debug_mode": lambda: 0}
    fakes |= {"set_sync_debug_mode": lambda mode: calls.append(f"watch {mode}")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs._side_stream.cache_clear()
    try:
        recorder = CudaRecorder(torch.device("cuda"))
        recorder.warm(lambda: calls.append("body"))
        assert calls == ["wait", "stream", "watch error", "body", "watch 0", "back", "wait"]
        calls.clear()
        recorder.record(lambda: calls.append("body"))()
        assert calls == ["stream", "begin", "body", "end", "back", "replay"]
    finally:
        graphs._side_stream.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_graphs_on_a_gpu(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen3")
    model = LanguageModel(model.module.cuda(), precision=precision)
    with_graphs = write(model, ragged(), DRAWS["greedy"])
    monkeypatch.setenv("POSTTRAIN_GRAPHS", "0")
    without = write(model, ragged(), DRAWS["greedy"])
    if precision == "exact":
        same(with_graphs, without)
    first = [[sample.tokens[sample.prompt_length] for sample in some] for some in (with_graphs, without)]
    assert first[0] == first[1]


def test_a_stepper_gives_its_memory_back() -> None:
    """No graph holds the stepper: on a GPU its cache goes when the call ends, not when garbage is collected."""
    model = random_model()
    gc.disable()
    try:
        stepper = GraphStepper(model, slots=2, longest=32, columns=32, make=EmulatedRecorder)
        (prefix,) = stepper.prefill([(1, 2)])
        stepper.admit(torch.tensor([0, 1]), prefix)
        for place in range(2, 6):
            stepper.draw(stepper.step(torch.ones(2, dtype=torch.int64), torch.full((2,), place), place + 1), None, DRAWS["greedy"])
        gone = weakref.ref(stepper)
        del stepper
        assert gone() is None
    finally:
        gc.enable()


def test_adapters_are_replayed_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from posttrain.models.lora import Lora, apply

    model, prompts = apply(random_model(), Lora(r=2)), ragged()
    with torch.no_grad():
        for weight in model.parameters().values():
            weight.add_(0.05)
    wanted = write(model, prompts, DRAWS["sampled"])
    monkeypatch.setattr(native, "recorder_of", lambda model: EmulatedRecorder)
    EmulatedRecorder.reset()
    same(write(model, prompts, DRAWS["sampled"]), wanted)
    assert EmulatedRecorder.replayed > 60
