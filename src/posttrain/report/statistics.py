"""Means with intervals, pass@k, and paired differences: how a number of a run is said together with what it is worth.

Every interval has 95 % coverage unless said otherwise, and is a plain `Interval(value, low, high, n)`.  What is used
where:

- shares (every value 0 or 1): Wilson's score interval, which stays inside [0, 1] and keeps a width at 0 and 1;
- other means: Student's t interval, which needs no resampling and is wide where there are few values; left out of what a
  person is shown below `FEW` values, and cut to [0, 1] for means of shares;
- rewards of grouped samples: the t interval over the group means, because samples of one prompt are not independent;
- pass@k and differences of two models: percentile bootstrap over questions, with a seed of its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from posttrain.errors import ConfigError

NAN = float("nan")
FEW = 5
"""Independent values below which an interval of other means than shares of yes and no says nothing worth reading."""

MANY = 1_000
"""Degrees of freedom above which Student's t is taken from its expansion about the normal (error below 1e-9)."""


@dataclass(frozen=True)
class Interval:
    """A number and the interval it probably lies in.

    `low` and `high` are NaN where the data cannot say (one value that is no share; none at all).

    Example:
        >>> str(Interval(0.5, 0.40, 0.60, 96))
        '0.5 [0.4, 0.6] (n = 96)'
    """

    value: float
    low: float
    high: float
    n: int  # independent units behind it: samples, groups or questions

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"

    @property
    def known(self) -> bool:
        """Has it ends?"""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def worth_saying(self, *, share: bool = False) -> Interval:
        """Itself, without ends where fewer than `FEW` units are behind it, and with ends inside [0, 1] where it is a share.

        Example:
            >>> str(Interval(0.25, -0.1, 0.6, 8).worth_saying(share=True)), str(Interval(0.25, -2.9, 3.4, 2).worth_saying())
            ('0.25 [0, 0.6] (n = 8)', '0.25 [nan, nan] (n = 2)')
        """
        if self.n < FEW:
            return Interval(self.value, NAN, NAN, self.n)
        return Interval(self.value, max(0.0, self.low), min(1.0, self.high), self.n) if share and self.known else self


def proportion_interval(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """A share with Wilson's score interval.

    With p = successes / n and z the normal quantile:
    `(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`.

    Args:
        successes: Between 0 and `n`.
        n: Number of trials; 0 gives NaN.
        confidence: Coverage, in (0, 1).

    Raises:
        ConfigError: `successes` is outside [0, n].

    Example:
        >>> found = proportion_interval(8, 10)
        >>> round(found.low, 4), round(found.high, 4)
        (0.4902, 0.9433)

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if n == 0:
        return Interval(NAN, NAN, NAN, 0)
    if not 0 <= successes <= n:
        raise ConfigError(f"{successes} successes of {n}: expected a number between 0 and {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Interval(p, max(0.0, low), min(1.0, high), n)


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean of independent values: Wilson's interval when all are 0 or 1, Student's t interval otherwise.

    `mean +- t(n - 1) s / sqrt(n)` with s the sample standard deviation.  One value that is no share has no interval
    (NaN); a NaN among the values makes the mean NaN.

    Args:
        values: `[n]`, independent: one a question, not one a sample of the same question (see `clustered_interval`).
        confidence: Coverage, in (0, 1).

    Example:
        >>> found = mean_interval([1.0, 2.0, 3.0, 4.0])
        >>> found.value, round(found.low, 4), round(found.high, 4)
        (2.5, 0.4457, 4.5543)
    """
    n = len(values)
    if n == 0:
        return Interval(NAN, NAN, NAN, 0)
    if all(value in (0, 1) for value in values):
        return proportion_interval(float(sum(values)), n, confidence=confidence)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, NAN, NAN, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_quantile(0.5 + confidence / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def share_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean of shares, one a question: Wilson's interval when all are 0 or 1, else the t interval inside [0, 1].

    Below `FEW` questions with shares between 0 and 1 there is no interval (NaN).

    Args:
        values: `[n]` in [0, 1], independent.
        confidence: Coverage, in (0, 1).

    Example:
        >>> found = share_interval([0.0, 0.0, 0.0, 0.0, 0.0, 0.5])
        >>> round(found.value, 4), found.low, round(found.high, 4)
        (0.0833, 0.0, 0.2975)
    """
    found = mean_interval(values, confidence=confidence)
    return found if all(value in (0, 1) for value in values) else found.worth_saying(share=True)


def clustered_interval(values: Sequence[float], groups: Sequence[Hashable], *, confidence: float = 0.95) -> Interval:
    """The mean of values that come in groups, such as the rewards of several answers to each prompt.

    The value is the mean over all samples.  Answers to one prompt resemble each other, so the interval is the t
    interval of a ratio estimate over groups: with sums y_g and sizes m_g, residuals `y_g - mean m_g`, and G groups,
    `half = t(G - 1) sqrt(G / (G - 1) sum residual^2) / sum m_g`.  For groups of one size it is the t interval of the
    group means. Where all samples are 0, or all are 1, it is Wilson's interval with one trial a group.

    Args:
        values: `[n]`.
        groups: `[n]`, equal within a group.
        confidence: Coverage, in (0, 1).

    Raises:
        ConfigError: The two lengths differ.

    Source: W. G. Cochran, "Sampling Techniques", 3rd ed. (1977), section 9A on clusters of unequal sizes.
    """
    if len(values) != len(groups):
        raise ConfigError(f"{len(values)} values and {len(groups)} group labels: expected one label a value")
    if not values:
        return Interval(NAN, NAN, NAN, 0)
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    count = len(members)
    mean = math.fsum(values) / len(values)
    if mean in (0, 1) and all(value == mean for value in values):
        return proportion_interval(mean * count, count, confidence=confidence)
    if count == 1:
        return Interval(mean, NAN, NAN, 1)
    squares = math.fsum((math.fsum(group) - mean * len(group)) ** 2 for group in members.values())
    error = math.sqrt(squares * count / (count - 1)) / len(values)
    half = student_quantile(0.5 + confidence / 2, count - 1) * error
    return Interval(mean, mean - half, mean + half, count)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k answers is right, estimated without bias from n answers of which `correct` are.

    `1 - C(n - c, k) / C(n, k)`, with exact integers.

    Raises:
        ConfigError: k is not in 1..n, or `correct` not in 0..n.

    Example:
        >>> pass_at_k(10, 3, 1), round(pass_at_k(10, 3, 5), 4)
        (0.3, 0.9167)

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= n:
        raise ConfigError(f"pass@{k} from {n} answers: k must lie between 1 and the number of answers; sample at least {k}")
    if not 0 <= correct <= n:
        raise ConfigError(f"{correct} right answers of {n}: expected a number between 0 and {n}")
    total = math.comb(n, k)
    return (total - math.comb(n - correct, k)) / total


def pass_at_k_interval(counts: Sequence[tuple[int, int]], k: int, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean pass@k over questions, with an interval from resampling the questions.

    Where every question gives exactly 0 or 1 (k = n = 1, or none solved), it is Wilson's interval; below `FEW` other
    questions there is none (NaN).

    Args:
        counts: One `(answers, right answers)` a question.
        k: See `pass_at_k`.
        resamples: Bootstrap draws.
        seed: Of the bootstrap alone.
    """
    chances = [pass_at_k(n, correct, k) for n, correct in counts]
    found = bootstrap_interval(chances, resamples=resamples, seed=seed)
    return found if all(chance in (0, 1) for chance in chances) else found.worth_saying()


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean with a percentile bootstrap interval; Wilson's where all values are 0 or 1.

    Args:
        values: `[n]`, one a question.
        confidence: Coverage, in (0, 1).
        resamples: Draws of n values with replacement.
        seed: Of this bootstrap alone.

    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    if len(values) < 2 or all(value in (0, 1) for value in values):
        return mean_interval(values, confidence=confidence)
    return _resampled(values, confidence, resamples, seed)


def paired_difference(
    before: Mapping[str, float | Sequence[float]],
    after: Mapping[str, float | Sequence[float]],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """How much `after` is above `before` on the same questions, with an interval from resampling the questions.

    Pairing removes the difficulty of the questions from the interval, so a difference shows with far fewer of them.
    Only questions present on both sides count; `n` is their number.

    Args:
        before: Question id -> its score, or the scores of several answers (their mean is taken).
        after: The same for the other model.
        confidence: Coverage, in (0, 1).
        resamples: Bootstrap draws.
        seed: Of this bootstrap alone.

    Raises:
        ConfigError: No question occurs on both sides.
    """
    common = [question for question in before if question in after]
    if not common:
        raise ConfigError("the two sides have no question in common: a paired difference needs the same question ids")
    differences = [_mean(after[question]) - _mean(before[question]) for question in common]
    if len(differences) == 1:
        return Interval(differences[0], NAN, NAN, 1)
    return _resampled(differences, confidence, resamples, seed)


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with an integer number of degrees of freedom.

    By bisection of the finite series of the distribution function; from `MANY` degrees of freedom on by Fisher's
    expansion about the normal quantile.

    Raises:
        ConfigError: `probability` is outside (0, 1), or `freedom` is below 1.

    Example:
        >>> round(student_quantile(0.975, 10), 4)
        2.2281

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.3, 26.7.4 and 26.7.5.
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ConfigError(f"Student's t at {probability} with {freedom} degrees of freedom: expected (0, 1) and at least 1")
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)
    return _upper_quantile(probability, freedom)


@lru_cache(maxsize=4096)
def _upper_quantile(probability: float, freedom: int) -> float:
    if freedom >= MANY:
        z = NormalDist().inv_cdf(probability)
        first = (z**3 + z) / 4
        second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        return z + first / freedom + second / freedom**2
    inside = 2 * probability - 1  # P(|t| < quantile)
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom))
    for _ in range(80):
        middle = (low + high) / 2
        if _within(middle, freedom) < inside:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|t| < tan(angle) sqrt(freedom)), Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    power, factor, total = (cosine, 1.0, 0.0) if odd else (1.0, 1.0, 0.0)
    for index in range((freedom - 1) // 2 if odd else freedom // 2):
        total += factor * power
        power *= cosine * cosine
        factor *= (2 * index + 2) / (2 * index + 3) if odd else (2 * index + 1) / (2 * index + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _mean(scores: float | Sequence[float]) -> float:
    if isinstance(scores, Sequence):
        return math.fsum(scores) / len(scores) if scores else NAN
    return float(scores)


def _resampled(values: Sequence[float], confidence: float, resamples: int, seed: int) -> Interval:
    """Percentile bootstrap of the mean of at least two values."""
    import numpy

    data = numpy.asarray(values, dtype=numpy.float64)  # [n]
    random = numpy.random.default_rng(seed)
    chunk = max(1, 1_000_000 // len(data))  # draws at a time: bounds the indices to 8 MB
    parts = []
    for start in range(0, resamples, chunk):
        rows = random.integers(0, len(data), size=(min(chunk, resamples - start), len(data)))  # [chunk, n]
        parts.append(data[rows].mean(-1))
    means = numpy.concatenate(parts)  # [resamples]
    low, high = numpy.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(data.mean()), float(low), float(high), len(data))
