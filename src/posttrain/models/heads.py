"""Extra heads: one number a token, read from the last hidden state."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from posttrain.errors import CheckpointError

FILE = "heads.safetensors"


class ScalarHead(nn.Module):
    """A linear read-out of the hidden state: `[n, D] -> [n]`, in float32 at least."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))  # [D]
        self.bias = nn.Parameter(torch.zeros(()))  # []

    def forward(self, hidden: Tensor) -> Tensor:
        """`[n, D] -> [n]`."""
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        return wide @ self.weight.to(wide.dtype) + self.bias.to(wide.dtype)


def value_head(hidden_size: int) -> ScalarHead:
    """A critic's head: starts at zero, so that the first advantages are the returns themselves."""
    return ScalarHead(hidden_size)


def reward_head(hidden_size: int, *, seed: int = 0) -> ScalarHead:
    """A reward model's head: weights from a normal of variance `1 / (D + 1)`, bias 0.

    Source: Stiennon et al., "Learning to summarize from human feedback", arXiv 2009.01325, appendix B.1.
    """
    head = ScalarHead(hidden_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(hidden_size, generator=generator) * (hidden_size + 1) ** -0.5)
    return head


def save_heads(heads: nn.ModuleDict, folder: Path) -> None:
    """Write the heads beside a model, float32 or float64 as they are; nothing is written when there are none."""
    from safetensors.torch import save_file

    if len(heads):
        save_file({name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}, folder / FILE)


def load_heads(folder: Path) -> nn.ModuleDict:
    """The heads that were saved beside a model; empty when there are none.

    Raises:
        CheckpointError: The file does not hold heads.
    """
    from safetensors.torch import load_file

    heads = nn.ModuleDict()
    if not (folder / FILE).is_file():
        return heads
    tensors = load_file(folder / FILE)
    for key in sorted(tensors):
        name, _, part = key.rpartition(".")
        if part not in ("weight", "bias") or f"{name}.weight" not in tensors or tensors[f"{name}.weight"].ndim != 1:
            raise CheckpointError(f"{folder / FILE} holds '{key}'; expected <head>.weight [D] and <head>.bias []")
        if part == "weight":
            heads[name] = ScalarHead(tensors[key].shape[0]).to(tensors[key].dtype)
    heads.load_state_dict(tensors)
    return heads


__all__ = ["ScalarHead", "load_heads", "reward_head", "save_heads", "value_head"]
