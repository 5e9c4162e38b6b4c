"""Where the steps of a worked answer end, in tokens, and the label of each.

A label belongs to the last token that holds some of the step's own text: what separates steps may share a token with the
step before it or the one after, but no token may hold text of two steps.  The text is tokenised once, as everywhere.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.data.placing import Rendering

__all__ = ["SEPARATOR", "as_label", "joined", "label_column", "step_columns", "tokens_of_steps", "written_ends"]

SEPARATOR = "\n"
"""What stands between two steps where a row does not say."""


def as_label(value: Any, place: str) -> float:
    """A label as a number in [0, 1]; NaN, which is no label, for None and NaN.

    Raises:
        DataError: It is something else.  -1 is refused: it is "wrong" in one convention (ratings -1, 0, +1, which
            `formulas.steps.labels_of_ratings` converts) and "no label" in another.

    Example:
        >>> as_label(True, "step 0"), as_label(0.25, "step 1"), as_label(None, "step 2")
        (1.0, 0.25, nan)
    """
    if value is None:
        return math.nan
    if isinstance(value, bool | int | float) and (math.isnan(value) or 0 <= value <= 1):
        return float(value)
    rated = "; ratings of -1, 0 and 1 become labels with posttrain.formulas.steps.labels_of_ratings" if value == -1 else ""
    raise DataError(f"the label of {place} is {value!r}; expected a number from 0 (wrong) to 1 (right), or null for none{rated}")


def joined(row: Mapping[str, Any], column: str = "steps") -> str:
    """The completion of a row in steps: the steps with the row's `separator` between them.

    Raises:
        DataError: The steps or their separator are not texts, or a step is blank.
    """
    steps, separator = row[column], row.get("separator", SEPARATOR)
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise DataError(f"'{column}' is {type(steps).__name__} {str(steps)[:60]!r}; expected a list of strings, one a step")
    if not isinstance(separator, str):
        raise DataError(f"'separator' is {separator!r}; expected a string, which may be empty")
    blank = [number for number, step in enumerate(steps) if not step.strip()]
    if blank:
        raise DataError(f"step {blank[0]} of '{column}' is blank, so no token could carry its label; expected text: leave it out")
    return separator.join(steps)


def tokens_of_steps(page: Rendering, message: int, steps: Sequence[str], separator: str) -> list[int]:
    """`[K]`: the place in the rendered tokens of the one that ends each step.

    Args:
        page: A rendered conversation.
        message: The message whose content is the steps with `separator` between them.
        steps: K texts.
        separator: What stands between two of them.

    Raises:
        DataError: The template rewrites the content (white space aside), or a token holds text of two steps.
    """
    answer = next(found for found in page.answers() if found.message == message)
    end = page.encoded.ends[answer.last - 1] if answer.last > answer.first else answer.begin
    places = [c for c in range(answer.begin, end) if not page.text[c].isspace()]
    written = "".join(page.text[c] for c in places).rfind("".join(separator.join(steps).split()))
    if written < 0:
        raise DataError("the chat template rewrites this answer, so its steps cannot be found; give a template that keeps it")
    between = len("".join(separator.split()))
    ends, reached = [], written  # solid characters of the answer up to the end of each step
    for step in steps:
        reached += len("".join(step.split()))
        ends.append(reached)
        reached += between
    encoded, found = page.encoded, []
    for number, end in enumerate(ends):
        token = bisect_right(encoded.starts, places[end - 1]) - 1
        following = end + between
        if number + 1 < len(steps) and places[following] < encoded.ends[token]:
            near = encoded.text[encoded.starts[token] : encoded.ends[token]]
            raise DataError(f"the token {near!r} holds text of steps {number} and {number + 1}; expected another separator")
        found.append(token)
    last = [count - 1 for count in accumulate(len(encoded.plain.get(t, (0,))) for t in range(len(encoded.ids)))]
    return [last[token] for token in found]


def written_ends(tokens: Sequence[int], ends: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """`[K]`: the token that completes each step of an answer that a policy wrote, without tokenising its text again.

    Args:
        tokens: The answer's tokens, `[n]`.
        ends: For each step, one past its last character in `decode(tokens)`, rising.
        decode: Tokens to text, control tokens included (`Renderer.decode`).

    Raises:
        DataError: A step ends outside the text, or two steps end in one token.

    Example:
        >>> written_ends([3, 4, 5], [3, 5], lambda ids: "".join({3: "1+", 4: "1", 5: "=2"}[i] for i in ids))
        [1, 2]
    """
    text = decode(tokens)
    found: list[int] = []
    for number, end in enumerate(ends):
        if not 0 < end <= len(text):
            raise DataError(f"step {number} ends at character {end} of a text of {len(text)}; expected a place within it")
        count = bisect_left(range(1, len(tokens) + 1), end, key=lambda n: len(decode(tokens[:n]))) + 1
        while count < len(tokens) and decode(tokens[:count])[:end] != text[:end]:  # in the middle of a character
            count += 1
        if found and count - 1 <= found[-1]:
            raise DataError(f"steps {number - 1} and {number} end in one token; expected at least one token a step")
        found.append(count - 1)
    return found


def step_columns(length: int, ends: Sequence[int], labels: Sequence[Any]) -> dict[str, list[float]]:
    """`step_end` and `step_label`, `[T]` each, of a sample of `length` tokens whose steps end at the tokens `ends`.

    Raises:
        DataError: There is not one label a step, or one is not in [0, 1].
    """
    if len(labels) != len(ends):
        raise DataError(f"there are {len(labels)} labels for {len(ends)} steps; expected one a step, null where there is none")
    end, label = [0.0] * length, [math.nan] * length
    for number, (place, value) in enumerate(zip(ends, labels, strict=True)):
        end[place], label[place] = 1.0, as_label(value, f"step {number}")
    return {"step_end": end, "step_label": label}


def label_column(columns: Mapping[str, Any], length: int) -> dict[str, list[float]]:
    """`step_end` and `step_label` as a row brings them for its own tokens; null is no label.

    Raises:
        DataError: `step_label` is missing, not one value a token, or stands where no step ends.
    """
    given = columns.get("step_label")
    if not isinstance(given, list) or len(given) != length:
        found = f"{len(given)} values" if isinstance(given, list) else repr(given)
        raise DataError(f"'step_label' among the columns has {found}; expected {length}, one a token, null where there is none")
    label = [as_label(value, f"token {t}") for t, value in enumerate(given)]
    end = [float(value) for value in columns.get("step_end") or [not math.isnan(value) for value in label]]
    stray = [t for t, (value, last) in enumerate(zip(label, end, strict=True)) if not math.isnan(value) and not last]
    if stray:
        raise DataError(f"'step_label' has a label at token {stray[0]}, where 'step_end' says that no step ends")
    return {"step_end": end, "step_label": label}
