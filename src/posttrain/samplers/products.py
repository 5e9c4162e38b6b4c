"""The matrix product of a model's precision with its weights made ready once for many steps.

A trainer's weights change between two products, a sampler's do not: while one call of `sample` lasts, a bfloat16 copy (or
oneDNN's own layout) of each weight is kept.  The numbers are those of `models.gemm`, so sampler and trainer agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.models import gemm

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel


def prepared(model: LanguageModel) -> gemm.Linear:
    """The product of `model.precision`, for weights that stay as they are until it is dropped."""
    if model.precision == "bf16":
        return _Kept()
    return gemm.linear_of(model.precision)


class _Kept:
    """`gemm.bf16` with the bfloat16 copies kept."""

    def __init__(self) -> None:
        self._narrow: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the weight is kept so that its id stays its own

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = self._narrow.get(id(weight))
        if found is None:
            found = self._narrow[id(weight)] = (weight, weight.to(torch.bfloat16))
        out = functional.linear(x.to(torch.bfloat16), found[1]).to(x.dtype)
        return out if bias is None else out + bias


__all__ = ["prepared"]
