"""Named tensors in one safetensors file, streamed both ways and hashed on the way.

The format is eight bytes with the length of a header, the header (JSON: dtype, shape and offsets of each tensor), and
the bytes of the tensors, little-endian.  Any safetensors reader opens what is written here.  The reader here differs in
one thing: it hashes the very bytes that become the tensors, so nothing can change between the check and the use.

Source: the safetensors format, https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from posttrain.files import NewFile
from posttrain.manifest import FileHash

__all__ = ["read_tensors", "write_file", "write_tensors"]

CHUNK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the format

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def _stored(name: str) -> str:
    """A name as it stands in the file: `__metadata__` has a meaning of its own there."""
    return "\\" + name if name == "__metadata__" or name.startswith("\\") else name


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, row-major, in pieces; one tensor at a time comes to the CPU."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), CHUNK_BYTES):
        yield memoryview(cast(bytes, flat[start : start + CHUNK_BYTES].numpy()))


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The header, and the names in the order of their bytes: the widest types first, so that all stay aligned."""
    if sys.byteorder != "little":
        raise TypeError("this machine is big-endian; tensors are saved as little-endian bytes")
    entries: dict[str, object] = {}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in CODES or tensor.layout != torch.strided:
            raise TypeError(
                f"tensor '{name}' is {tensor.dtype}, {tensor.layout}; expected a dense tensor of: {', '.join(DTYPES)}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[_stored(name)] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise TypeError(
            f"the names of {len(tensors)} tensors take {len(text)} bytes; the format allows {MAX_HEADER_BYTES}"
        )
    return len(text).to_bytes(8, "little") + text, order


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileHash:
    """Write a new file durably and hash it, each piece hashed in a second thread while it is written."""
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as pool, NewFile(path) as file:
        for piece in pieces:
            hashed = pool.submit(digest.update, piece)
            try:
                file.write(piece)
            finally:
                hashed.result()
            size += len(piece)
    return FileHash(digest.hexdigest(), size)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileHash:
    """Write tensors (any shape, dtype of `DTYPES`, any name that is valid Unicode) to a new file, durably.

    Raises:
        TypeError: A tensor of another dtype or layout.
        UnicodeEncodeError: A name that is not valid Unicode.
    """
    header, order = _header(tensors)

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for name in order:
            yield from _chunks(tensors[name])

    return write_file(path, pieces())


def read_tensors(path: Path, expected: FileHash) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, if every byte of it is the expected one.

    Raises:
        ValueError: The file is damaged; the message says how.
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        if size != expected.bytes:
            raise ValueError(f"{path.name} has {size} bytes; expected {expected.bytes}")
        file.seek(0)

        def fill(target: Tensor) -> None:
            view = memoryview(cast(bytes, target.numpy()))
            while view:
                count = file.readinto(view[:CHUNK_BYTES])
                if not count:
                    raise ValueError(f"{path.name} ends too early")
                digest.update(view[:count])
                view = view[count:]

        def take(count: int) -> bytes:
            target = torch.empty(count, dtype=torch.uint8)
            fill(target)
            return target.numpy().tobytes()

        length = int.from_bytes(take(8), "little") if size >= 8 else -1
        if not 0 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path.name} has a damaged header")
        tensors = {}
        for name, dtype, shape, count in _entries(path, take(length), size - 8 - length):
            target = torch.empty(count, dtype=torch.uint8)
            fill(target)
            tensors[name[1:] if name.startswith("\\") else name] = target.view(dtype).reshape(shape)
    if digest.hexdigest() != expected.sha256:
        raise ValueError(f"{path.name} is damaged: its hash is not the one in the manifest")
    return tensors


def _entries(path: Path, text: bytes, size: int) -> list[tuple[str, torch.dtype, list[int], int]]:
    """Name, dtype, shape and bytes of each tensor in file order, checked against the `size` of the data."""
    entries: list[tuple[int, int, str, torch.dtype, list[int]]] = []
    try:
        for name, entry in json.loads(text).items():
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(name)
            entries.append((start, stop, name, dtype, shape))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise ValueError(f"{path.name} has a damaged header") from cause
    entries.sort(key=lambda entry: entry[:3])
    end = 0
    for start, stop, name, *_ in entries:
        if start != end:
            raise ValueError(f"{path.name} has a damaged header: '{name}' begins at {start}; expected {end}")
        end = stop
    if end != size:
        raise ValueError(f"{path.name} has a damaged header: {end} bytes of tensors; expected {size}")
    return [(name, dtype, shape, stop - start) for start, stop, name, dtype, shape in entries]
