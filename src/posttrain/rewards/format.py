"""Does a text keep a format: the think and answer tags, or a pattern.

>>> keeps_tags("<think>3 + 4 = 7</think><answer>7</answer>")
True
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from posttrain.errors import ConfigError
from posttrain.rewards.reward import Answer
from posttrain.types import Overlong, Score, Verdict, Wrong

__all__ = ["Pattern", "ThinkAnswer", "keeps_tags"]

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def keeps_tags(text: str, *, opened: bool = False) -> bool:
    """Is a text `<think>...</think> <answer>...</answer>` and nothing else, each tag once, both filled?

    Args:
        text: The completion.
        opened: The prompt ended with `<think>` already, so the text starts within it.
    """
    text = ("<think>" + text if opened else text).strip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    thought, _, rest = text.removeprefix("<think>").partition("</think>")
    rest = rest.strip()
    if not (text.startswith("<think>") and rest.startswith("<answer>") and rest.endswith("</answer>")):
        return False
    given = rest.removeprefix("<answer>").removesuffix("</answer>")
    return bool(thought.strip() and given.strip())


@dataclass(frozen=True)
class ThinkAnswer:
    """1 where the text is `<think>...</think><answer>...</answer>` and nothing else, right or wrong.

    The format reward of DeepSeek-R1 (arXiv 2501.12948), which adds it to that for accuracy with equal weight.
    """

    opened: bool = False
    """The prompt's template ends with `<think>`."""

    takes_list: ClassVar[bool] = False

    def __call__(self, answer: Answer) -> Verdict:
        if keeps_tags(answer.text, opened=self.opened):
            return Score(1.0)
        return Overlong() if answer.finish == "length" else Wrong(reason="the tags are missing, doubled or out of place")


@dataclass(frozen=True)
class Pattern:
    """1 where the whole text matches a regular expression (`.` matches a new line too).

    A pattern can take exponential time on some texts: run it with `where="process"`.
    """

    pattern: str
    """A Python regular expression."""

    takes_list: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as cause:
            raise ConfigError(f"the pattern {self.pattern!r} is not a regular expression: {cause}") from cause

    def __call__(self, answer: Answer) -> Verdict:
        return Score(1.0) if re.fullmatch(self.pattern, answer.text.strip(), re.DOTALL) else Wrong()
