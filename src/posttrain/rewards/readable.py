"""Is a chain of thought written in one notation: language consistency, and what a reader would not follow.

The word problems know several notations for a calculation, as a multilingual model knows languages: `<<3*4=12>>12` is the one that
demonstrations write, `3 * 4 = 12`, `3 * 4 is 12` and `Multiply 3 by 4: 12` are others that the embedded base model has read.

>>> consistency("<think>He has <<3*4=12>>12. Then 12 - 2 = 10.</think><answer>10</answer>")
0.5
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from posttrain.rewards.format import keeps_tags
from posttrain.rewards.reward import Answer
from posttrain.types import Score, Verdict, Wrong

__all__ = ["Consistent", "Readable", "calculations", "chain_of", "consistency", "is_readable"]

_ONE = re.compile(r"<<([0-9]+)([-+*/])([0-9]+)=([0-9]+)>>\4(?![0-9])")
_OTHER = re.compile(
    r"\$?([0-9]+) ?([-+*/]) ?\$?([0-9]+) ?(?:=|is) ?\$?([0-9]+)"
    r"|(?:Add|Take|Multiply|Divide) ([0-9]+) (and|away from|by) ([0-9]+): ([0-9]+)"
)


def chain_of(text: str) -> str:
    """The thinking of an answer: what stands before `</think>`, else before `<answer>`, else all of it."""
    for end in ("</think>", "<answer>"):
        before, found, _ = text.partition(end)
        if found:
            return before.removeprefix("<think>")
    return text.removeprefix("<think>")


def calculations(chain: str) -> tuple[list[str], list[str]]:
    """The calculations of a chain of thought, right or wrong: those in the one notation, and those in any other."""
    one = [found[0] for found in _ONE.finditer(chain)]
    other = [found[0] for found in _OTHER.finditer(_ONE.sub(" ", chain))]
    return one, other


def consistency(text: str) -> float:
    """The share of a chain's calculations that are in the one notation, in [0, 1]; 0 for a chain without any.

    In place of DeepSeek-R1's share of words in the target language (arXiv:2501.12948, section 2.3.2); here the words are one
    language, and notations are what mixes.  That an empty chain is 0 rather than undefined is our choice.
    """
    one, other = calculations(chain_of(text))
    return len(one) / (len(one) + len(other)) if one or other else 0.0


def is_readable(text: str) -> bool:
    """Would a reader follow it: tags in order, one notation throughout, and no calculation made twice?

    In place of what DeepSeek-R1 sieves out of sampled chains, arXiv:2501.12948: mixed languages, long paragraphs, code blocks.
    """
    one, _ = calculations(chain_of(text))
    return keeps_tags(text) and consistency(text) == 1.0 and len(set(one)) == len(one)


@dataclass(frozen=True)
class Consistent:
    """The share of an answer's calculations in the one notation: DeepSeek-R1's reward for one language, arXiv 2501.12948."""

    takes_list: ClassVar[bool] = False

    def __call__(self, answer: Answer) -> float:
        return consistency(answer.text)


@dataclass(frozen=True)
class Readable:
    """1 where a reader would follow the answer: see `is_readable`."""

    takes_list: ClassVar[bool] = False

    def __call__(self, answer: Answer) -> Verdict:
        return Score(1.0) if is_readable(answer.text) else Wrong(reason="tags, notations or repeated calculations")
