"""What a run refuses to start with, and the small facts about tokenizers that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError, TemplateError
from posttrain.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from posttrain.data.chat import Renderer

__all__ = ["PROMPT_DIFFERS", "adds_bos", "as_ids", "bos_is_doubled", "check", "refuse_long_prompts", "unstopped_turn"]


PROMPT_DIFFERS = "prompt_differs"
"""Key of `Sample.info`: why a prompt's tokens in training are not those in sampling.  Absent where they agree."""


def as_ids(value: Any) -> list[int]:
    """An id, a list of ids or nothing, as a list."""
    if value is None:
        return []
    return [int(token) for token in value] if isinstance(value, list | tuple) else [int(value)]


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Does the tokenizer put a begin-of-text token before a plain text?"""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def is_json(value: Any) -> bool:
    """Is this a JSON value (images, bytes and tensors are not)?"""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_json(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def bos_is_doubled(tokens: Sequence[int], bos: int | None) -> bool:
    """Do two begin-of-text tokens stand at the start?"""
    return bos is not None and len(tokens) > 1 and tokens[0] == bos == tokens[1]


def unstopped_turn(sample: Sample, stops: Sequence[int]) -> int | None:
    """The first message whose training ends before a stop token, or None.  Samples cut at a length limit are exempt."""
    if sample.finish == "length":
        return None
    turn = sample.turn or [0] * len(sample)
    last: dict[int, int] = {}
    for t, on in enumerate(sample.trained):
        if on:
            last[turn[t]] = sample.tokens[t]
    return next((message for message, token in last.items() if token not in stops), None)


def check(samples: Sequence[Sample], renderer: Renderer, *, imitates: bool, prompts: bool = False) -> None:
    """Refuse samples that must not be trained on.

    Args:
        samples: Rendered samples, before the first step.
        renderer: What rendered them.
        imitates: Does the method train answers to end (does it imitate or sample)?
        prompts: The samples are prompts to be continued: nothing is trained in them yet.

    Raises:
        TemplateError: Nothing is trained, an answer's stop token is not trained (where `imitates`), two begin-of-text
            tokens stand at the start, or training and sampling disagree on a prompt's tokens.
    """
    bos = renderer.tokenizer.bos_token_id
    stops = [renderer.tokenizer.convert_ids_to_tokens(token) for token in renderer.stop_tokens]
    for i, sample in enumerate(samples):
        name = f"sample {i}" + (f" ({sample.query})" if sample.query else "")
        if not prompts and not any(sample.trained):
            raise TemplateError(
                f"{name}: nothing is trained; expected an answer: look at the template's generation markers, or give "
                "rows with an assistant message"
            )
        if bos_is_doubled(sample.tokens, bos):
            raise TemplateError(
                f"{name}: two begin-of-text tokens ({renderer.tokenizer.bos_token!r}) stand at the start; expected "
                "one: remove it from the data or from the template"
            )
        differs = sample.info.get(PROMPT_DIFFERS)
        if differs:
            raise TemplateError(
                f"{name}: training and sampling disagree on the prompt's tokens: {differs}; expected the same "
                "tokens: give a template that writes a prompt the same way in both, train one sample an answer "
                "(Renderer.turns), or remove white space where prompt and answer meet"
            )
        message = unstopped_turn(sample, renderer.stop_tokens) if imitates and not prompts else None
        if message is not None:
            raise TemplateError(
                f"{name}: the stop token is not trained at the end of message {message}, so the model would never "
                f"stop; expected one of {stops}: give a template that writes it after an answer and inside its "
                "generation markers"
            )


def refuse_long_prompts(samples: Sequence[Sample], limit: int) -> None:
    """Refuse prompts that leave no room for an answer in a context of `limit` tokens.

    Raises:
        DataError: Some prompt has `limit` tokens or more; the message has the counts.
    """
    lengths = [sample.prompt_length for sample in samples]
    long = [(i, length) for i, length in enumerate(lengths) if length >= limit]
    if long:
        worst, length = max(long, key=lambda item: item[1])
        name = samples[worst].query or f"sample {worst}"
        raise DataError(
            f"{len(long)} of {len(samples)} prompts do not fit the context of {limit} tokens; the longest has "
            f"{length} ({name}); nothing is cut silently: remove these rows, or take a longer context"
        )
