"""Which tokens of a vocabulary steer a conversation, and who may write them.

Text that a person, a tool or a data file brings must never become the tokens that end a turn or start another one.
Two sets:

- `outside`: what system, user and tool contents may not contain as tokens: every special token, and every added token
  that the template writes.  Such text stays in the content, as ordinary characters.
- `inside`: what an assistant's content may not contain as tokens: the tokens that build turns (begin and end of text,
  padding, stop tokens, the template's headers).  Tags in pairs such as `<think>` and `</think>` are an answer's own
  and stay tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TAG = re.compile(r"</?([A-Za-z][\w-]*)>")


@dataclass(frozen=True)
class Control:
    """The control tokens of a tokenizer under a template: id -> its text."""

    added: dict[int, str]
    """Every added token."""
    outside: dict[int, str]
    """Refused as tokens in system, user and tool contents."""
    inside: dict[int, str]
    """Refused as tokens in assistant contents."""

    def of(self, role: str) -> dict[int, str]:
        """The tokens that a content of this role may not contain."""
        return self.inside if role == "assistant" else self.outside


def named_specials(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Begin and end of text, padding, unknown: the special tokens that have a name."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return {int(token) for token in ids if token is not None}


def control_tokens(
    tokenizer: PreTrainedTokenizerFast,
    *,
    source: str,
    markup: Iterable[int],
    stops: Iterable[int],
    allowed: Collection[str] = (),
) -> Control:
    """Sort the added tokens of a tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        source: The template's text.
        markup: Ids that the template writes around contents.
        stops: Ids that end an assistant's turn.
        allowed: Texts of tokens that any content may contain as tokens (image placeholders, say).
    """
    special = set(tokenizer.all_special_ids)
    added: dict[int, str] = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token if isinstance(token, str) else token.content
        if text.strip() and not _BYTE.fullmatch(text):  # added runs of blanks and bytes are not control tokens
            added[int(number)] = text
            if not isinstance(token, str) and token.special:
                special.add(int(number))
    names = [match.group(1) for text in added.values() if (match := _TAG.fullmatch(text))]
    paired = {name for name in names if f"<{name}>" in added.values() and f"</{name}>" in added.values()}
    named = named_specials(tokenizer) | set(stops)
    tags = {
        number
        for number, text in added.items()
        if number not in named and (match := _TAG.fullmatch(text)) and match.group(1) in paired
    }
    building = named | (set(markup) - tags)
    inside = {n: text for n, text in added.items() if n in building and text not in allowed}
    outside = {n: text for n, text in added.items() if text not in allowed and (n in special or n in building or text in source)}
    return Control(added=added, outside=outside, inside=inside)
