"""CUDA graphs without CUDA: a body's operations are written down with their tensors; a replay is these, and nothing of Python.

What a CUDA graph does and this does too: recording runs nothing; a replay reads and writes the very tensors that were there when
it was recorded; what a body allocates lies in a pool that the next graph writes over (here with NaN), so that only what it
writes to tensors from outside remains; operations that would wait for the device are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "repeat_interleave", "lift_fresh",
    "lift", "unique_dim", "_unique2", "bincount",
}  # fmt: skip
"""Operations that ask the device for values or sizes, or bring values from the host."""


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


class Tape(TorchDispatchMode):
    """Writes down what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.own: dict[int, Tensor] = {}  # what was allocated inside, by storage
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was written from outside, and its bytes before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put", "index_put_") and any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1]))
        if name in WAITING or masks:
            raise RuntimeError(f"'{name}' waits for the device, which is not permitted while a stream is captured")
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for x in written(func, args, kwargs):
            if storage(x) not in self.own and storage(x) not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                self.before[storage(x)] = whole, whole.clone()
        result = func(*args, **kwargs)
        given = {storage(x) for x in tensors((args, kwargs))}
        fresh = [(place, x) for place, x in enumerate(tensors(result)) if storage(x) not in given]
        self.own.update({storage(x): x for _, x in fresh})
        if fresh or written(func, args, kwargs):  # else a view: it looks at memory that is there
            self.calls.append((func, args, kwargs, fresh))
        return result

    def undo(self) -> None:
        """Recording runs nothing."""
        for whole, bytes_before in self.before.values():
            whole.copy_(bytes_before)
        self.spoil()

    def spoil(self) -> None:
        """Other graphs write to the pool."""
        for x in self.own.values():
            x.fill_(float("nan") if x.is_floating_point() else 1)

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, fresh in self.calls:
                found = tensors(func(*args, **kwargs))
                for place, x in fresh:
                    x.copy_(found[place])
            self.spoil()


class EmulatedRecorder:
    """See `graphs.Recorder`."""

    made = recorded = replayed = 0  # of all of them, since `reset`

    def __init__(self) -> None:
        type(self).made += 1

    @classmethod
    def reset(cls) -> None:
        cls.made = cls.recorded = cls.replayed = 0

    def warm(self, body: Callable[[], None]) -> None:
        with Tape():
            body()

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        type(self).recorded += 1
        with Tape() as tape:
            body()
        with torch.inference_mode():
            tape.undo()
        return lambda: self.replay(tape)

    def replay(self, tape: Tape) -> None:
        type(self).replayed += 1
        tape.replay()
