"""What a frozen model said of rows that come again: read in the first pass over them, remembered in the others.

Only log-probabilities that a method reads once, of rows that nobody samples, from a model that never changes (the
reference of DPO and its kin).  They are saved with the run's state, so that a resumed run goes on with the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain import reads
from posttrain.forward import wanted_beside
from posttrain.method import Method
from posttrain.types import Batch, View

LIMIT = 64 << 20
"""Bytes that are remembered, and saved, at most."""
KEY = 16
"""Bytes of a row's key."""


def row_keys(batch: Batch) -> list[bytes]:
    """What each row is known by: its tokens and which of them are trained."""
    tokens, mask = batch.tokens.cpu().numpy(), batch.mask.cpu().numpy()
    return [
        hashlib.blake2b(tokens[row, :length].tobytes() + mask[row, :length].tobytes(), digest_size=KEY).digest()
        for row, length in enumerate(batch.lengths.tolist())
    ]


@dataclass
class Recall:
    """Log-probabilities by view and row."""

    limit: int = LIMIT
    rows: dict[str, dict[bytes, Tensor]] = field(default_factory=dict)  # [n] of a row's trained tokens
    size: int = 0

    @staticmethod
    def covers(method: Method, once: Mapping[str, View]) -> list[str]:
        """The views among `once` that may be remembered; none where another view among them is worked out from readings."""
        if method.rows == "prompts" or any(view.inputs or view.embeddings for view in once.values()):
            return []
        beside = wanted_beside(method.views())
        return [
            name
            for name, view in once.items()
            if view.model not in method.trains
            and name not in beside
            and all(quantity is reads.logprob for quantity in view.reads)
        ]

    def known(self, names: Sequence[str], batch: Batch) -> dict[str, dict[str, Tensor]] | None:
        """The readings of those views for all rows, or None where a row is new."""
        if not names or any(name not in self.rows for name in names):
            return None
        keys = row_keys(batch)
        if any(key not in self.rows[name] for name in names for key in keys):
            return None
        found = {}
        for name in names:
            values = torch.cat([self.rows[name][key] for key in keys])
            whole = torch.zeros(batch.mask.shape, dtype=values.dtype, device=batch.mask.device)
            whole[batch.mask] = values.to(whole.device)
            found[name] = {reads.logprob.name: whole}
        return found

    def keep(self, name: str, batch: Batch, values: Tensor, chosen: Sequence[int]) -> None:
        """Remember `values` [B, T] of a view for the rows `chosen`, those that were read, while there is room."""
        own, keys = self.rows.setdefault(name, {}), row_keys(batch)
        for row in chosen:
            key = keys[row]
            kept = values[row][batch.mask[row]].detach().cpu()
            if key in own or self.size + kept.nbytes + KEY > self.limit:
                continue
            own[key] = kept.clone()
            self.size += kept.nbytes + KEY

    def tensors(self) -> dict[str, Tensor]:
        """What to save, by name."""
        found: dict[str, Tensor] = {}
        for name, own in self.rows.items():
            if own:
                keys = torch.frombuffer(bytearray(b"".join(own)), dtype=torch.int64).view(-1, KEY // 8)
                sizes = torch.tensor([len(value) for value in own.values()])
                found |= {f"{name}:keys": keys.clone(), f"{name}:sizes": sizes, f"{name}:values": torch.cat(list(own.values()))}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self.rows, self.size = {}, 0
        for name in sorted({key.rpartition(":")[0] for key in tensors}):
            raw = tensors[f"{name}:keys"].contiguous().numpy().tobytes()
            pieces = tensors[f"{name}:values"].split(tensors[f"{name}:sizes"].tolist())
            keys = [raw[start : start + KEY] for start in range(0, len(raw), KEY)]
            self.rows[name] = {key: piece.clone() for key, piece in zip(keys, pieces, strict=True)}
            self.size += sum(piece.nbytes + KEY for piece in pieces)


__all__ = ["LIMIT", "Recall", "row_keys"]
