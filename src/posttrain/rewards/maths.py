r"""Equality of mathematical answers: exact fractions for numbers, math-verify (an extra) for everything else.

>>> same_number("1/2", "0.5"), same_number("1,024", "1024"), same_number("50%", "0.5"), same_number("2 apples", "2")
(True, True, True, None)
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from dataclasses import dataclass
from typing import ClassVar

from posttrain.rewards.exact import same_text
from posttrain.rewards.parse import answer_in, is_percentage, number
from posttrain.rewards.reward import Answer
from posttrain.types import Crashed, Overlong, Score, Unparseable, Verdict, Wrong

__all__ = ["Maths", "MathsExact", "same_number"]

_LONGEST = 400  # characters of an expression that math-verify is given


def same_number(found: str, expected: str) -> bool | None:
    """Are two texts the same number, exactly?  None where either is no plain number.

    Where just one of the two is a percentage it is read both ways, so `50%` is the same as `0.5` and as `50`.
    """
    left, right = number(found), number(expected)
    if left is None or right is None:
        return None
    if is_percentage(found) == is_percentage(expected):
        return left == right
    percentage, other = (left, right) if is_percentage(found) else (right, left)
    return other in (percentage, 100 * percentage)


@dataclass(frozen=True)
class MathsExact:
    r"""1 where the answer is the same number as the row's `answer`, in exact fractions; nothing is evaluated.

    The answer is what `posttrain.rewards.parse.answer_in` finds.  An answer that is not one plain number is
    `Unparseable` when the row's is one; when it is not, the two are compared as cleaned text.  Linear in the text, so
    it may run inline.
    """

    key: str = "answer"
    """Which of the row's values is the right answer."""

    takes_list: ClassVar[bool] = False

    def __call__(self, answer: Answer) -> Verdict:
        found, expected = answer_in(answer.text), str(answer.info[self.key])
        if found is None or not found:
            return Overlong() if answer.finish == "length" else Unparseable(reason="no answer was found")
        same = same_number(found, expected)
        if same is None and number(expected) is not None:
            return Unparseable(reason="the answer is not one plain number")
        return Score(1.0) if (same_text(found, expected) if same is None else same) else Wrong()


@dataclass(frozen=True)
class Maths:
    r"""1 where the answer is mathematically equal to the row's `answer`: numbers exactly, the rest through math-verify.

    The answer is what `posttrain.rewards.parse.answer_in` finds; math-verify sees that alone, never the text around
    it.  It parses what a model wrote with SymPy, which evaluates: run it with `where="process"`.  An expression that
    it does not work out within `seconds` is `Crashed`, one longer than 400 characters `Unparseable`.  Without the
    extra (`pip install 'posttrain[maths]'`) this is `MathsExact`, and making one warns.
    """

    key: str = "answer"
    """Which of the row's values is the right answer, a number or LaTeX."""
    seconds: int = 5
    """How long math-verify may take for each of reading and comparing."""

    takes_list: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            warnings.warn(
                "math-verify is not installed, so only plain numbers and fractions are compared; "
                "for expressions: pip install 'posttrain[maths]'",
                stacklevel=3,
            )

    def prepare(self) -> None:
        """Import what takes long, before the first deadline starts."""
        if importlib.util.find_spec("math_verify") is not None:
            importlib.import_module("math_verify")
            logging.getLogger("math_verify").setLevel(logging.ERROR)

    def __call__(self, answer: Answer) -> Verdict:
        found, expected = answer_in(answer.text), str(answer.info[self.key])
        same = None if not found else same_number(found, expected)
        if not found or same is not None or importlib.util.find_spec("math_verify") is None:
            return MathsExact(self.key)(answer)
        if same_text(found, expected):
            return Score(1.0)
        if len(found) > _LONGEST:
            return Unparseable(reason=f"the answer is longer than {_LONGEST} characters")
        return self._verified(found, expected)

    def _verified(self, found: str, expected: str) -> Verdict:
        """What math-verify says."""
        library, errors = importlib.import_module("math_verify"), importlib.import_module("math_verify.errors")
        reads = [library.LatexExtractionConfig()]

        def read(text: str) -> list[object]:
            plain = text.strip().removeprefix("$").removesuffix("$")
            expressions: list[object] = library.parse(
                f"${plain}$", reads, fallback_mode="no_fallback", parsing_timeout=self.seconds, raise_on_error=True
            )
            return expressions

        gold = read(expected)
        if not gold:
            raise ValueError(f"math-verify cannot read the right answer {expected!r}")
        try:
            mine = read(found)
            if not mine:
                return Unparseable(reason="math-verify reads no expression")
            equal = library.verify(gold, mine, timeout_seconds=self.seconds, raise_on_error=True)
        except errors.TimeoutException:
            return Crashed(reason=f"not worked out within {self.seconds} s")
        except MemoryError:
            raise
        except Exception as error:
            return Unparseable(reason=f"math-verify: {type(error).__name__}: {str(error)[:200]}")
        return Score(1.0) if equal else Wrong()
