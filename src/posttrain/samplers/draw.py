"""How one token is drawn from the logits of each row: by inversion, with one uniform number a row.

A row's draw depends on its own logits and its own uniform number alone, so neither the order of rows nor their number
matters.  Log-probabilities come out of the same pass.  Axes: `n` rows, `V` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.types import Sampling

BLOCK = 128
"""Entries that are summed before the running sum, where a vocabulary is large."""
LARGEST = 1 - 2.0**-52
"""Of the uniform numbers: times a total it is below the total."""
LARGE = 4096
"""Vocabulary from which the running sum goes over blocks: a running sum is serial, a sum is not."""


class Drawn(NamedTuple):
    """What was drawn for `n` rows."""

    tokens: Tensor  # [n] int64; -1 where the logits were not finite
    logprobs: Tensor  # [n] float, at the temperature, before truncation; at temperature 1 when greedy
    sampled_logprobs: Tensor  # [n] float, after truncation: the probability of this draw; 0 when greedy


def check(sampling: Sampling) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ConfigError: A value is outside its range.
    """
    if not sampling.greedy and not 0.0 < sampling.temperature < float("inf"):
        raise ConfigError(
            f"temperature is {sampling.temperature}, but must be above 0; for the most likely token write greedy=True"
        )
    if not 0.0 < sampling.top_p <= 1.0:
        raise ConfigError(f"top_p is {sampling.top_p}, but must be in (0, 1]; 1 keeps every token")
    if sampling.top_k < 0:
        raise ConfigError(f"top_k is {sampling.top_k}, but must be 0 (off) or the number of tokens to keep")
    if sampling.max_tokens < 1:
        raise ConfigError(f"max_tokens is {sampling.max_tokens}, but must be at least 1")
    if any(not text for text in sampling.stop):
        raise ConfigError("a stop string is empty, and would stop before the first token; remove it")


def invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from rows of weights by inverting their running sum.

    The draw is the first entry whose running sum is above `u * total`, and the total is never reached: an entry of
    weight 0 cannot be drawn, whatever the rounding.

    Args:
        weights: `[n, V]` float, at least 0, not scaled to sum to 1.
        uniforms: `[n]` float64 in [0, 1).

    Returns:
        `[n]` int64 entries, and `[n]` float64 totals.  Where a total is not finite or 0 the entry means nothing.
    """
    rows, vocabulary = weights.shape
    uniforms = uniforms.clamp(max=LARGEST)
    if vocabulary < LARGE:
        running = weights.cumsum(-1, dtype=torch.float64)  # [n, V]
        total = running[:, -1]
        wanted = uniforms * total
        return torch.searchsorted(running, wanted[:, None], right=True)[:, 0], total
    blocks = -(-vocabulary // BLOCK)
    if blocks * BLOCK != vocabulary:
        padded = weights.new_zeros(rows, blocks * BLOCK)
        padded[:, :vocabulary] = weights
        weights = padded
    cut = weights.view(rows, blocks, BLOCK)
    running = cut.sum(-1).cumsum(-1, dtype=torch.float64)  # [n, blocks]
    total = running[:, -1]
    wanted = uniforms * total
    block = torch.searchsorted(running, wanted[:, None], right=True).clamp_(max=blocks - 1)  # [n, 1]
    before = torch.where(block > 0, running.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = cut.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(-1, dtype=torch.float64)  # [n, BLOCK]
    left = _below((wanted[:, None] - before).clamp_(min=0.0), inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, left, right=True))[:, 0], total


def _below(value: Tensor, bound: Tensor) -> Tensor:
    """`value`, or the number next below `bound` where it is not below it."""
    return torch.minimum(value, torch.nextafter(bound, torch.zeros_like(bound)))


def truncate(weights: Tensor, sampling: Sampling) -> Tensor:
    """The weights with everything outside top-k, then outside top-p of what is left, set to 0.

    Top-p keeps the fewest most likely tokens whose probabilities sum to at least `top_p`.  Tokens as likely as the last
    one kept are kept too, so that nothing depends on the order in which equals are sorted.

    Args:
        weights: `[n, V]` float, at least 0.
        sampling: `top_k` and `top_p` are read.

    Returns:
        `[n, V]`.
    """
    vocabulary = weights.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        least = weights.topk(sampling.top_k, dim=-1).values[:, -1:]  # [n, 1]
        weights = torch.where(weights >= least, weights, 0.0)
    if sampling.top_p < 1.0:
        weights = torch.where(weights >= _nucleus(weights, sampling.top_p), weights, 0.0)
    return weights


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """`[n, 1]`: the least weight that top-p keeps."""
    mass = weights.sum(-1, keepdim=True, dtype=torch.float64) * top_p  # [n, 1]
    vocabulary = weights.shape[-1]
    for count in sorted({min(256, vocabulary), vocabulary}):
        ordered = weights.topk(count, dim=-1).values  # [n, count], most likely first
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        kept = (before < mass).sum(-1, keepdim=True)  # [n, 1], at least 1
        if count == vocabulary or bool((kept < count).all()):
            break
    return ordered.gather(1, (kept - 1).clamp_(min=0))


def draw(logits: Tensor, uniforms: Tensor | None, sampling: Sampling) -> Drawn:
    """One token a row.

    Args:
        logits: `[n, V]` float32 or float64.
        uniforms: `[n]` float64 in [0, 1); not read when greedy.
        sampling: Temperature, truncation, greedy.

    Returns:
        Tokens, and their log-probabilities before and after truncation.
    """
    if sampling.greedy:
        best = logits.max(-1)
        logprobs = best.values - logits.logsumexp(-1)
        return Drawn(torch.where(logprobs.isfinite(), best.indices, -1), logprobs, torch.zeros_like(logprobs))
    assert uniforms is not None
    scaled = logits if sampling.temperature == 1.0 else logits / sampling.temperature
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    if not sampling.truncated:
        entries, total = invert(weights, uniforms)
        tokens = torch.where(total.isfinite(), entries, -1)
        logprobs = _logprobs(scaled, top, tokens, total)
        return Drawn(tokens, logprobs, logprobs)
    entries, kept = invert(truncate(weights, sampling), uniforms)
    total = weights.sum(-1, dtype=torch.float64)
    tokens = torch.where(total.isfinite(), entries, -1)
    return Drawn(tokens, _logprobs(scaled, top, tokens, total), _logprobs(scaled, top, tokens, kept))


def _logprobs(scaled: Tensor, top: Tensor, tokens: Tensor, total: Tensor) -> Tensor:
    """`log(weight / total)` of the drawn entries, `[n]`, in the type of the logits."""
    own = scaled.gather(1, tokens.clamp(min=0)[:, None]) - top
    return own[:, 0] - total.log().to(scaled.dtype)


__all__ = ["BLOCK", "Drawn", "check", "draw", "invert", "truncate"]
