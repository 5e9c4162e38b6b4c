"""A chat template at the level of text: what it writes, and where each message stands in it.

Where the content of a message stands is found by rendering the conversation a second time with two private-use
characters around the content (inside its surrounding white space, so that templates that trim still do), checking
that the text without them is the same text, and reading off their places.  Where an assistant's turn starts is where
the prompt of that turn ends: the rendering of the messages before it with the generation prompt.  `{% generation %}`
markers, where a template has them, take precedence over both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]
"""`role`, `content` (a string, or a list of parts, those of type `text` with text), and what the template reads."""

Tools = Sequence[Any] | None
"""JSON schemas (or annotated functions) of the tools that the template may describe."""

PLAIN_TEMPLATE = (
    "{% if plain_bos %}{{ plain_bos }}{% endif %}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Contents one after another and the end-of-text token after every answer: for base models and for plain strings."""

_PLANES = ((0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))  # the two private-use planes of Unicode
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Span:
    """Where (a part of) the content of one message stands in the rendered text."""

    start: int  # first character
    end: int  # one past the last character
    message: int  # index of the message


def parts(message: Message) -> list[str]:
    """The texts of a message's content: one for a string, one a text part for a list, none for an empty content."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, list | tuple):
        return [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return []


def with_parts(message: Message, texts: Sequence[str]) -> dict[str, Any]:
    """A copy of the message with other texts in place of `parts(message)`."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": texts[0]}
    if not isinstance(content, list | tuple):
        return dict(message)
    left, changed = list(texts), []
    for part in content:
        has_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        changed.append({**part, "text": left.pop(0)} if has_text else part)
    return {**message, "content": changed}


class Template:
    """What a tokenizer's chat template writes for a conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: str, variables: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.variables = dict(variables)
        self.marks_generation = bool(_GENERATION.search(source))

    def text(self, messages: Sequence[Message], tools: Tools = None, *, ask: bool = False) -> str:
        """The conversation as text; with `ask`, the generation prompt stands at its end.

        Raises:
            TemplateError: The template refuses the conversation (an unknown role, roles that do not alternate, ...).
        """
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=self.source,
                add_generation_prompt=ask,
                tokenize=False,
                **self.variables,
            )
            return str(rendered)
        except Exception as cause:  # Jinja's errors, and whatever Python raises inside a template's expressions
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"the chat template refuses a conversation with the roles ({roles}): {type(cause).__name__}: "
                f"{cause}; change the roles to what the template knows, or give another template (--chat-template "
                "FILE)"
            ) from cause

    def generated(self, messages: Sequence[Message], tools: Tools, text: str) -> list[tuple[int, int]] | None:
        """The character spans inside `{% generation %}` markers, in order; None where the template has no markers."""
        if not self.marks_generation:
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        result: Any = render_jinja_template(
            conversations=[plain],
            tools=list(tools) if tools else None,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        rendered, spans = result
        if rendered[0] != text:
            raise TemplateError("the chat template writes another text when its generation markers are read")
        return [(int(start), int(end)) for start, end in spans[0]]

    def contents(self, messages: Sequence[Message], tools: Tools, text: str, *, ask: bool) -> list[Span]:
        """Where the contents stand in `text = self.text(messages, tools, ask=ask)`, sorted by place.

        An assistant's content that the template rewrites may be missing or incomplete.

        Raises:
            TemplateError: The content of another role is not in the text, or stands in it unrecognisably.
        """
        plane = _free_plane(messages, tools)
        bodies = [(m, p) for m, message in enumerate(messages) for p, body in enumerate(parts(message)) if body.strip()]
        spans = self._marked(messages, tools, text, ask, plane, bodies)
        if spans is None:  # some content is inspected by the template (`startswith`): mark one at a time
            spans = []
            for body in bodies:
                alone = self._marked(messages, tools, text, ask, plane, [body])
                spans += _only_place(messages, text, body) if alone is None else alone
        found = {span.message for span in spans}
        for m, _ in bodies:
            role = messages[m].get("role")
            if m not in found and role != "assistant":
                raise TemplateError(
                    f"the chat template drops or rewrites the content of message {m} (role {role!r}); remove the "
                    "message, or give a template that writes it (--chat-template FILE)"
                )
        return sorted(spans, key=lambda span: (span.start, span.end))

    def _marked(
        self,
        messages: Sequence[Message],
        tools: Tools,
        text: str,
        ask: bool,
        plane: int,
        bodies: Sequence[tuple[int, int]],
    ) -> list[Span] | None:
        """The places of the contents `bodies` (message, part), or None where marking them changes the text."""
        marked = [list(parts(message)) for message in messages]
        for number, (m, p) in enumerate(bodies):
            body = marked[m][p]
            lead, trail = _margins(body)
            inner = body[lead : len(body) - trail]
            opened, closed = chr(plane + 2 * number), chr(plane + 2 * number + 1)
            marked[m][p] = body[:lead] + opened + inner + closed + body[len(body) - trail :]
        changed = [with_parts(message, texts) for message, texts in zip(messages, marked, strict=True)]
        try:
            rendered = self.text(changed, tools, ask=ask)
        except TemplateError:
            return None
        pattern = re.compile(f"[{chr(plane)}-{chr(plane + 2 * len(bodies) + 1)}]")
        if pattern.sub("", rendered) != text:
            return None
        spans: list[Span] = []
        opened_at: dict[int, int] = {}
        for count, mark in enumerate(pattern.finditer(rendered)):
            place, code = mark.start() - count, ord(mark.group()) - plane
            if code % 2 == 0:
                opened_at[code // 2] = place
                continue
            m, p = bodies[code // 2]
            start = opened_at.pop(code // 2, None)
            if start is None:  # the beginning was cut off (earlier thinking): keep what ends here
                start = _common_end(parts(messages[m])[p].rstrip(), text, place)
            spans.append(self._widened(messages, tools, text, ask, Span(start, place, m), p))
        for number, start in opened_at.items():  # the end was cut off
            m, p = bodies[number]
            spans.append(Span(start, start + _common_start(parts(messages[m])[p].lstrip(), text, start), m))
        return spans

    def _widened(self, messages: Sequence[Message], tools: Tools, text: str, ask: bool, span: Span, part: int) -> Span:
        """The span with the white space around the content, where the template keeps it."""
        body = parts(messages[span.message])[part]
        lead, trail = _margins(body)
        start, end = span.start, span.end
        if lead and text[:start].endswith(body[:lead]) and self._keeps(messages, tools, text, ask, span, part, lead, 0):
            start -= lead
        tail = body[len(body) - trail :]
        if trail and text.startswith(tail, end) and self._keeps(messages, tools, text, ask, span, part, 0, trail):
            end += trail
        return Span(start, end, span.message)

    def _keeps(
        self,
        messages: Sequence[Message],
        tools: Tools,
        text: str,
        ask: bool,
        span: Span,
        part: int,
        lead: int,
        trail: int,
    ) -> bool:
        """Does the text change when that white space is taken out of the content?"""
        texts = parts(messages[span.message])
        texts[part] = texts[part][lead : len(texts[part]) - trail]
        without = list(messages)
        without[span.message] = with_parts(messages[span.message], texts)
        return self.text(without, tools, ask=ask) != text


def _margins(body: str) -> tuple[int, int]:
    """Numbers of white-space characters before and after a content that is not all white space."""
    return len(body) - len(body.lstrip()), len(body) - len(body.rstrip())


def _only_place(messages: Sequence[Message], text: str, body: tuple[int, int]) -> list[Span]:
    """The one place where a content stands word for word; nothing where there are several or none."""
    inner = parts(messages[body[0]])[body[1]].strip()
    start = text.find(inner)
    if start < 0 or text.find(inner, start + 1) >= 0:
        return []
    return [Span(start, start + len(inner), body[0])]


def _common_end(body: str, text: str, end: int) -> int:
    length = 0
    while length < min(len(body), end) and body[-1 - length] == text[end - 1 - length]:
        length += 1
    return end - length


def _common_start(body: str, text: str, start: int) -> int:
    length = 0
    while length < len(body) and start + length < len(text) and body[length] == text[start + length]:
        length += 1
    return length


def _free_plane(messages: Sequence[Message], tools: Tools) -> int:
    """The first character of a private-use plane that the conversation does not use."""
    used = {ord(c) for text in strings([list(messages), list(tools or ())]) for c in text if ord(c) >= _PLANES[0][0]}
    for first, last in _PLANES:
        if not any(first <= code <= last for code in used):
            return first
    raise TemplateError("a conversation uses both private-use planes of Unicode; remove those characters from the row")


def strings(value: Any) -> list[str]:
    """Every string inside lists and mappings, values only."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in strings(item)]
    return []
