"""Random numbers that depend on a key alone: (seed, step, sample, position), never on who drew before.

A draw is a hash of its key, so a recompute draws the same, the composition of a batch does not matter, and nothing
has to be saved to restart.  Everything is 64-bit integer arithmetic: the same numbers on a CPU and on an accelerator.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

SAMPLER, ONE_TOKEN, NOISE, SWITCH = 0, 1, 2, 3
"""Streams: who draws.  Two that draw at the same key from different streams are independent."""

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15 - _WORD
_FIRST = 0xBF58476D1CE4E5B9 - _WORD
_SECOND = 0x94D049BB133111EB - _WORD


Word = TypeVar("Word", Tensor, int)
"""Keys a tensor at a time, or one that all of them share: the same 64 bits either way."""


def _wrapped(x: Word) -> Word:
    """An integer as an int64, by its lowest 64 bits; tensors wrap by themselves."""
    if isinstance(x, Tensor):
        return x
    return (x + _WORD // 2) % _WORD - _WORD // 2


def _shifted(x: Word, bits: int) -> Word:
    """The logical right shift of int64: the plain one copies the sign in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Word) -> Word:
    """The finaliser of splitmix64: every bit of the result hangs on every bit of `x`."""
    x = _wrapped((x ^ _shifted(x, 30)) * _FIRST)
    x = _wrapped((x ^ _shifted(x, 27)) * _SECOND)
    return x ^ _shifted(x, 31)


def _absorbed(state: Any, word: Word) -> Word:
    """The state (a tensor, or one integer) after one more word of the key; the order of words matters."""
    mixed: Word = _mixed(_mixed(_wrapped(word + _GOLDEN)) ^ _wrapped(state * 3))
    return _wrapped(mixed + _GOLDEN)


@lru_cache(maxsize=64)
def _begun(*words: int) -> int:
    """The state after words that all keys share."""
    state = 0
    for word in words:
        state = _absorbed(state, word)
    return state


def uniform(seed: int, step: int, index: Tensor, position: Tensor, draws: int = 1, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), one (or `draws`) for each key.

    The k-th draw of a key does not depend on `draws`: more draws only add to the right.

    Args:
        seed: The run's seed.
        step: The rollout or optimiser step.
        index: `[n]` int64, global number of the sample.
        position: `[n]` int64, token in the sample; broadcast against `index`.
        draws: Numbers for each key, at least 1.
        stream: Who draws, for instance `SAMPLER`.

    Returns:
        `[n]` float64, or `[n, draws]` when `draws` is above 1.  53 random bits each.

    Example:
        >>> keys = torch.arange(3)
        >>> torch.equal(uniform(0, 1, keys, keys)[2:], uniform(0, 1, keys[2:], keys[2:]))
        True

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), the mixing function.
    """
    state = _absorbed(_absorbed(_begun(seed, stream, step), index.to(torch.int64)), position.to(torch.int64))
    if draws > 1:
        counter = torch.arange(draws, device=state.device, dtype=torch.int64)
        state = state.unsqueeze(-1) + counter * _GOLDEN  # [n] -> [n, draws]
    return _shifted(_mixed(state), 11).to(torch.float64) * 2.0**-53


def single(seed: int, number: int, *, stream: int, step: int = 0) -> float:
    """One uniform number in [0, 1) for the `number`-th of something."""
    return float(uniform(seed, step, torch.tensor([number]), torch.tensor([0]), stream=stream))


def shuffled(seed: int, number: int, count: int, *, stream: int, step: int = 0) -> list[int]:
    """The places 0 to `count` - 1 in an order drawn for the `number`-th of something."""
    places = torch.arange(count)
    return list(uniform(seed, step, torch.full_like(places, number), places, stream=stream).argsort().tolist())


def categorical(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Draws from rows of probabilities by inversion.

    Args:
        probabilities: `[n, V]`, at least 0; each row is scaled to sum to 1.
        draws: `[n]` or `[n, K]` float64 in [0, 1), for instance from `uniform`.

    Returns:
        `[n]` or `[n, K]` int64 in `[0, V)`; never an entry of probability 0.
    """
    cumulative = probabilities.to(torch.float64).cumsum(-1)  # [n, V]
    total = cumulative[..., -1:]
    wanted = draws.to(torch.float64).reshape(*probabilities.shape[:-1], -1) * total  # [n, K]
    drawn = torch.searchsorted(cumulative, wanted, right=True)
    last = torch.searchsorted(cumulative, total.contiguous())  # [n, 1], the first entry that reaches the total
    return torch.minimum(drawn, last).reshape(draws.shape)
