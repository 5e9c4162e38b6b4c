"""What becomes of one answer: when a stop string ends it, and how its tokens join the prompt's sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.errors import ConfigError, DataError
from posttrain.types import Origin, Sample


def refuse_empty(prompts: Sequence[Sample]) -> None:
    """Refuse prompts from which nothing can be continued.

    Raises:
        DataError: One has no tokens.
    """
    for number, prompt in enumerate(prompts):
        if not prompt.tokens:
            where = f"prompt {number} (group '{prompt.group}')"
            raise DataError(f"{where} has no tokens; begin it with at least one, such as BOS")


def room_behind(length: int, *, max_tokens: int, context: int | None) -> int:
    """Tokens that an answer to a prompt of `length` tokens may have; 0 where the prompt fills the context."""
    return max_tokens if context is None else min(max_tokens, max(0, context - length))


class StopStrings:
    """Watches the tail of an answer for strings that end it, across token boundaries.

    The tokens that spell the string are kept.  A string must lie wholly in the answer: what the prompt ends with does
    not count.  Decoding starts one token before the tail and takes that token's text off again, since some tokenizers
    drop a leading space.

    Args:
        tokenizer: Anything with `decode(tokens, skip_special_tokens=..., clean_up_tokenization_spaces=...) -> str`.
        strings: What ends an answer; may be empty.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if strings and tokenizer is None:
            raise ConfigError(f"stop strings {list(strings)} need a tokenizer; give one, or use stop_tokens")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        self._tail = max((len(text.encode()) for text in strings), default=0) + 4  # a token that shows is a byte or more
        self._last_letters = {text[-1] for text in strings}
        self._may_end: dict[int, bool] = {}

    def __bool__(self) -> bool:
        return bool(self.strings)

    def text(self, tokens: Sequence[int]) -> str:
        """The tokens as text, special tokens included, nothing tidied."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def ended(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Does the answer end with a token that completes one of the strings?"""
        if not self.strings or not self._may_complete(answer[-1]):
            return False
        tail = answer[-self._tail :]
        anchor = answer[-self._tail - 1 : -self._tail] or prompt[-1:]
        text = self.text([*anchor, *tail])[len(self.text(anchor)) :]
        return any(string in text for string in self.strings)

    def _may_complete(self, token: int) -> bool:
        """Can a string end in this token?  Most tokens lack the last letter, and need no decoding of the tail."""
        known = self._may_end.get(token)
        if known is None:
            piece = self.text([token])
            whole = bool(piece) and "�" not in piece
            known = not whole or bool(self._last_letters & set(piece)) or any(c.isspace() for c in self._last_letters)
            self._may_end[token] = known
        return known


def answer_turn(prompt: Sample) -> int:
    """The turn that new tokens belong to: the message the prompt has opened, else the next one.

    A prompt has opened a message when it ends with a model's or a demonstrator's tokens, or with template tokens (the
    header of an answer) that carry a later turn than the message before them.
    """
    if not prompt.turn:
        return 0
    last, origin = prompt.turn[-1], prompt.origin[-1]
    if origin >= Origin.POLICY:
        return last
    if origin == Origin.TEMPLATE:
        written = [turn for turn, who in zip(prompt.turn, prompt.origin, strict=True) if who != Origin.TEMPLATE]
        return last if not written or last > written[-1] else last + 1
    return last + 1


def extended(
    prompt: Sample,
    tokens: Sequence[int],
    *,
    logprobs: Sequence[float],
    sampled_logprobs: Sequence[float],
    finish: str,
    temperature: float,
    policy_version: int,
) -> Sample:
    """The prompt's sample with an answer behind it.

    Everything the prompt holds is kept; values per token (`columns` whose list is as long as the prompt) are 0 for the
    new tokens, and so are the log-probabilities of prompt tokens that nobody sampled.

    Args:
        prompt: The sample to continue.
        tokens: `[A]` new tokens; origin POLICY, trained.
        logprobs: `[A]` at the temperature, in nats.
        sampled_logprobs: `[A]` after truncation.
        finish: "stop" or "length".
        temperature: At which `logprobs` were read.
        policy_version: The weights that wrote them.

    Returns:
        A sample of `T + A` tokens.
    """
    length, count = len(prompt.tokens), len(tokens)
    before = [0.0] * length
    columns = {
        name: [*value, *[0.0] * count] if isinstance(value, list) and len(value) == length else value
        for name, value in prompt.columns.items()
    }
    return prompt.with_(
        tokens=[*prompt.tokens, *tokens],
        origin=[*prompt.origin, *[int(Origin.POLICY)] * count],
        trained=[*prompt.trained, *[True] * count],
        turn=[*(prompt.turn or [0] * length), *[answer_turn(prompt)] * count],
        logprobs=[*(prompt.logprobs or before), *logprobs],
        sampled_logprobs=[*(prompt.sampled_logprobs or prompt.logprobs or before), *sampled_logprobs],
        finish=finish,
        temperature=temperature,
        policy_version=policy_version,
        columns=columns,
    )


__all__ = ["StopStrings", "answer_turn", "extended", "refuse_empty", "room_behind"]
