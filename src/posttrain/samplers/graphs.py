"""Decoding on a GPU without the host in between: a step is recorded once as a CUDA graph, then replayed with one call.

A step of a small model is hundreds of kernels that take less time than the calls that ask for them.  A CUDA graph asks for all of
them at once, but has its shapes and the addresses of its tensors for good, and nothing of Python runs again.  So a step writes
to fixed tensors, and its rows and columns are rounded up to a few sizes, each with a graph of its own.

```
tokens, positions --copy--> fixed inputs --replay--> fixed logits --replay--> fixed draws
                                 |  first time in a size: run, then record
                                 |  second time: replay, run as well, compare
```

Idle slots that fill up a size read token 0 at position 0; nobody reads what comes out, and `admit` writes over what they leave in
the cache.  Graphs live as long as their stepper: one call of `sample`, whose weights are made ready anew.  Where recording
fails, or the replay differs, the sampler says so once and goes on without graphs.  POSTTRAIN_GRAPHS=0 leaves them out.

Axes: `S` slots, `B` slots in use, `R` rows of a graph (`B <= R <= S`), `V` vocabulary.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from posttrain.samplers.cache import CachedStepper
from posttrain.samplers.draw import Drawn, draw
from posttrain.types import Sampling

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel

COLUMNS = 64
"""The fewest columns of a graph."""
WHOLE = 1 << 31
"""Bytes up to which a cache is allocated for the longest row at once: growing makes all graphs anew."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""How far a replay may be from the run, as a share of the largest value, by the dtype of the factors of products."""

Body = Callable[[], None]
"""Reads and writes tensors that stay where they are; run twice, it leaves what it leaves when run once."""


def size_of(count: int) -> int:
    """The size that `count` is rounded up to: a power of two, or from 24 on what lies half-way between two of them.

    Example:
        >>> [size_of(count) for count in (1, 3, 9, 17, 25, 33, 49)]
        [1, 4, 16, 24, 32, 48, 64]
    """
    power = 1 << (count - 1).bit_length()
    half = power * 3 // 4
    return half if count <= half and power >= 32 else power


class Recorder(Protocol):
    """What records: CUDA on a GPU, an emulation in the tests."""

    def warm(self, body: Body) -> None:
        """Run it where it will be recorded, so that all that its kernels need for the first time is there."""
        ...

    def record(self, body: Body) -> Body:
        """Record it without running it; what comes back replays its kernels."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they never run at the same time, and their results lie outside it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._pool = device, _side_stream(device), torch.cuda.graph_pool_handle()

    def warm(self, body: Body) -> None:
        """See `Recorder.warm`; a body that waits for the device is refused here: found while recording, it costs more."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), _never_waiting():
                body()
        finally:
            current.wait_stream(self._stream)

    def record(self, body: Body) -> Body:
        """See `Recorder.record`; what other threads do meanwhile does not matter."""
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self._stream), capture:  # the outer one: a capture that fails does not go back to the stream before
            body()
        return graph.replay


@contextmanager
def _never_waiting() -> Iterator[None]:
    """Inside, an operation that waits for the device raises an error."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that it does not find every one
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> Any:
    """One for all samplers: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device=device)


def recorder_of(model: LanguageModel) -> Callable[[], Recorder] | None:
    """What makes recorders for this model, or None: it is on no GPU, has no static cache, or POSTTRAIN_GRAPHS=0 is set."""
    if model.device.type != "cuda" or model.decoder is None or os.environ.get("POSTTRAIN_GRAPHS") == "0":
        return None
    return partial(CudaRecorder, model.device)


@dataclass
class _Graph:
    replay: Body
    checked: bool = False


class Graphs:
    """Recorded bodies by name, each compared once with itself.

    Args:
        make: Makes a recorder; all graphs of one recorder are dropped together.
        rounding: How far a replay may be from the run, as a share of the largest value.
    """

    def __init__(self, make: Callable[[], Recorder], rounding: float) -> None:
        self._make, self._rounding = make, rounding
        self._recorder = make()
        self._held: dict[Hashable, _Graph] = {}
        self.failed = False
        """Was there one that could not be recorded, or that computed something else?"""

    def drop(self) -> None:
        """Forget all graphs: what they read or write has moved."""
        if self._held:
            self._held.clear()
            self._recorder = self._make()

    def run(self, name: Hashable, body: Body, outs: Sequence[Tensor]) -> bool:
        """Fill `outs` as `body` does: by running it and recording it the first time, by a replay later.

        The second time, on other inputs than it was recorded with, the replay comes first and the run after it, which writes
        the same places: the results are the run's, whatever the replay did there.

        Returns:
            False where graphs have failed, and `outs` mean nothing.
        """
        if self.failed:
            return False
        held = self._held.get(name)
        try:
            if held is None:
                self._recorder.warm(body)
                self._held[name] = _Graph(self._recorder.record(body))
                return True
            held.replay()
        except RuntimeError as error:  # torch's own, of CUDA and of memory too
            cause = error.__context__ or error  # the end of a broken capture raises an error of its own
            words = f"{type(cause).__name__}: {cause}".splitlines()[0]
            self._give_up(f"could not be {'recorded' if held is None else 'replayed'} ({words})")
            return False
        if not held.checked:
            replayed = [out.clone() for out in outs]
            body()
            held.checked = all(_same(found, wanted, self._rounding) for found, wanted in zip(replayed, outs, strict=True))
            if not held.checked:
                self._give_up("computed something else when replayed than when run")
        return True

    def _give_up(self, what: str) -> None:
        self.failed = True
        self._held.clear()
        warnings.warn(
            f"a decoding step as a CUDA graph {what}; this sampler goes on without graphs, as right and more slowly "
            "(POSTTRAIN_GRAPHS=0 leaves them out from the start)",
            stacklevel=2,
        )


def _same(found: Tensor, wanted: Tensor, rounding: float) -> bool:
    """Are they the same but for rounding?  Integers in full; what is not finite must be so in both."""
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    scale = float(wanted.nan_to_num(0.0, 0.0, 0.0).abs().amax())
    return torch.allclose(found, wanted, rtol=0.0, atol=rounding * scale, equal_nan=True)


class GraphStepper(CachedStepper):
    """See `CachedStepper`, whose step this records and replays, and the draw behind it."""

    def __init__(self, model: LanguageModel, *, slots: int, longest: int, columns: int, make: Callable[[], Recorder]) -> None:
        decoder, narrow = model.decoder, model.precision == "bf16"
        assert decoder is not None
        self._graphs = Graphs(make, ROUNDING[torch.bfloat16 if narrow else model.dtype])
        per_token = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * model.dtype.itemsize
        whole = slots * longest * per_token <= WHOLE
        super().__init__(model, slots=slots, longest=longest, columns=longest if whole else columns)
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._inputs = torch.zeros(2, slots, dtype=torch.int64, device=self._device)  # tokens, positions
        self._uniforms = torch.zeros(slots, dtype=torch.float64, device=self._device)
        self._logits = torch.zeros(slots, decoder.vocab_size, dtype=wide, device=self._device)  # [S, V]
        logprobs = [torch.zeros(slots, dtype=wide, device=self._device) for _ in range(2)]
        self._drawn = Drawn(torch.zeros(slots, dtype=torch.int64, device=self._device), *logprobs)

    @property
    def failed(self) -> bool:
        """Did graphs fail, so that it steps as `CachedStepper`?"""
        return self._graphs.failed

    def _grow(self, columns: int) -> None:
        """Twice as many at least, and every graph is dropped: the buffers have moved."""
        super()._grow(max(size_of(columns), 2 * self._columns))
        self._graphs.drop()

    def _rows(self, count: int) -> int:
        """R."""
        return min(size_of(count), self._slots)

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """See `Stepper.step`; the next step writes over the logits."""
        if self.failed:
            return super().step(tokens, positions, longest)
        if longest > self._columns:
            self._grow(longest)
        used = tokens.shape[0]
        rows, columns = self._rows(used), min(max(COLUMNS, size_of(longest)), self._columns)
        self._inputs[0, :used].copy_(tokens)
        self._inputs[1, :used].copy_(positions)
        self._inputs[:, used:rows].zero_()
        if self._graphs.run(("step", rows, columns), partial(self._into_logits, rows, columns), [self._logits[:used]]):
            return self._logits[:used]
        return super().step(tokens, positions, longest)

    def _into_logits(self, rows: int, columns: int) -> None:
        self._arrange(rows, columns)
        self._logits[:rows].copy_(self._read(self._inputs[0, :rows], self._inputs[1, :rows]))

    def draw(self, logits: Tensor, uniforms: Tensor | None, sampling: Sampling) -> Drawn:
        """See `draw.draw`, whose results these are; `logits` are those of the last step, and the next draw writes over this one."""
        if self.failed or (sampling.truncated and not sampling.greedy):  # top-p asks the device how many tokens it keeps
            return draw(logits, uniforms, sampling)
        used = logits.shape[0]
        rows = self._rows(used)
        if uniforms is not None:
            self._uniforms[:used].copy_(uniforms)
        outs = Drawn(*(out[:used] for out in self._drawn))
        done = self._graphs.run(("draw", rows, sampling), partial(self._into_drawn, rows, sampling), outs)
        return outs if done else draw(logits, uniforms, sampling)

    def _into_drawn(self, rows: int, sampling: Sampling) -> None:
        found = draw(self._logits[:rows], self._uniforms[:rows], sampling)
        for out, values in zip(self._drawn, found, strict=True):
            out[:rows].copy_(values)


__all__ = ["CudaRecorder", "GraphStepper", "Graphs", "Recorder", "recorder_of", "size_of"]
