"""Equality of the answer with the row's answer, after a little cleaning.

>>> same_text(" Forty  two.", "forty two")
True
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import ClassVar

from posttrain.rewards.parse import answer_in, number
from posttrain.rewards.reward import Answer
from posttrain.types import Overlong, Score, Unparseable, Verdict, Wrong

__all__ = ["Exact", "clean", "same_text"]


def clean(text: str) -> str:
    """Text with unicode forms, case and white space made alike, and full stops and quotes at the ends left out."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()
    return text.strip(" .\"'`")


def same_text(found: str, expected: str) -> bool:
    """Are the two the same after cleaning, or the same number (`1,024` is `1024.0`)?"""
    left, right = number(found), number(expected)
    if left is not None and right is not None:
        return left == right
    return bool(clean(expected)) and clean(found) == clean(expected)


@dataclass(frozen=True)
class Exact:
    """1 where the answer equals the row's `answer` as cleaned text or as a number.

    The answer is what `posttrain.rewards.parse.answer_in` finds: the last `<answer>`, else the last `\\boxed{}`, else
    what follows the last `####`; or the whole text with `whole`.
    """

    key: str = "answer"
    """Which of the row's values is the right answer: a string, a number, or a list of which any will do."""
    whole: bool = False
    """Compare the whole text, without looking for tags."""

    takes_list: ClassVar[bool] = False

    def __call__(self, answer: Answer) -> Verdict:
        found = answer.text if self.whole else answer_in(answer.text)
        if found is None or not found.strip():
            return Overlong() if answer.finish == "length" else Unparseable(reason="no answer was found")
        expected = answer.info[self.key]
        choices = expected if isinstance(expected, list) else [expected]
        return Score(1.0) if any(same_text(found, str(choice)) for choice in choices) else Wrong()
