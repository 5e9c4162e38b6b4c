"""Equality of the last number of a text with the row's answer, whatever stands around it.

>>> last_number("... so 1,234 apples. Answer 1,234."), last_number("none at all")
(Fraction(1234, 1), None)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from posttrain.rewards.parse import number
from posttrain.rewards.reward import Answer
from posttrain.types import Overlong, Score, Unparseable, Verdict, Wrong

__all__ = ["LastNumber", "last_number"]

_NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:\.[0-9]+)?")
_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9])")
_LONGEST = 64  # characters of a number; a longer one is not read


def last_number(text: str) -> Fraction | None:
    """The last number of a text, commas between digits left out; None where it has none, or one longer than 64 characters."""
    found = _NUMBER.findall(_COMMA.sub("", text))
    return Fraction(found[-1]) if found and len(found[-1]) <= _LONGEST else None


@dataclass(frozen=True)
class LastNumber:
    """1 where the last number of the text is the row's `answer`; an answer that was cut has earned nothing, right or not.

    It asks for no format.  Source: the GSM8K verifier of Tulu 3, arXiv:2411.15124, with numbers compared exactly.
    """

    key: str = "answer"
    """Which of the row's values is the right answer."""

    takes_list: ClassVar[bool] = False

    def __call__(self, answer: Answer) -> Verdict:
        if answer.finish == "length":
            return Overlong()
        found, expected = last_number(answer.text), number(str(answer.info[self.key]))
        if found is None:
            return Unparseable(reason="there is no number")
        return Score(1.0) if found == expected else Wrong()
