"""What follows from the log-probabilities a judge gives to its options: preferences, scores and agreements, as plain numbers.

Axes: `K` options or answers, `P` pairs.  Log-probabilities are natural and absolute: what they leave of 1 went to other tokens.

Sources: "RLAIF vs. RLHF", arXiv:2309.00267; "Constitutional AI: Harmlessness from AI Feedback", arXiv:2212.08073.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

__all__ = [
    "agreement",
    "among",
    "clamped",
    "debiased",
    "expectation",
    "mean_wins",
    "neither",
    "option_logprobs",
    "regularised",
    "scaled",
]


def option_logprobs(variants: Sequence[Sequence[Sequence[Hashable]]], logprobs: Sequence[Sequence[float]]) -> list[float]:
    """The log-probability of each option over its ways of being written, none counted twice.

    A way that begins another one (`1` begins `1 0` where digits are tokens of their own) counts only with what does not go on to
    it, so that the option "1" and the option "10" share no mass.

    Args:
        variants: K options, each its ways of being written as sequences of tokens; all different.
        logprobs: The log-probability of each of these sequences.

    Returns:
        `[K]`, `-inf` where nothing is left.

    Example:
        >>> [round(math.exp(x), 2) for x in option_logprobs([[("1",)], [("1", "0")]], [[math.log(0.5)], [math.log(0.2)]])]
        [0.3, 0.2]
    """
    mass = {tuple(way): math.exp(x) for ways, xs in zip(variants, logprobs, strict=True) for way, x in zip(ways, xs, strict=True)}
    own = dict(mass)
    for longer in sorted(mass, key=len):
        heads = [way for way in mass if len(way) < len(longer) and longer[: len(way)] == way]
        if heads:
            own[max(heads, key=len)] -= mass[longer]
    return [_log(sum(max(0.0, own[tuple(way)]) for way in ways)) for ways in variants]


def among(logprobs: Sequence[float]) -> list[float]:
    """The probabilities of the options among themselves, a softmax.  `[K] -> [K]`; adding a constant changes nothing.

    Raises:
        ValueError: No option has any mass.
    """
    top = max(logprobs)
    if top == -math.inf:
        raise ValueError("no option has any probability; expected at least one above 0")
    weights = [math.exp(x - top) for x in logprobs]
    total = sum(weights)
    return [weight / total for weight in weights]


def neither(logprobs: Sequence[float]) -> float:
    """The probability of everything that is not an option, in [0, 1]: much of it means a broken prompt."""
    return min(1.0, max(0.0, 1.0 - sum(math.exp(x) for x in logprobs)))


def debiased(first: float, swapped: float) -> float:
    """The probability that the first answer is better, with the two orders averaged.

    `0.5 [p(y1, y2) + 1 - p(y2, y1)]`: probabilities are averaged, not log-odds.  A judge that looks at the slot alone gives 0.5.

    Args:
        first: Probability of slot 1 when the first answer stands there.
        swapped: Probability of slot 1 when the second answer stands there.

    Source: arXiv:2309.00267, on position bias.
    """
    return 0.5 + 0.5 * (first - swapped)  # exactly 0.5 where both are the same


def clamped(p: float, low: float = 0.4, high: float = 0.6) -> float:
    """`p` moved into [low, high]: what reasoning before the verdict does to calibration.

    Source: arXiv:2212.08073, which clamps to 40-60 % where the judge reasons first.
    """
    return min(high, max(low, p))


def mean_wins(wins: Sequence[Sequence[float]]) -> list[float]:
    """The mean probability of each answer to beat the others, the diagonal left out.  `[K, K] -> [K]`, K at least 2."""
    return [sum(x for j, x in enumerate(row) if j != i) / (len(row) - 1) for i, row in enumerate(wins)]


def expectation(logprobs: Sequence[float], values: Sequence[float]) -> float:
    """The expected value of the options among themselves: `sum_i v_i P(i) / sum_i P(i)`.  `[K], [K] -> number`.

    Source: arXiv:2309.00267, direct RLAIF, with values 1 to 10.
    """
    return sum(p * value for p, value in zip(among(logprobs), values, strict=True))


def scaled(score: float, low: float = 1.0, high: float = 10.0) -> float:
    """A score in [low, high] as a number in [-1, 1]."""
    return 2.0 * (score - low) / (high - low) - 1.0


def regularised(reward: float, kl: float, beta: float) -> float:
    """`(1 - beta) r - beta KL`, what RLAIF maximises; over `1 - beta` it is `r - beta / (1 - beta) KL`.

    Source: arXiv:2309.00267.
    """
    return (1.0 - beta) * reward - beta * kl


def agreement(preferences: Sequence[float], chose_first: Sequence[bool]) -> float:
    """The share of pairs in which the more probable answer is the one that was chosen; an exact 0.5 agrees with neither.

    Source: arXiv:2309.00267, "AI labeler alignment".
    """
    agreed = [p != 0.5 and (p > 0.5) == bool(first) for p, first in zip(preferences, chose_first, strict=True)]
    return sum(agreed) / len(agreed)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
