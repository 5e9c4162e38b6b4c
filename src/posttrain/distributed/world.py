"""The one seam to other processes: rank, size, and sums, gathers and waits over ranks, each with a deadline and a name.

A world of one rank needs no set-up and costs nothing.  Under torchrun (or anything that sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT) `World.here()` joins the others: gloo carries CPU tensors, nccl those on CUDA.  Values
travel as JSON bytes; nothing is ever unpickled.

On the CPU a sum gathers all ranks' parts and adds them in the order of the ranks, so that it is bitwise the same on
every rank and in every run.  What a rank waits for is named; when a wait fails, every rank says in the store where it
stands, so that the error names those that do not answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore  # type: ignore[attr-defined, unused-ignore]
from torch.distributed.rendezvous import rendezvous

from posttrain.errors import ConfigError, WorldError
from posttrain.exact_json import JSON, dumps, loads

__all__ = ["ALONE_SECONDS", "World"]

ALONE_SECONDS = 6 * 3600.0
"""What ranks grant one of them for work of its own: an evaluation, a save."""
BUCKET_BYTES = 32 << 20
ANSWER_SECONDS = 2.0  # how long a failed wait listens for the other ranks before it names the missing


@dataclass(frozen=True)
class World:
    """This process among its equals.

    Example:
        >>> World().all_gather_json({"loss": 0.5})
        [{'loss': 0.5}]
    """

    rank: int = 0
    size: int = 1
    timeout_seconds: float = 600.0  # deadline of every wait that names none
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where this rank computes
    store: Any = field(default=None, repr=False, compare=False)  # torch's key-value store; None in a world of one

    @classmethod
    def here(cls, *, timeout_seconds: float = 600.0) -> World:
        """Join the world that the environment describes; a world of one where it describes none.

        Args:
            timeout_seconds: Deadline of joining, and of every later wait that names none.

        Raises:
            ConfigError: RANK or WORLD_SIZE are missing, or are no fitting numbers.
            WorldError: Not all ranks joined in time.
        """
        rank, size = _numbers(os.environ)
        if size == 1:
            return cls(timeout_seconds=timeout_seconds)
        local = int(os.environ.get("LOCAL_RANK", rank))
        cuda = torch.cuda.is_available() and local < torch.cuda.device_count()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        limit = timedelta(seconds=timeout_seconds)
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store = next(rendezvous("env://", rank, size, timeout=limit))[0]
            store.set_timeout(limit)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=PrefixStore("torch", store), rank=rank, world_size=size, timeout=limit)
        except (RuntimeError, ValueError) as cause:
            message = f"rank {rank} could not join {size} ranks at {address} within {timeout_seconds:g} s: {cause}"
            raise WorldError(message) from cause
        return cls(rank, size, timeout_seconds, device, PrefixStore("posttrain", store))

    # ------------------------------------------------------------------------------------------------ sums

    def all_sum(self, tensor: Tensor, *, name: str = "all_sum") -> Tensor:
        """The sum over ranks, in the tensor's own dtype (half precision adds in float32; bool is "any").

        Args:
            tensor: Any shape, the same on all ranks; not changed.
            name: What the error calls this wait.

        Returns:
            A new tensor, without gradient, bitwise the same on every rank.

        Raises:
            WorldError: A rank died, did not arrive in time, or brought another shape or dtype.
        """
        tensor = tensor.detach()
        if self.size == 1:
            return tensor.clone()
        if tensor.device.type == "cuda" and tensor.is_floating_point():
            total = tensor.to(_wide(tensor.dtype), copy=True).contiguous()
            self._finish(name, lambda: dist.all_reduce(total, async_op=True))
            return total.to(tensor.dtype)
        parts = self._gather_bytes(_as_bytes(tensor), name)
        if any(part.numel() != parts[self.rank].numel() for part in parts):
            sizes = [part.numel() for part in parts]
            raise WorldError(f"'{name}': the ranks brought tensors of {sizes} bytes; expected the same shape and dtype")
        wide = _wide(tensor.dtype)
        total = _from_bytes(parts[0], tensor.dtype, tensor.shape).to(wide, copy=True)
        for part in parts[1:]:
            total = total + _from_bytes(part, tensor.dtype, tensor.shape).to(wide)
        return total.to(tensor.device, tensor.dtype)

    def all_sum_gradients(self, parameters: Iterable[Tensor], *, name: str = "gradients") -> None:
        """Replace every gradient by its sum over ranks, several to a message.

        A parameter without a gradient here counts as zero if another rank has one, and keeps none if nobody has.

        Args:
            parameters: The same, in the same order, on all ranks.
        """
        if self.size == 1:
            return
        listed = list(parameters)
        present = torch.tensor([parameter.grad is not None for parameter in listed], dtype=torch.uint8)
        anywhere = self.all_sum(present, name=f"{name}: which exist").tolist()
        for parameter, exists in zip(listed, anywhere, strict=True):
            if exists and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in listed if parameter.grad is not None]
        for number, bucket in enumerate(_buckets(gradients)):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            total = self.all_sum(flat, name=f"{name}: bucket {number}")
            for gradient, part in zip(bucket, total.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    # ------------------------------------------------------------------------------------------------ gathers

    def all_gather_json(self, value: JSON, *, name: str = "all_gather_json") -> list[JSON]:
        """Every rank's JSON value, in the order of the ranks; floats exact, infinities and NaN included."""
        content = dumps(value).encode()
        if self.size == 1:
            return [loads(content)]
        parts = self._gather_bytes(torch.frombuffer(bytearray(content), dtype=torch.uint8), name)
        return [loads(part.numpy().tobytes()) for part in parts]

    def all_gather_rows(self, tensor: Tensor, *, fill: float | None = None, name: str = "all_gather_rows") -> Tensor:
        """Every rank's rows under one another, in the order of the ranks.

        Args:
            tensor: `[b, ...]`; b may differ between ranks and be 0.
            fill: If given, later axes may differ too: shorter ones are filled with it at the end.

        Returns:
            `[B, ...]`, B the sum of all b, without gradient, on the tensor's device.

        Raises:
            WorldError: A rank died or was late, or the dtypes or later axes differ.
        """
        tensor = tensor.detach()
        if self.size == 1:
            return tensor.clone()
        mine = [str(tensor.dtype), list(tensor.shape)]
        heads = self.all_gather_json(mine, name=f"{name}: shapes")
        kinds = {(dtype, len(shape), None if fill is not None else tuple(shape[1:])) for dtype, shape in heads}
        if len(kinds) > 1 or tensor.ndim == 0:
            hint = "" if fill is not None else "; pass fill= to let later axes differ"
            raise WorldError(f"'{name}': the ranks brought {heads}; expected one dtype and [b, ...] of one shape{hint}")
        parts = self._gather_bytes(_as_bytes(tensor), name)
        rows = [_from_bytes(part, tensor.dtype, shape) for part, (_, shape) in zip(parts, heads, strict=True)]
        if fill is not None:
            widths = [max(axis) for axis in zip(*(shape[1:] for _, shape in heads), strict=True)]
            rows = [_grown(row, widths, fill) for row in rows]
        return torch.cat(rows).to(tensor.device)

    # ------------------------------------------------------------------------------------------------ broadcasts

    def broadcast(self, tensor: Tensor, *, source: int = 0, name: str = "broadcast") -> Tensor:
        """The tensor of rank `source`; shape and dtype are the same on all ranks.  Returns a new tensor."""
        result = tensor.detach().clone().contiguous()
        if self.size > 1 and result.numel():
            flat = result.reshape(-1).view(torch.uint8)
            self._finish(name, lambda: dist.broadcast(flat, source, async_op=True))
        return result

    def broadcast_json(self, value: JSON = None, *, source: int = 0, name: str = "broadcast_json") -> JSON:
        """The JSON value of rank `source`, on every rank; the others' values are not looked at."""
        if self.size == 1:
            return loads(dumps(value))
        content = bytearray(dumps(value).encode()) if self.rank == source else bytearray()
        length = self.broadcast(torch.tensor([len(content)]), source=source, name=f"{name}: length")
        buffer = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(int(length), dtype=torch.uint8)
        return loads(self.broadcast(buffer, source=source, name=name).numpy().tobytes())

    # ------------------------------------------------------------------------------------------------ waits

    def barrier(self, name: str = "barrier", timeout_seconds: float | None = None) -> None:
        """Go on when every rank is here.

        Args:
            name: Of the place; ranks that stand at differently named barriers wait in vain, and the error says so.
            timeout_seconds: The deadline; the world's own when left out.

        Raises:
            WorldError: Not all ranks came in time; the message names those that did not.
        """
        if self.size > 1:
            message = torch.frombuffer(bytearray(name.encode()), dtype=torch.uint8)
            names = [part.numpy().tobytes().decode() for part in self._gather_bytes(message, name, timeout_seconds)]
            if set(names) != {name}:
                raise WorldError(f"rank {self.rank} waits at barrier '{name}', but the ranks stand at {names}")

    def close(self) -> None:
        """Leave the world; harmless in a world of one, and a second time."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ underneath

    def _gather_bytes(self, flat: Tensor, name: str, timeout_seconds: float | None = None) -> list[Tensor]:
        """Every rank's bytes `[n]` uint8, n free: lengths first, then padded to the longest."""
        flat = flat.cpu()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        mine = torch.tensor([flat.numel()])
        self._finish(name, lambda: dist.all_gather(lengths, mine, async_op=True), timeout_seconds)
        sizes = [int(length) for length in lengths]
        longest = max(sizes)
        if longest == 0:
            return [flat.new_empty(0) for _ in sizes]
        padded = torch.cat([flat, flat.new_zeros(longest - flat.numel())])
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        self._finish(name, lambda: dist.all_gather(parts, padded, async_op=True), timeout_seconds)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def _finish(self, name: str, start: Callable[[], Any], timeout_seconds: float | None = None) -> None:
        """Start a collective and wait for it, until the deadline."""
        limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        began = time.monotonic()
        try:
            start().wait(timedelta(seconds=limit))
        except (RuntimeError, ValueError) as cause:
            waited = time.monotonic() - began
            others = self._whereabouts(name)
            head = f"rank {self.rank} of {self.size} gave up '{name}' after {waited:.1f} s (deadline {limit:g} s): {others}"
            why = " ".join(str(cause).splitlines()[:1])
            message = f"{head}; a rank without an answer has died or is stuck: see its output ({why})"
            raise WorldError(message) from cause

    def _whereabouts(self, name: str) -> str:
        """What the other ranks say of themselves, in words."""
        missing = set(range(self.size)) - {self.rank}
        stand: dict[int, str] = {}
        try:
            self.store.set(f"stuck/{self.rank}", name)
            until = time.monotonic() + ANSWER_SECONDS
            while missing and time.monotonic() < until:
                for rank in sorted(missing):
                    if self.store.check([f"stuck/{rank}"]):
                        stand[rank] = self.store.get(f"stuck/{rank}").decode()
                missing -= set(stand)
                time.sleep(0.02)
        except RuntimeError:
            return "the store that the ranks meet at is gone too (rank 0 or the launcher keeps it)"
        said = [f"rank {rank} gave up '{place}'" for rank, place in sorted(stand.items())]
        silent = [f"no answer from rank {', '.join(map(str, sorted(missing)))}"] if missing else []
        return ", ".join(said + silent)


def _numbers(variables: Mapping[str, str]) -> tuple[int, int]:
    """Rank and size from the environment."""
    if "RANK" not in variables and "WORLD_SIZE" not in variables:
        return 0, 1
    try:
        rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    except (KeyError, ValueError) as cause:
        found = {name: variables.get(name) for name in ("RANK", "WORLD_SIZE")}
        raise ConfigError(f"the environment has {found}; expected two integers: start with torchrun") from cause
    if not 0 <= rank < size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {size}; expected 0 <= RANK < WORLD_SIZE")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if size > 1 and name not in variables]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start with torchrun")
    return rank, size


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are made in."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _as_bytes(tensor: Tensor) -> Tensor:
    """`[...]` of any dtype -> `[n]` uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(flat: Tensor, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
    """`[n]` uint8 -> `shape` of `dtype`, a copy."""
    return flat.clone().view(dtype).reshape(tuple(shape))


def _grown(rows: Tensor, widths: list[int], fill: float) -> Tensor:
    """`[b, ...]` -> `[b, *widths]`, filled at the end of each axis."""
    if list(rows.shape[1:]) == widths:
        return rows
    grown = rows.new_full((rows.shape[0], *widths), fill)
    grown[tuple(slice(0, size) for size in rows.shape)] = rows
    return grown


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, up to `BUCKET_BYTES` together (a larger one alone)."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not alike or held + size > BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += size
    if bucket:
        yield bucket
