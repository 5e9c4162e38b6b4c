"""Reading answers: where in a text the answer stands, and what number it is.  Nothing is evaluated.

>>> answer_in("<think>3 + 4</think><answer>7</answer>")
'7'
>>> number("$1,024.50"), number(r"\\frac{1}{2}"), number("2 apples")
(Fraction(2049, 2), Fraction(1, 2), None)
"""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["answer_in", "boxed_in", "is_percentage", "number", "parts_of_model_reward", "tag_in"]

_LONGEST = 64  # characters of a number; longer ones are not read
_LARGEST_POWER = 64  # of ten

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_PLAIN = re.compile(rf"([+-]?)({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,3}}))?")
_SLASH = re.compile(rf"([+-]?)({_DECIMAL})\s*/\s*({_DECIMAL})")
_FRAC = re.compile(r"([+-]?)\s*\\[dt]?frac\s*\{\s*([+-]?[0-9.,]+)\s*\}\s*\{\s*([+-]?[0-9.,]+)\s*\}")
_MIXED = re.compile(r"([+-]?)([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")


def tag_in(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>...</tag>`; None where the last `<tag>` is missing or not closed."""
    _, opened, rest = text.rpartition(f"<{tag}>")
    found, closed, _ = rest.partition(f"</{tag}>")
    return found.strip() if opened and closed else None


def boxed_in(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces matched; None where it is missing or not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start + len("\\boxed"), len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : at].strip()
    return None


def answer_in(text: str) -> str | None:
    r"""The answer of a text: in the last `<answer>`, else the last `\boxed{}`, else on the line after the last `####`.

    A tag that is opened and not closed is no answer, whatever else the text holds.
    """
    if "<answer>" in text:
        return tag_in(text, "answer")
    if "\\boxed{" in text:
        return boxed_in(text)
    _, marked, rest = text.rpartition("####")
    line = rest.strip().partition("\n")[0].strip()
    return line if marked and line else None


def is_percentage(text: str) -> bool:
    """Does a percent sign end it?"""
    return text.rstrip(" .$)\\").endswith("%")


def number(text: str) -> Fraction | None:
    r"""The exact number a text is, or None when it is anything else.

    Understood: signs, thousands' commas, decimals, powers of ten (`1.5e3`), `a/b`, `\frac{a}{b}`, `1 1/2`, a dollar,
        pound, euro or yen sign before it, a percent sign or degree sign after it (`50%` is 1/2), `$...$`, `\(...\)`,
        `\text{}`, `\boxed{}`. Words, sums and several numbers are not.
    """
    if len(text) > 2 * _LONGEST:
        return None
    text = text.strip().replace("\u2212", "-").replace("\\!", "").replace("\\,", "").replace("{,}", ",")
    for _ in range(2):
        text = _WRAPPED.sub(r"\1", text)
    for mark in ("\\(", "\\)", "\\[", "\\]", "\\$", "$", "^\\circ", "^{\\circ}", "\u00b0"):
        text = text.replace(mark, "")
    percent = is_percentage(text)
    text = text.strip().rstrip(".").rstrip().removesuffix("%").removesuffix("\\").strip()
    sign = text[:1] if text[:1] in ("+", "-") else ""
    text = sign + text[len(sign) :].lstrip("\u00a3\u20ac\u00a5 ")
    if not text or len(text) > _LONGEST or not text.isascii():
        return None
    found = _value(text)
    return found / 100 if percent and found is not None else found


def _value(text: str) -> Fraction | None:
    """A cleaned text as a number."""
    plain = _PLAIN.fullmatch(text)
    if plain:
        power = int(plain[3] or 0)
        return _signed(plain[1], _decimal(plain[2]) * Fraction(10) ** power) if abs(power) <= _LARGEST_POWER else None
    mixed = _MIXED.fullmatch(text)
    if mixed:
        return _signed(mixed[1], int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))) if int(mixed[4]) else None
    ratio = _SLASH.fullmatch(text) or _FRAC.fullmatch(text)
    if ratio:
        top, bottom = (_PLAIN.fullmatch(ratio[part]) for part in (2, 3))
        if top and bottom and _decimal(bottom[2]):
            value = _signed(top[1], _decimal(top[2])) / _signed(bottom[1], _decimal(bottom[2]))
            return _signed(ratio[1], value)
    return None


def _decimal(digits: str) -> Fraction:
    """Digits with commas and a point."""
    digits = digits.replace(",", "")
    return Fraction(("0" if digits[0] == "." else "") + digits.rstrip(".") if digits != "." else "0")


def _signed(sign: str, value: Fraction) -> Fraction:
    """The value, or its negative."""
    return -value if sign == "-" else value


def parts_of_model_reward(spec: str) -> tuple[str, str, str]:
    """A reward that a model gives, in parts: kind, the model's name, and what follows; empty texts for other rewards.

    A judge that is named in full (`local:`, `openai:`, a function of a file) is no model of a recipe.

    >>> parts_of_model_reward("model:rm*0.5"), parts_of_model_reward("judge:j?rating"), parts_of_model_reward("maths-exact")
    (('model', 'rm', '*0.5'), ('judge', 'j', '?rating'), ('', '', ''))
    """
    found = re.fullmatch(r"(model|judge):(?!local:|openai:)([^@*?]+)(.*)", spec.strip())
    return (found[1], found[2], found[3]) if found and ".py:" not in found[2] else ("", "", "")
