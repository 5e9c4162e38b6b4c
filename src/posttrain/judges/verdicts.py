"""Verdicts that a judge wrote out: read from the end of its text or not at all.

>>> verdict_in("A: step 2 is wrong. [A] errs. [B]", ("A", "B"))
>>> verdict_in("[A] errs in step 2.\\n[B]", ("A", "B")), verdict_in("<think>Step 1: 7.</think><answer>yes</answer>", ("yes", "no"))
('B', 'yes')
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["verdict_alone", "verdict_in"]


def _marked(labels: Sequence[str]) -> str:
    either = "|".join(re.escape(label) for label in labels)
    return rf"<answer>\s*(?:{either})\s*</answer>|\[(?:{either})\]|\((?:{either})\)"


def verdict_in(text: str, labels: Sequence[str]) -> str | None:
    """The verdict that ends a text: one label as `[A]`, `(A)` or `<answer>A</answer>`, the only one on its line.

    A label named in passing, a last line that marks two, or a text that goes on after its verdict give None: a verdict is
    never guessed.
    """
    alone = verdict_alone(text, labels)
    if alone is None:
        return None
    return re.sub(r"^<answer>\s*|\s*</answer>$|^[\[(]|[\])]$", "", alone)


def verdict_alone(text: str, labels: Sequence[str]) -> str | None:
    """The verdict as it was written, marks included, without what stands before it."""
    lines = text.strip().splitlines()
    if not lines:
        return None
    found = list(re.finditer(_marked(labels), lines[-1].strip()))
    ended = lines[-1].strip().rstrip(".")
    return found[0].group() if len(found) == 1 and ended.endswith(found[0].group()) else None
