"""What is wrong with a tokenizer, its template and a data set, in words, before anything is trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data import checks
from posttrain.data.chat import PROMPT_DIFFERS, Renderer
from posttrain.data.control import Control
from posttrain.data.template import parts
from posttrain.errors import DataError, TemplateError
from posttrain.records import sample_from_json
from posttrain.types import Row, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Finding", "diagnose"]

_USER = {"role": "user", "content": "Hello"}
_ANSWER = {"role": "assistant", "content": "World"}
_WORDS = ("The answer", "I think", "42", "Yes", "hello")  # beginnings: some are one token with a space before them
_THOUGHT = {"role": "assistant", "content": "<think>First thing.</think>World"}


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Example:
        >>> print(Finding("warning", "pad and eos are one token", "give the tokenizer a pad token of its own"))
        warning: pad and eos are one token; give the tokenizer a pad token of its own
    """

    severity: Literal["error", "warning", "note"]
    """`error`: training would be wrong or fail; `warning`: it may be; `note`: good to know."""
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.what}; {self.advice}"


def diagnose(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row] | None = None,
    model_config: Any = None,
    *,
    template: str | None = None,
    generation_config: Any = None,
) -> list[Finding]:
    """Look a tokenizer, its template, a model's configuration and normalised rows over; errors first.

    Args:
        tokenizer: A fast tokenizer.
        rows: Normalised rows (`load_rows`); each is rendered.
        model_config: The model's `config`: vocabulary size, context length, eos.
        template: A chat template in place of the tokenizer's own.
        generation_config: The model's; its eos tokens join the stop tokens.
    """
    found = [*_tokens(tokenizer, model_config)]
    try:
        renderer = Renderer(tokenizer, template=template, generation_config=generation_config)
    except TemplateError as cause:
        found.append(Finding("error", str(cause), "give a template with --chat-template FILE, or train on plain text"))
        try:
            renderer = Renderer.plain(tokenizer)
        except TemplateError:
            return found
    else:
        found += _template(renderer)
    if rows is not None:
        found += _rows(renderer, rows, getattr(model_config, "max_position_embeddings", None))
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


def _tokens(tokenizer: PreTrainedTokenizerFast, config: Any) -> Iterable[Finding]:
    """The tokenizer beside the model's configuration."""
    if tokenizer.eos_token_id is None:
        yield Finding("error", "the tokenizer has no eos token", "set tokenizer.eos_token to the token that ends a text")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            "note",
            f"pad and eos are one token ({tokenizer.eos_token!r})",
            "harmless here, where padding is told by lengths; other programs mask the eos away with it",
        )
    if tokenizer.pad_token_id is None:
        yield Finding("note", "the tokenizer has no pad token", "nothing to do here: padding is told by lengths")
    size = getattr(config, "vocab_size", None)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if size is not None and highest >= size:
        yield Finding(
            "error",
            f"the tokenizer has the token {highest} and the embedding only {size} rows",
            f"enlarge it: model.resize_token_embeddings({highest + 1}), or use the model's own tokenizer",
        )
    known = checks.as_ids(getattr(config, "eos_token_id", None))
    if known and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        yield Finding(
            "warning",
            f"the model's eos token is {known} and the tokenizer's {tokenizer.eos_token_id}",
            "both end an answer here if both are stop tokens: pass the generation config to the renderer",
        )


def _template(renderer: Renderer) -> Iterable[Finding]:
    """What a few made-up conversations show of the template."""
    sample = renderer.conversation([_USER, _ANSWER])
    if not renderer.template.marks_generation:
        yield Finding(
            "note",
            "the template has no generation markers",
            "nothing to do: answers are found by rendering their prompts",
        )
    if not renderer.template_stops:
        yield Finding(
            "error",
            "the template writes no stop token after an answer",
            "give a template that ends assistant turns with the eos token (--chat-template FILE)",
        )
    elif not any(sample.trained):
        yield Finding("error", "the template's generation markers enclose nothing", "move the answer between them, or remove them")
    elif checks.unstopped_turn(sample, renderer.stop_tokens) is not None:
        yield Finding(
            "error",
            "the stop token stands outside the template's generation markers",
            "move {% endgeneration %} behind the token that ends the turn",
        )
    bos = renderer.tokenizer.bos_token_id
    if checks.bos_is_doubled(sample.tokens, bos):
        yield Finding("error", "the template writes two begin-of-text tokens", "remove one from the template")
    elif checks.adds_bos(renderer.tokenizer) and sample.tokens[0] == bos:
        yield Finding(
            "note",
            "template and tokenizer each write a begin-of-text token",
            "handled here; where another program tokenises the rendered text, give it add_special_tokens=False",
        )
    answers = [renderer.completion("Hello", word).info for word in _WORDS]
    differs = [info[PROMPT_DIFFERS] for info in (sample.info, *answers) if PROMPT_DIFFERS in info]
    if differs:
        yield Finding(
            "error",
            f"training and sampling disagree on a prompt's tokens: {differs[0]}",
            "give a template whose generation prompt is the beginning of every assistant turn",
        )
    yield from _thinking(renderer)
    try:
        renderer.prompt([{"role": "system", "content": "Be brief."}, _USER])
    except TemplateError:
        yield Finding("warning", "the template takes no system message", "put its text into the first user message")


def _thinking(renderer: Renderer) -> Iterable[Finding]:
    """Does the template keep `<think>` in the last answer, and in earlier ones?"""
    try:
        renderer.conversation([_USER, _THOUGHT])
    except TemplateError:
        yield Finding(
            "error",
            "the template drops <think>...</think> even from the last answer, so thinking cannot be trained",
            "give a template that writes the assistant's content as it is (--chat-template FILE)",
        )
        return
    try:
        renderer.conversation([_USER, _THOUGHT, _USER, _THOUGHT])
    except TemplateError:
        yield Finding(
            "warning",
            "the template drops thinking from the history",
            "conversations with earlier thinking become one sample an answer (Renderer.turns)",
        )


def _rows(renderer: Renderer, rows: Sequence[Row], context: int | None) -> Iterable[Finding]:
    """What rendering every row shows."""
    if not rows:
        yield Finding("error", "there are no rows", "give at least one")
        return
    refused: list[tuple[str, str]] = []
    long: list[tuple[str, int]] = []
    differs: list[str] = []
    for number, row in enumerate(rows):
        place = str(row.get("_source", f"row {number}"))
        try:
            samples = _samples(renderer, row)
        except DataError as cause:
            refused.append((place, str(cause)))
            continue
        length = max(map(len, samples))
        if context is not None and length > context:
            long.append((place, length))
        if any(PROMPT_DIFFERS in sample.info for sample in samples):
            differs.append(place)
    yield from _refused(refused, len(rows))
    if long:
        place, length = max(long, key=lambda item: item[1])
        yield Finding(
            "error",
            f"{len(long)} of {len(rows)} rows are longer than the context of {context} tokens (the longest, {place}: {length})",
            "nothing is cut silently: remove or split them, or take a model with a longer context",
        )
    if differs:
        yield Finding(
            "error",
            f"in {len(differs)} of {len(rows)} rows training and sampling disagree on the prompt's tokens ({_some(differs)})",
            "take away white space where prompt and answer meet, or remove these rows",
        )
    yield from _repeated(rows)
    yield from _spelt_out(renderer.control, rows)


def _refused(refused: Sequence[tuple[str, str]], total: int) -> Iterable[Finding]:
    """Rows that cannot be rendered, those with empty answers apart."""
    empty = [place for place, why in refused if "is empty" in why]
    if empty:
        yield Finding("error", f"{len(empty)} of {total} rows have an empty answer ({_some(empty)})", "remove them")
    others = [(place, why) for place, why in refused if "is empty" not in why]
    if others:
        names = _some([place for place, _ in others])
        yield Finding(
            "error",
            f"{len(others)} of {total} rows cannot be rendered ({names}); the first: {others[0][1]}",
            "repair or remove them",
        )


def _samples(renderer: Renderer, row: Row) -> list[Sample]:
    """Every sample that a row of any format makes."""
    if "chosen" in row and "rejected" in row:
        return list(renderer.pair(row))
    if "sample" in row:
        return [sample_from_json(row["sample"])]
    if "responses" in row:
        return [renderer.completion(row["prompt"], response, row.get("tools")) for response in row["responses"]]
    if {"messages", "completion", "text"} & set(row):
        return renderer.demonstrations(row)
    return [renderer.prompt(row["prompt"], row.get("tools"))]


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")


def _repeated(rows: Sequence[Row]) -> Iterable[Finding]:
    """Rows that occur more than once, and pairs without a difference."""
    keys = ("messages", "prompt", "completion", "chosen", "rejected", "text", "responses", "sample", "samples")
    counts = Counter(json.dumps([row.get(key) for key in keys], sort_keys=True, default=str) for row in rows)
    extra = sum(count - 1 for count in counts.values())
    if extra:
        yield Finding("warning", f"{extra} of {len(rows)} rows repeat another row", "remove them, or mean to weigh them double")
    alike = ((i, row) for i, row in enumerate(rows) if "chosen" in row and row["chosen"] == row.get("rejected"))
    same = [str(row.get("_source", f"row {i}")) for i, row in alike]
    if same:
        yield Finding("warning", f"in {len(same)} rows chosen and rejected are the same ({_some(same)})", "remove them")


def _spelt_out(control: Control, rows: Sequence[Row]) -> Iterable[Finding]:
    """Rows whose contents hold the text of control tokens, which are written as ordinary text."""
    places: list[str] = []
    for number, row in enumerate(rows):
        sides = (row.get(key) for key in ("messages", "prompt", "completion", "chosen", "rejected"))
        messages = [message for side in sides if isinstance(side, list | tuple) for message in side]
        if any(_holds(control, message) for message in messages if isinstance(message, Mapping)):
            places.append(str(row.get("_source", f"row {number}")))
    if places:
        yield Finding(
            "warning",
            f"{len(places)} of {len(rows)} rows spell control tokens out in their contents ({_some(places)})",
            "they are written as ordinary text, never as the tokens; check that this is what you mean",
        )


def _holds(control: Control, message: Mapping[str, Any]) -> bool:
    forbidden = control.of(str(message.get("role"))).values()
    return any(word in body for body in parts(message) for word in forbidden)
