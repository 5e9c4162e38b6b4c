"""How far annotators are of one mind, and whether where a response stands decides.

The unit is a pair of responses of one item, and a judgement one of three: the first is better, they are tied, the second
is better.  Which of two responses is called the first means nothing, so every table of judgements is averaged with its
mirror image; the marginals are then the same on both sides.  "All bad" counts as a tie of all.

    c, k    judgements       n_c   how often c was given, over all units with two judgements or more
    I       items            o_ck  coincidences: how often c and k met in a unit, each unit weighing as its judgements

Intervals come from resampling items, because the pairs of one item are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy

from posttrain.report.statistics import FEW, NAN, Interval, share_interval

Array = numpy.ndarray

RESAMPLES = 1000


@dataclass(frozen=True)
class Judged:
    """One ranking as the statistics read it."""

    item: int
    annotator: str
    places: Sequence[int]  # of each response by its own number; 0 is best, equal is tied
    shown: Sequence[int] | None = None  # the responses in the order of the page


def judgements(places: Sequence[int]) -> list[int]:
    """Every pair of responses: 0 the first is better, 1 tied, 2 the second is better.

    Example:
        >>> judgements([0, 2, 0])  # the pairs (0, 1), (0, 2), (1, 2)
        [0, 1, 2]
    """
    return [1 + (first > second) - (first < second) for first, second in combinations(places, 2)]


def disagreement(rankings: Sequence[Sequence[int]]) -> float:
    """How far the rankings of one item are apart, in [0, 1]: the mean over pairs of rankings and pairs of responses of 0
    (the same), 1/2 (one has them tied) or 1 (opposite).

    Example:
        >>> disagreement([[0, 1], [1, 0]]), disagreement([[0, 1], [0, 0]]), disagreement([[0, 1]])
        (1.0, 0.5, 0.0)
    """
    said = [judgements(places) for places in rankings]
    apart = [abs(x - y) / 2 for one, other in combinations(said, 2) for x, y in zip(one, other, strict=True)]
    return sum(apart) / len(apart) if apart else 0.0


# --------------------------------------------------------------------------------------------------------------
# Coefficients, of tables with any leading axes.


def nominal(counts: Array) -> Array:
    """`[..., C] -> [..., C, C]`: values differ or they do not."""
    size = counts.shape[-1]
    return numpy.broadcast_to(1.0 - numpy.eye(size), (*counts.shape, size))


def ordinal(counts: Array) -> Array:
    """`[..., C] -> [..., C, C]`: `(sum of n_g for g from c to k, less (n_c + n_k) / 2)^2`, what lies between two ranks."""
    upto = numpy.cumsum(counts, -1) - counts / 2
    return (upto[..., :, None] - upto[..., None, :]) ** 2


def krippendorff_alpha(coincidences: Array, distance: Callable[[Array], Array] = ordinal) -> Array:
    """Krippendorff's alpha: 1 is agreement, 0 is chance, below is systematic disagreement.

        alpha = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck

    Args:
        coincidences: `[..., C, C]`, symmetric; a unit with m judgements adds 1 / (m - 1) for each ordered pair of them.
        distance: `nominal` or `ordinal`.

    Returns:
        `[...]`; NaN where no two different values were given.

    Source: K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), sections C and E.
    """
    counts = coincidences.sum(-1)  # [..., C]
    apart = distance(counts)  # [..., C, C]
    chance = (counts[..., :, None] * counts[..., None, :] * apart).sum((-1, -2))
    seen = (coincidences * apart).sum((-1, -2))
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return numpy.where(chance > 0, 1 - (counts.sum(-1) - 1) * seen / chance, NAN)


def cohen_kappa(table: Array) -> Array:
    """Cohen's kappa of two annotators: `(p_o - p_e) / (1 - p_e)`.

    Args:
        table: `[..., C, C]`, how often one said the row and the other the column.

    Source: J. Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960).
    """
    total = table.sum((-1, -2))
    with numpy.errstate(invalid="ignore", divide="ignore"):
        seen = numpy.trace(table, axis1=-2, axis2=-1) / total
        chance = (table.sum(-1) * table.sum(-2)).sum(-1) / total**2
        return numpy.where(chance < 1, (seen - chance) / (1 - chance), NAN)


def fleiss_kappa(sums: Array) -> Array:
    """Fleiss' kappa of any number of annotators.

    Units may have different numbers of judgements m (at least two): the agreement within a unit is
    `(sum_c n_c^2 - m) / (m (m - 1))`, and the shares p_c are those of all judgements.  For equal m it is Fleiss' own.

    Args:
        sums: `[..., 2 + C]`: the sum of the units' agreements, the number of units, and how often each value was given.

    Source: J. L. Fleiss, "Measuring nominal scale agreement among many raters", Psychological Bulletin 76 (1971).
    """
    with numpy.errstate(invalid="ignore", divide="ignore"):
        seen = sums[..., 0] / sums[..., 1]
        shares = sums[..., 2:] / sums[..., 2:].sum(-1, keepdims=True)
        chance = (shares**2).sum(-1)
        return numpy.where(chance < 1, (seen - chance) / (1 - chance), NAN)


# --------------------------------------------------------------------------------------------------------------
# The tables of items.


def mirrored(table: Array) -> Array:
    """A `[..., 3, 3]` table of judgements averaged with that of the same pairs named the other way round."""
    return (table + table[..., ::-1, ::-1]) / 2


def unit_coincidences(counts: Array) -> Array:
    """`[U, C]` judgements of each unit -> `[C, C]`; units with fewer than two judgements are left out."""
    several = counts[counts.sum(-1) >= 2]  # [U', C]
    weight = 1 / (several.sum(-1) - 1)
    return numpy.einsum("u,uc,uk->ck", weight, several, several) - numpy.diag((weight[:, None] * several).sum(0))


def unit_sums(counts: Array) -> Array:
    """`[U, C]` judgements of each unit -> `[2 + C]`, see `fleiss_kappa`; units with fewer than two are left out."""
    several = counts[counts.sum(-1) >= 2]
    m = several.sum(-1)
    agreed = ((several**2).sum(-1) - m) / (m * (m - 1))
    return numpy.concatenate([[agreed.sum(), len(several)], several.sum(0)])


def _by_item(judged: Sequence[Judged]) -> dict[int, dict[str, Array]]:
    """Item -> annotator -> judgements `[U]`."""
    found: dict[int, dict[str, Array]] = {}
    for one in judged:
        found.setdefault(one.item, {})[one.annotator] = numpy.asarray(judgements(one.places))
    return found


def _counts(said: Mapping[str, Array]) -> Array:
    """Judgements of one item by annotator -> `[U, 3]`, how often each was given."""
    return (numpy.stack(list(said.values()))[:, :, None] == numpy.arange(3)).sum(0).astype(float)  # [A, U, 1] -> [U, 3]


def _interval(tables: Sequence[Array], coefficient: Callable[[Array], Array], seed: int) -> Interval:
    """A coefficient of the summed tables of items, with a percentile bootstrap over the items."""
    if not tables:
        return Interval(NAN, NAN, NAN, 0)
    stacked = numpy.stack(tables)  # [I, ...]
    value = float(coefficient(stacked.sum(0)))
    if len(tables) < FEW:
        return Interval(value, NAN, NAN, len(tables))
    random = numpy.random.default_rng(seed)
    times = random.multinomial(len(tables), numpy.full(len(tables), 1 / len(tables)), size=RESAMPLES)  # [R, I]
    drawn = coefficient((times @ stacked.reshape(len(tables), -1)).reshape(RESAMPLES, *stacked.shape[1:]))  # [R]
    drawn = drawn[numpy.isfinite(drawn)]
    if len(drawn) < RESAMPLES / 2 or drawn.min() == drawn.max():  # resampling says nothing
        return Interval(value, NAN, NAN, len(tables))
    low, high = numpy.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high), len(tables))


def alpha(judged: Sequence[Judged], *, seed: int = 0) -> Interval:
    """Krippendorff's ordinal alpha over pairs of responses; `n` counts items with two rankings or more."""
    shared = [said for said in _by_item(judged).values() if len(said) > 1]
    return _interval([mirrored(unit_coincidences(_counts(said))) for said in shared], krippendorff_alpha, seed)


def fleiss(judged: Sequence[Judged], *, seed: int = 0) -> Interval:
    """Fleiss' kappa over pairs of responses; `n` counts items with two rankings or more."""
    shared = [said for said in _by_item(judged).values() if len(said) > 1]
    tables = []
    for said in shared:
        counts = _counts(said)
        tables.append((unit_sums(counts) + unit_sums(counts[:, ::-1])) / 2)
    return _interval(tables, fleiss_kappa, seed)


def cohen(judged: Sequence[Judged], one: str, other: str, *, seed: int = 0) -> Interval:
    """Cohen's kappa of two annotators over pairs of responses; `n` counts the items that both ranked."""
    tables = []
    for said in _by_item(judged).values():
        if one in said and other in said:
            table = numpy.zeros((3, 3))
            numpy.add.at(table, (said[one], said[other]), 1.0)
            tables.append(mirrored(table))
    return _interval(tables, cohen_kappa, seed)


def first_wins(judged: Sequence[Judged], annotator: str) -> Interval:
    """Position bias: of two responses, how often the one that stood first on the page was placed higher.

    The mean over items of the share among an item's pairs that are not tied; 0.5 where position plays no part, because
    the order on the page is drawn for each item and annotator.  `n` counts items.
    """
    shares = []
    for one in judged:
        if one.annotator == annotator and one.shown is not None:
            said = [value for value in judgements([one.places[number] for number in one.shown]) if value != 1]
            if said:
                shares.append(sum(value == 0 for value in said) / len(said))
    return share_interval(shares)
