"""The one renderer: messages become tokens, each with who wrote it, its message, and whether it is trained.

Supervised fine-tuning, reward models, reinforcement learning, evaluation and export all read the same tokens.  The
rendered text is tokenised once, as a whole; origins come from character offsets (`template.py` finds them), never
from text searches.

- **Trained** is what the model must write itself: from the end of the generation prompt to the stop token, both
  thinking tags and stop token included.  These tokens have the origin DEMONSTRATION; what follows the stop token is
  TEMPLATE.
- Assistant turns that are read and not trained (the history of a prompt) are CONTEXT, so `Sample.prompt_length` is
  the length of the prompt.
- **Control tokens in contents** are written as ordinary text in system, user and tool contents; in assistant contents
  the same holds for tokens that build turns, while paired tags (`<think>`) stay tokens.  A content that *ends* with a
  stop token is refused, for it would be written twice.  In other fields (tool calls, names, tools) control tokens are
  refused.
- **History that a template rewrites** (earlier thinking dropped) is never trained: `conversation` raises, `turns`
  makes one sample of each answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data import checks
from posttrain.data.checks import PROMPT_DIFFERS
from posttrain.data.control import Control, control_tokens
from posttrain.data.encode import encode, ids_of
from posttrain.data.placing import Rendering, Rewritten
from posttrain.data.steps import SEPARATOR, joined, tokens_of_steps
from posttrain.data.template import PLAIN_TEMPLATE, Message, Span, Template, Tools, parts, strings
from posttrain.errors import DataError, TemplateError
from posttrain.types import Origin, Row, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PROMPT_DIFFERS", "RENDERED_KEYS", "Renderer", "renderer_of", "row_info"]

RENDERED_KEYS = frozenset(
    {"messages", "prompt", "completion", "chosen", "rejected", "text", "tools", "responses", "ranking", "scores"}
    | {"columns", "sample", "samples", "chosen_sample", "rejected_sample"}
)
"""Keys of a row that become tokens and columns, or put them in order; all its other JSON values go into `Sample.info`."""


class Renderer:
    """Messages to samples, with a tokenizer and its chat template.

    Example:
        >>> renderer = Renderer(tokenizer)                                                          # doctest: +SKIP
        >>> sample = renderer.conversation([{"role": "user", "content": "1 + 1?"},
        ...                                 {"role": "assistant", "content": "2"}])                 # doctest: +SKIP
        >>> renderer.decode([t for t, on in zip(sample.tokens, sample.trained) if on])              # doctest: +SKIP
        '2<|im_end|>'
    """

    stop_tokens: tuple[int, ...]
    """What ends an answer: the template's token after one, the tokenizer's eos, the generation config's."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        generation_config: Any = None,
        allowed: Collection[str] = (),
    ) -> None:
        """Read the template and find its stop tokens by rendering.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            template: A Jinja chat template in place of the tokenizer's own.
            variables: What the template reads beside the messages, for instance `{"enable_thinking": False}`.
            generation_config: The model's; its `eos_token_id` joins the stop tokens.
            allowed: Texts of control tokens that contents may hold as tokens (image placeholders, say).

        Raises:
            TemplateError: There is no chat template, the tokenizer is not a fast one, or the template cannot render
                two turns.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so the place of its tokens in the text is "
                "unknown; expected one with a tokenizer.json: save it with AutoTokenizer.from_pretrained(..., "
                "use_fast=True)"
            )
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, _source(tokenizer, template), variables or {})
        probe = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "World"}]
        text = self.template.text(probe)
        ended, added = (
            max(span.end for span in _certain(self.template, probe, text)),
            set(tokenizer.added_tokens_decoder),
        )
        markup = encode(tokenizer, text)
        after = [token for token in markup.ids[markup.at(ended) :] if token in added]
        self.template_stops: tuple[int, ...] = tuple(after[:1])
        stops = [*after[:1], tokenizer.eos_token_id, *checks.as_ids(getattr(generation_config, "eos_token_id", None))]
        self.stop_tokens = tuple(dict.fromkeys(int(token) for token in stops if token is not None))
        asked = self.template.text(probe[:1], ask=True)
        gap = text[len(asked) : text.find("World")] if text.startswith(asked) else ""
        self._lead = gap if gap.isspace() else ""
        written = set(markup.ids) | set(ids_of(tokenizer, asked))
        self.control: Control = control_tokens(
            tokenizer,
            source=self.template.source,
            markup=written & added,
            stops=self.stop_tokens,
            allowed=allowed,
        )

    @classmethod
    def plain(cls, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Renderer:
        """A renderer without roles: the prompt's text, the completion's text, the end-of-text token.

        For base models and for plain strings.  A begin-of-text token is written where the tokenizer itself adds one.
        """
        if tokenizer.eos_token is None:
            raise TemplateError("the tokenizer has no eos token, so an answer could not end; set tokenizer.eos_token")
        variables = {"plain_bos": tokenizer.bos_token if checks.adds_bos(tokenizer) else ""}
        return cls(tokenizer, template=PLAIN_TEMPLATE, variables=variables, **options)

    # ---------------------------------------------------------------------------------------------------------
    # From messages.

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        *,
        trained_turns: Literal["assistant", "last"] = "assistant",
        row: Row | None = None,
    ) -> Sample:
        """A whole conversation; every assistant turn (or the last alone) is trained, its stop token included.

        Raises:
            DataError: No assistant turn, an empty one, or one that ends with a stop token's text.
            TemplateError: The template refuses the roles, or rewrites an answer that is to be trained.
        """
        answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not answers:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(f"a conversation with the roles ({roles}) has nothing to train; expected an assistant message")
        return self._render(messages, tools, set(answers if trained_turns == "assistant" else answers[-1:]), row=row)

    def turns(self, messages: Sequence[Message], tools: Tools = None, *, row: Row | None = None) -> list[Sample]:
        """The conversation as one sample, or one sample an answer where the template rewrites the history."""
        try:
            whole = self.conversation(messages, tools, row=row)
            if PROMPT_DIFFERS not in whole.info:
                return [whole]
        except Rewritten:
            pass
        answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        return [self._render(messages[: i + 1], tools, {i}, row=row) for i in answers]

    def prompt(self, messages: Sequence[Message], tools: Tools = None, *, row: Row | None = None) -> Sample:
        """What is sampled from: the messages and the generation prompt; nothing is trained.

        Raises:
            DataError: No messages, or the last one is the assistant's.
        """
        if not messages or messages[-1].get("role") == "assistant":
            found = "no messages" if not messages else "an assistant message at its end"
            raise DataError(f"a prompt has {found}; expected a user, system or tool message for the model to answer")
        return self._render(messages, tools, set(), ask=True, row=row)

    def completion(
        self,
        prompt: Sequence[Message] | str,
        completion: Sequence[Message] | str,
        tools: Tools = None,
        *,
        row: Row | None = None,
    ) -> Sample:
        """A prompt and its completion, of which only the completion's assistant turns are trained."""
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        answers = {len(before) + i for i, message in enumerate(after) if message.get("role") == "assistant"}
        if not answers:
            raise DataError("a completion has no assistant message, so nothing would be trained; expected at least one")
        return self._render([*before, *after], tools, answers, row=row)

    def pair(self, row: Row) -> tuple[Sample, Sample]:
        """Chosen and rejected of one row, in this order."""
        for key in ("prompt", "chosen", "rejected"):
            if key not in row:
                raise DataError(f"a pair has no '{key}'; expected prompt, chosen and rejected, found {sorted(row)}")
        prompt, tools = row["prompt"], row.get("tools")
        chosen = self.completion(prompt, row["chosen"], tools, row=row)
        return chosen, self.completion(prompt, row["rejected"], tools, row=row)

    def ranking(self, row: Row) -> list[Sample]:
        """The responses of one row, best first."""
        for key in ("prompt", "responses", "ranking"):
            if key not in row:
                raise DataError(f"a ranking has no '{key}'; expected prompt, responses and ranking, found {sorted(row)}")
        prompt, tools, responses = row["prompt"], row.get("tools"), row["responses"]
        return [self.completion(prompt, responses[number], tools, row=row) for number in row["ranking"]]

    def stepped(self, row: Row) -> tuple[Sample, list[int]]:
        """The worked answer of a row in `steps`, and the place of the token that ends each step.

        Raises:
            DataError: The steps cannot be told apart in the tokens.
        """
        prompt, separator = row["prompt"], row.get("separator", SEPARATOR)
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages, answer = [*before, {"role": "assistant", "content": joined(row)}], len(before)
        page = self._page(messages, row.get("tools"), {answer})
        return self._sample(page, {answer}, row), tokens_of_steps(page, answer, row["steps"], separator)

    def text(self, raw: str, *, row: Row | None = None) -> Sample:
        """Raw text, all of it trained but the first token, and the eos token at its end."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise TemplateError("the tokenizer has no eos token to end a text with; set tokenizer.eos_token")
        if not raw.strip():
            raise DataError("a text is empty; remove the row")
        encoded = encode(self.tokenizer, raw, [(0, len(raw), self.control.inside)])
        begin = [int(self.tokenizer.bos_token_id)] if checks.adds_bos(self.tokenizer) else []
        tokens = [*begin, *encoded.tokens, int(eos)]
        origin = [int(Origin.TEMPLATE)] * len(begin) + [int(Origin.DEMONSTRATION)] * (len(tokens) - len(begin))
        trained = [False] + [True] * (len(tokens) - 1)
        return _labelled(tokens, origin, trained, [0] * len(tokens), row, "")

    # ---------------------------------------------------------------------------------------------------------
    # From rows, and checks.

    def demonstrations(self, row: Row) -> list[Sample]:
        """What a row teaches by imitation: of `messages`, `prompt` and `completion`, or `text`."""
        if "messages" in row:
            return self.turns(row["messages"], row.get("tools"), row=row)
        if "completion" in row:
            return [self.completion(row.get("prompt", ()), row["completion"], row.get("tools"), row=row)]
        if "text" in row:
            return [self.text(row["text"], row=row)]
        raise DataError(f"a row with {sorted(row)} holds no demonstration; expected messages, completion or text")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def continuation_agrees(self, messages: Sequence[Message], tools: Tools = None) -> bool:
        """Are the prompt's tokens in training those in sampling?  `messages` ends with the answer."""
        sample = self.conversation(messages, tools, trained_turns="last")
        prompt = self.prompt(messages[:-1], tools)
        return sample.tokens[: len(prompt)] == prompt.tokens and PROMPT_DIFFERS not in sample.info

    def check(self, samples: Sequence[Sample], *, imitates: bool, prompts: bool = False) -> None:
        """Refuse samples that must not be trained on; see `checks.check`."""
        checks.check(samples, self, imitates=imitates, prompts=prompts)

    def overlong(self, samples: Sequence[Sample], limit: int) -> list[tuple[int, int]]:
        """(index, length) of the samples of more than `limit` tokens; nothing is ever cut."""
        return [(i, len(sample)) for i, sample in enumerate(samples) if len(sample) > limit]

    # ---------------------------------------------------------------------------------------------------------
    # The rendering itself.

    def _render(
        self,
        messages: Sequence[Message],
        tools: Tools,
        trained: set[int],
        *,
        ask: bool = False,
        row: Row | None = None,
    ) -> Sample:
        return self._sample(self._page(messages, tools, trained, ask=ask), trained, row)

    def _page(self, messages: Sequence[Message], tools: Tools, trained: set[int], *, ask: bool = False) -> Rendering:
        """The rendered text with its tokens and the place of every content."""
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        self._refuse(messages, tools, trained)
        text = self.template.text(messages, tools, ask=ask)
        spans = self.template.contents(messages, tools, text, ask=ask)
        guarded = [(s.start, s.end, self.control.of(str(messages[s.message].get("role")))) for s in spans]
        self._refuse_unguarded(messages, text, spans)
        return Rendering(
            template=self.template,
            control=self.control,
            stops=self.stop_tokens,
            messages=messages,
            tools=tools,
            ask=ask,
            spans=spans,
            encoded=encode(self.tokenizer, text, guarded),
            lead=self._lead,
        )

    def _sample(self, page: Rendering, trained: set[int], row: Row | None) -> Sample:
        """The tokens of a page, with the answers in `trained` to be trained."""
        answers = page.answers()
        origin, on, trouble = page.origins(), [False] * len(page.encoded.ids), ""
        for answer in answers:
            wanted = answer.message in trained
            for t in range(answer.first, answer.last):
                origin[t] = int(Origin.DEMONSTRATION if wanted else Origin.CONTEXT)
            if wanted:
                page.refuse_rewritten(answer)
                trouble = trouble or page.differs(answer)
                for t in range(max(1, answer.first), answer.last):
                    on[t] = answer.inside is None or t in answer.inside
        spread, turn = page.encoded.spread, page.turns(answers)
        return _labelled(page.encoded.tokens, spread(origin), spread(on), spread(turn), row, trouble)

    def _refuse(self, messages: Sequence[Message], tools: Tools, trained: set[int]) -> None:
        """Refuse empty answers, answers with their stop token written out, and control tokens outside contents."""
        stops = [self.control.added[token] for token in self.stop_tokens if token in self.control.added]
        for i, message in enumerate(messages):
            role, body = message.get("role"), "".join(parts(message))
            if i in trained and not body.strip() and not (set(message) - {"role", "content"}):
                raise DataError(f"message {i} (role 'assistant') is empty, so only its end would be learnt; remove the row")
            if role == "assistant":
                for stop in stops:
                    if body.rstrip().endswith(stop):
                        raise DataError(
                            f"message {i} (role 'assistant') already ends with the stop token {stop!r}, which the "
                            "template writes itself; remove it from the data"
                        )
            others = strings({key: value for key, value in message.items() if key != "content"})
            _refuse_text(others, self.control.of(str(role)), f"message {i} (role {role!r}), outside its content,")
        _refuse_text(strings([tool for tool in tools or () if not callable(tool)]), self.control.outside, "the tools")

    def _refuse_unguarded(self, messages: Sequence[Message], text: str, spans: Sequence[Span]) -> None:
        """Refuse control text in a part of a content that the template rewrites: its place in the text is not known."""
        for i, message in enumerate(messages):
            body = "".join(parts(message))
            known = "".join(text[span.start : span.end] for span in spans if span.message == i)
            for word in self.control.of(str(message.get("role"))).values():
                if body.count(word) > known.count(word):
                    raise DataError(
                        f"message {i} (role {message.get('role')!r}) holds the text of the control token {word!r} in "
                        "a part that the template rewrites; remove it from the content"
                    )


def _source(tokenizer: PreTrainedTokenizerFast, template: str | None) -> str:
    """The text of the template to use."""
    own: Any = template if template is not None else tokenizer.chat_template
    if isinstance(own, Mapping):  # several named templates
        own = own.get("default")
    if not own:
        raise TemplateError(
            "the tokenizer has no chat template, so roles cannot be written; give one (--chat-template FILE, or "
            "Renderer(tokenizer, template=...)), or write prompt and completion as plain text "
            "(Renderer.plain(tokenizer))"
        )
    return str(own)


def _certain(template: Template, probe: Sequence[Message], text: str) -> list[Span]:
    spans = [span for span in template.contents(probe, None, text, ask=False) if span.message == 1]
    if not spans:
        raise TemplateError(
            "the chat template drops the assistant's content ('World' in a conversation of two messages); expected "
            "it to be written: give another template (--chat-template FILE)"
        )
    return spans


def _refuse_text(texts: Sequence[str], forbidden: Mapping[int, str], where: str) -> None:
    for text in texts:
        for word in forbidden.values():
            if word in text:
                raise DataError(f"{where} holds the text of the control token {word!r}; expected ordinary text: remove it")


def row_info(row: Row | None) -> dict[str, Any]:
    """The JSON values of a row that do not become tokens: answer, id, where it came from, ..."""
    return {key: value for key, value in (row or {}).items() if key not in RENDERED_KEYS and checks.is_json(value)}


def _labelled(tokens: list[int], origin: list[int], trained: list[bool], turn: list[int], row: Row | None, trouble: str) -> Sample:
    info = row_info(row)
    if trouble:
        info[PROMPT_DIFFERS] = trouble
    name = str((row or {}).get("id") or (row or {}).get("_source") or "")
    return Sample(tokens=tokens, origin=origin, trained=trained, turn=turn, group=name, query=name, info=info)


def renderer_of(model: Any, tokenizer: Any) -> Renderer:
    """The one renderer of a model: its template, and every token that its generation settings stop at."""
    return Renderer(tokenizer, generation_config=getattr(model.module, "generation_config", None))
