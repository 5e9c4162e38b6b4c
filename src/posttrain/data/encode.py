"""Rendered text to tokens, once, with the place of each token in the text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from posttrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text.  `starts` never falls: white space that offsets leave out belongs to the token after it."""

    text: str
    ids: list[int]  # [T]
    starts: list[int]  # [T] first character of each token
    solid: list[int]  # [T] the same without white space that the tokenizer may have dropped before it
    ends: list[int]  # [T] one past its last character
    plain: dict[int, list[int]] = field(default_factory=dict)  # token -> the ordinary tokens to write in its place

    def at(self, character: int) -> int:
        """The first token whose own text starts at `character` or after it."""
        return bisect_left(self.solid, character)

    def spread(self, values: Iterable[Item]) -> list[Item]:
        """One value per token, repeated where one token became several."""
        spread: list[Item] = []
        for number, value in enumerate(values):
            spread.extend([value] * len(self.plain.get(number, (0,))))
        return spread

    @property
    def tokens(self) -> list[int]:
        """The ids, with neutralised control tokens as ordinary ones."""
        return [token for number, one in enumerate(self.ids) for token in self.plain.get(number, (one,))]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    guarded: Collection[tuple[int, int, Mapping[int, str]]] = (),
) -> Encoded:
    """Tokenise a text.

    Args:
        tokenizer: A fast tokenizer.
        text: The whole rendered text.
        guarded: Character spans, sorted, and the control tokens that may not come out of each: they are written as the
            ordinary tokens of their text.

    Raises:
        DataError: The text holds half of a surrogate pair, or a control token that only partly belongs to a content.
    """
    try:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except (UnicodeEncodeError, TypeError) as cause:
        raise DataError(
            "a text holds half of a surrogate pair, which no tokenizer takes; expected valid Unicode: load the rows "
            "with posttrain.data.rows.load_rows, which repairs it, or write text.encode('utf-8', 'replace').decode()"
        ) from cause
    ids = [int(token) for token in encoding["input_ids"]]
    starts: list[int] = []
    solid: list[int] = []
    ends: list[int] = []
    reached = 0
    for start, end in encoding["offset_mapping"]:
        if end > reached:
            skipped = text[reached : max(start, reached)].rstrip()
            if skipped and ends:  # normalised away with what stood before it (a combining accent)
                reached = ends[-1] = reached + len(skipped)
            starts.append(min(reached, start) if start < reached else reached)
        else:  # no text of its own, or another part of the same character
            starts.append(start)
        starts[-1] = min(max(starts[-1], starts[-2] if len(starts) > 1 else 0), len(text))
        solid.append(max(start if end > start else starts[-1], solid[-1] if solid else 0))
        reached = max(reached, end)
        ends.append(max(end, starts[-1]))
    encoded = Encoded(text, ids, starts, solid, ends)
    for start, end, forbidden in guarded:
        for number in range(max(0, bisect_left(starts, start) - 1), len(ids)):
            if starts[number] >= end:
                break
            token = ids[number]
            if token not in forbidden:
                continue
            piece = text[starts[number] : ends[number]]
            first = starts[number] + len(piece) - len(piece.lstrip())
            last = first + len(piece.strip())
            if forbidden[token].strip().lower() not in piece.lower() or last <= start or first >= end:
                continue  # an unknown word, or the template's own token beside the content
            if first < start or last > end:
                raise DataError(
                    f"the text around {piece!r} becomes the control token {forbidden[token]!r} together with the "
                    "template's own text; change the content"
                )
            encoded.plain[number] = _ordinary(tokenizer, piece, forbidden)
    return encoded


def _ordinary(tokenizer: PreTrainedTokenizerFast, text: str, forbidden: Mapping[int, str]) -> list[int]:
    """The tokens of a control token's text, none of which is a control token."""
    unknown = tokenizer.unk_token_id
    for cut in range(1, len(text)):
        pieces = ids_of(tokenizer, text[:cut]) + ids_of(tokenizer, text[cut:])
        if not any(token in forbidden and token != unknown for token in pieces):
            return pieces
    raise DataError(f"{text!r} cannot be written without its control token; remove it from the content")
