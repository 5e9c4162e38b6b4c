"""Who wrote each token of a rendered conversation, which answer it belongs to, and where its prompt ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.data.control import Control
from posttrain.data.encode import Encoded, ids_of
from posttrain.data.template import Message, Span, Template, Tools, parts
from posttrain.errors import TemplateError
from posttrain.types import Origin

_ORIGINS = {
    "system": Origin.SYSTEM,
    "developer": Origin.SYSTEM,
    "user": Origin.USER,
    "tool": Origin.TOOL,
    "function": Origin.TOOL,
    "ipython": Origin.TOOL,
}


class Rewritten(TemplateError):
    """An answer does not stand in the rendered text as it was written."""


@dataclass
class Answer:
    """Where one assistant turn stands, in characters and then in tokens."""

    message: int
    begin: int  # character after the generation prompt
    trouble: str = ""  # why its prompt is not the prompt of sampling
    header: int | None = None  # character where the generation prompt begins
    first: int = 0  # token
    last: int = 0  # one past the last token, the stop token included
    inside: set[int] | None = None  # tokens within generation markers; None: the template has none


@dataclass(frozen=True)
class Rendering:
    """One conversation as text and tokens."""

    template: Template
    control: Control
    stops: tuple[int, ...]
    messages: Sequence[Message]
    tools: Tools
    ask: bool
    spans: Sequence[Span]
    encoded: Encoded
    lead: str  # white space that the template writes between the generation prompt and an answer

    @property
    def text(self) -> str:
        """The rendered text."""
        return self.encoded.text

    def answers(self) -> list[Answer]:
        """Every assistant turn, in order."""
        placed = [self._answer(i) for i, message in enumerate(self.messages) if message.get("role") == "assistant"]
        if not self.ask:
            self._narrow(placed)
        return placed

    def _answer(self, i: int) -> Answer:
        own = [span for span in self.spans if span.message == i]
        answer = self._begun(i, own[0].start if own else None)
        later = [span.start for span in self.spans if span.message > i and span.start >= answer.begin]
        limit = min(later, default=len(self.text))
        answer.first = self.encoded.at(answer.begin)
        for t in range(answer.first, self.encoded.at(limit)):
            if self.encoded.ids[t] in self.stops and t not in self.encoded.plain:
                answer.last = t + 1
                return answer
        answer.last = self.encoded.at(own[-1].end if own else limit)
        return answer

    def _begun(self, i: int, content: int | None) -> Answer:
        """Where answer `i` begins: at the end of the prompt that a sampler is given, if that stands in the text."""
        if i == 0:  # nobody asks: there is no prompt to agree with
            return Answer(i, content or 0)
        try:
            asked, header = (self.template.text(self.messages[:i], self.tools, ask=ask) for ask in (True, False))
        except TemplateError as cause:
            return Answer(i, content or 0, f"the prompt of message {i} cannot be rendered alone: {cause}")
        if not self.text.startswith(asked):
            if content is not None and self.text[:content].endswith(self.lead):
                content -= len(self.lead)
            if content is None:
                raise Rewritten(f"the chat template rewrites the conversation before message {i} and drops its content")
            return Answer(i, content, f"what stands before message {i} is written differently when the model is asked for it")
        answer = Answer(i, len(asked), header=len(header) if self.text.startswith(header) else None)
        gap = self.text[len(asked) : content] if content is not None else ""
        headers = [word for token, word in self.control.inside.items() if token not in self.stops and word in gap]
        if headers:  # the template has no generation prompt: what it writes before an answer is not the answer's
            answer.begin = content or answer.begin
            answer.trouble = f"the template writes {gap!r} before an answer, and its generation prompt does not"
        return answer

    def _narrow(self, answers: Sequence[Answer]) -> None:
        """Keep to what stands inside generation markers, where the template has them."""
        marked = self.template.generated(self.messages, self.tools, self.text)
        if marked is None:
            return
        begins = [answer.begin for answer in answers[1:]] + [len(self.text) + 1]
        for start, end in marked:
            number = next((k for k, begin in enumerate(begins) if end <= begin or start < begin), None)
            if number is None or not answers:
                continue
            answer = answers[number]
            answer.inside = (answer.inside or set()) | set(range(self.encoded.at(start), self.encoded.at(end)))
            if start < answer.begin and answer.message > 0 and not answer.trouble:
                answer.trouble = "the template's generation markers begin before the end of the generation prompt"
        for answer in answers:
            answer.inside = answer.inside or set()

    def refuse_rewritten(self, answer: Answer) -> None:
        """Every part of a trained answer must stand in its turn, white space aside.

        Raises:
            TemplateError: The template dropped or changed some of it.
        """
        end = self.encoded.ends[answer.last - 1] if answer.last > answer.first else answer.begin
        written = "".join(self.text[answer.begin : end].split())
        for body in parts(self.messages[answer.message]):
            if "".join(body.split()) not in written:
                raise Rewritten(
                    f"the chat template rewrites the answer in message {answer.message} (it drops thinking, or the "
                    "content beside tool calls), so what would be trained is not what the data say; train the last "
                    "answer alone (trained_turns='last'), one sample an answer (Renderer.turns), or give a template "
                    "that keeps it (--chat-template FILE)"
                )

    def differs(self, answer: Answer) -> str:
        """Why the tokens before the answer are not those that a sampler would be given; empty where they are.

        Tokens before a control token do not depend on what follows it, so only the text since the last one is cut
        again.
        """
        if answer.trouble or answer.message == 0:
            return answer.trouble
        ids, first = self.encoded.ids, answer.first
        if first and self.encoded.ends[first - 1] > answer.begin:
            near = self.text[max(0, answer.begin - 12) : answer.begin + 12]
            return f"one token stands across the end of the prompt, around {near!r}"
        start = first
        while start > 0:
            start -= 1
            if ids[start] in self.control.added and start not in self.encoded.plain:
                break
        alone = self.text[self.encoded.starts[start] : answer.begin] if first else ""
        if ids_of(self.template.tokenizer, alone) != ids[start:first]:
            return f"the prompt of message {answer.message} is cut into other tokens when it stands alone"
        return ""

    def origins(self) -> list[int]:
        """[T] who wrote each token, by its last character that is not white space; answers are left as TEMPLATE."""
        who = bytearray([int(Origin.TEMPLATE)]) * (len(self.text) + 1)
        for span in self.spans:
            role = str(self.messages[span.message].get("role"))
            if role == "assistant":
                continue
            origin = int(_ORIGINS.get(role, Origin.CONTEXT))
            who[span.start : span.end] = bytes([origin]) * (span.end - span.start)
        origins = []
        for start, end in zip(self.encoded.starts, self.encoded.ends, strict=True):
            solid = len(self.text[start:end].rstrip())
            origins.append(who[start + solid - 1] if solid else who[start])
        return origins

    def turns(self, answers: Sequence[Answer]) -> list[int]:
        """[T] the message of each token: a header belongs to the message after it, an end of turn to the one before."""
        placed = {answer.message: answer for answer in answers}
        borders: list[int] = []  # first token of each message, and of the generation prompt
        reached = 0
        for m in range(len(self.messages) + int(self.ask)):
            header = self._header(placed.get(m), m)
            border = reached if header is None else self.encoded.at(header)
            borders.append(max(border, borders[-1]) if borders else 0)
            ends = [span.end for span in self.spans if span.message == m]
            if m in placed:
                reached = max(reached, self._closed(placed[m].last, control=False))
            elif ends and max(ends) <= min((s.start for s in self.spans if s.message > m), default=len(self.text)):
                reached = max(reached, self._closed(self.encoded.at(max(ends)), control=True))
        turn = [0] * len(self.encoded.ids)
        for m, (border, end) in enumerate(zip(borders, [*borders[1:], len(turn)], strict=True)):
            turn[border:end] = [m] * max(0, end - border)
        runs = []
        for span in self.spans:
            first = self.encoded.at(span.start)
            shared = first > 0 and self.encoded.ends[first - 1] > span.start  # a token with some of the content
            runs.append((first - int(shared), self.encoded.at(span.end), span.message))
        for first, last, m in runs + [(answer.first, answer.last, answer.message) for answer in answers]:
            turn[first:last] = [m] * max(0, last - first)
        return turn

    def _header(self, answer: Answer | None, m: int) -> int | None:
        """The character where the generation prompt before message `m` begins."""
        if m < len(self.messages):
            return answer.header if answer else None
        before = self.template.text(self.messages, self.tools)
        return len(before) if self.text.startswith(before) else None

    def _closed(self, t: int, *, control: bool) -> int:
        """The token after the white space that ends a turn and, where `control`, its one closing control token."""
        encoded = self.encoded

        def skipped(t: int, fits: Callable[[int], bool]) -> int:
            while t < len(encoded.ids) and fits(t):
                t += 1
            return t

        def blank(t: int) -> bool:
            return not encoded.text[encoded.starts[t] : encoded.ends[t]].strip()

        t = skipped(t, blank)
        if control and t < len(encoded.ids) and encoded.ids[t] in self.control.added:
            t = skipped(t + 1, blank)
        return t
