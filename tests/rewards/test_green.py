"""GREEN and LC-GREEN by hand."""

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.green import green, length_controlled


@pytest.mark.parametrize(("matched", "errors", "wanted"), [(4, 2, 0.666667), (3, 2, 0.6), (5, 0, 1.0), (0, 3, 0.0), (0, 0, 0.0)])
def test_green(matched, errors, wanted) -> None:
    assert green(matched, errors) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("score", "words", "wanted"), [(2 / 3, 100, 0.666667), (2 / 3, 200, 0.333333), (2 / 3, 50, 0.666667), (0.328, 150, 0.218667)]
)
def test_length_controlled(score, words, wanted) -> None:
    found = length_controlled(score, words=words, reference_words=100)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert found <= score


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        green(-1, 0)
    with pytest.raises(ConfigError, match="reference"):
        length_controlled(0.5, words=3, reference_words=0)
