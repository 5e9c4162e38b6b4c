"""Agreement: published examples, tables worked out by hand, and what must hold."""

from __future__ import annotations

import math
import random

import numpy
import pytest

from posttrain.annotate.agreement import (
    Judged,
    alpha,
    cohen,
    cohen_kappa,
    disagreement,
    first_wins,
    fleiss,
    fleiss_kappa,
    judgements,
    krippendorff_alpha,
    mirrored,
    nominal,
    ordinal,
    unit_coincidences,
    unit_sums,
)

KRIPPENDORFF = ["1233214 12   ", "1233224 125 3", " 333234 2251 ", "1233244 1251 "]
"""Four observers, from section C of the paper; a blank is no judgement, and a column of blanks no unit."""


def counts_of(observers: list[str], values: str) -> numpy.ndarray:
    """`[U, C]`."""
    columns = zip(*(line.ljust(13) for line in observers), strict=True)
    return numpy.array([[column.count(value) for value in values] for column in columns], dtype=float)


def test_alpha_of_krippendorffs_own_example() -> None:
    coincidences = unit_coincidences(counts_of(KRIPPENDORFF, "12345"))
    assert coincidences.sum() == 40  # pairable values
    assert round(float(krippendorff_alpha(coincidences, nominal)), 3) == 0.743
    assert round(float(krippendorff_alpha(coincidences, ordinal)), 3) == 0.815


def test_kappa_of_fleiss_by_the_well_known_table() -> None:
    table = "0 0 0 0 14;0 2 6 4 2;0 0 3 5 6;0 3 9 2 0;2 2 8 1 1;7 7 0 0 0;3 2 6 3 0;2 5 3 2 2;6 5 2 1 0;0 2 2 3 7"
    counts = numpy.array([[float(x) for x in line.split()] for line in table.split(";")])
    assert round(float(fleiss_kappa(unit_sums(counts))), 3) == 0.210


def test_kappa_of_cohen_by_hand() -> None:
    # 50 cases: 20 and 15 alike; p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    assert float(cohen_kappa(numpy.array([[20.0, 5.0], [10.0, 15.0]]))) == pytest.approx(0.4)


def test_judgements_and_disagreement_by_hand() -> None:
    assert judgements([1, 0, 1, 2]) == [2, 1, 0, 0, 0, 0]
    assert disagreement([[0, 1, 2], [2, 1, 0]]) == 1
    assert disagreement([[0, 1, 2], [0, 0, 0]]) == 0.5
    assert disagreement([[0, 1], [0, 1], [1, 0]]) == pytest.approx(2 / 3)
    assert disagreement([]) == 0


def test_alpha_of_pairs_by_hand() -> None:
    # Five items of two responses; both say the same on four. Mirrored coincidences: o = [[4, 0, 1], [0, 0, 0], [1, 0, 4]],
    # n = (5, 0, 5), ordinal distance of the ends 25: alpha = 1 - 9 * (2 * 25) / (2 * 25 * 25) = 0.64.
    places = [([0, 1], [0, 1]), ([1, 0], [1, 0]), ([0, 1], [0, 1]), ([0, 1], [0, 1]), ([0, 1], [1, 0])]
    said = [Judged(item, name, both[who]) for item, both in enumerate(places) for who, name in enumerate(("ada", "ben"))]
    assert alpha(said).value == pytest.approx(0.64)
    assert cohen(said, "ada", "ben").value == pytest.approx(0.6)  # p_o = 0.8, p_e = 0.5 whatever way round the pairs are named
    assert fleiss(said).value == pytest.approx(0.6)
    assert alpha(said).n == 5


def crowd(noise: float, *, items: int = 60, responses: int = 3, people: int = 3, seed: int = 0) -> list[Judged]:
    """Annotators who see the same order through noise."""
    draw = random.Random(seed)
    said = []
    for item in range(items):
        truth = [draw.random() for _ in range(responses)]
        for name in range(people):
            seen = [value + draw.gauss(0, noise) for value in truth]
            places = [sorted(seen).index(value) for value in seen]
            said.append(Judged(item, f"p{name}", places, draw.sample(range(responses), responses)))
    return said


def test_one_mind_is_one_and_none_is_zero() -> None:
    same = crowd(0.0)
    assert alpha(same).value == fleiss(same).value == cohen(same, "p0", "p1").value == pytest.approx(1)
    assert math.isnan(alpha(same).low)  # resampling says nothing here
    chance = crowd(1e6)
    for found in (alpha(chance), fleiss(chance), cohen(chance, "p0", "p1")):
        assert found.low < 0 < found.high
        assert abs(found.value) < 0.15
    some = crowd(0.2)
    assert 0.3 < alpha(some).low < alpha(some).value < alpha(some).high < 1


def test_names_of_responses_do_not_matter() -> None:
    said = crowd(0.3)
    turned = [Judged(one.item, one.annotator, one.places[::-1] if one.item % 3 else one.places) for one in said]
    assert alpha(said).value == pytest.approx(alpha(turned).value)
    assert fleiss(said).value == pytest.approx(fleiss(turned).value)
    assert cohen(said, "p0", "p2").value == pytest.approx(cohen(turned, "p0", "p2").value)
    table = numpy.array([[3.0, 1, 0], [0, 2, 1], [4, 0, 5]])
    assert (mirrored(table) == mirrored(table[::-1, ::-1])).all()


def test_intervals_cover() -> None:
    """The interval of alpha contains the value of a large crowd about 19 times of 20."""
    truth = alpha(crowd(0.3, items=4000, seed=99)).value
    inside = sum(found.low <= truth <= found.high for found in (alpha(crowd(0.3, seed=seed)) for seed in range(60)))
    assert inside >= 51  # 57 expected; 51 is 3.6 standard deviations below


def test_no_data_is_nan_and_few_items_have_no_interval() -> None:
    assert math.isnan(alpha([]).value)
    assert math.isnan(alpha([Judged(0, "ada", [0, 1])]).value)
    assert math.isnan(cohen([Judged(0, "ada", [0, 1])], "ada", "ben").value)
    assert not alpha(crowd(0.3, items=4)).known
    ties = [Judged(item, name, [0, 0]) for item in range(9) for name in ("ada", "ben")]
    assert math.isnan(alpha(ties).value)  # one value only: no chance to disagree


def test_position_bias() -> None:
    def judged(item: int, first: bool) -> Judged:
        shown = [1, 0] if item % 2 else [0, 1]
        places = [0, 0]
        places[shown[1 if first else 0]] = 1
        return Judged(item, "ada", places, shown)

    said = [judged(item, first=item < 15) for item in range(20)]
    found = first_wins(said, "ada")
    assert (found.value, found.n) == (0.75, 20)
    assert (round(found.low, 4), round(found.high, 4)) == (0.5313, 0.8881)  # Wilson's for 15 of 20
    tied = Judged(20, "ada", [0, 0], [0, 1])
    unknown = Judged(21, "ada", [0, 1])
    assert first_wins([*said, tied, unknown], "ada").n == 20
    three = first_wins([Judged(0, "ben", [0, 1, 2], [0, 2, 1])], "ben")
    assert three.value == pytest.approx(2 / 3)
    assert math.isnan(first_wins(said, "nobody").value)
