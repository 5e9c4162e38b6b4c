"""A local model as judge: the options' log-probabilities through the library's own forward, rationales through its sampler."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError
from posttrain.judges.judge import Messages, Reply
from posttrain.judges.probabilities import option_logprobs

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer
    from posttrain.models.model import LanguageModel
    from posttrain.types import Sample, Sampler

__all__ = ["LocalJudge", "option_ways"]

TOGETHER = 16384
"""Tokens of questions that are read in one forward."""

Way = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LocalJudge:
    """A language model of this process.

    An option is read with and without a space before it, over all its tokens; `1` does not count what goes on to `10`.
    """

    model: LanguageModel
    tokenizer: Any
    renderer: Renderer
    sampler: Sampler
    name: str

    @classmethod
    def open(cls, name: str | Path) -> LocalJudge:
        """Load a model: a folder, or any name that `models.load` knows.

        Raises:
            ConfigError: There is no such model.
        """
        from posttrain.data.chat import Renderer
        from posttrain.models.load import load
        from posttrain.samplers.native import NativeSampler

        model, tokenizer = load(name)
        model.module.requires_grad_(False)
        model.use_quickest()
        settings = getattr(model.module, "generation_config", None)
        make = Renderer if tokenizer.chat_template else Renderer.plain
        renderer = make(tokenizer, generation_config=settings)
        sampler = NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
        return cls(model, tokenizer, renderer, sampler, str(name))

    @cached_property
    def identity(self) -> str:
        """The folder's name, and a digest of all weights and of the chat template."""
        content = self.model.fingerprint() + str(self.renderer.template.source)
        return f"local:{Path(self.name).name}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def choose(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[Reply]:
        """See `Judge.choose`.

        Raises:
            ConfigError: Two options are the same tokens.
        """
        ways = option_ways(self.tokenizer, options)
        room = max(len(way) for option in ways for way in option)
        questions = [self._question(prompt) for prompt in prompts]
        replies = [self._too_long(question, room) for question in questions]
        open_ones = [i for i, reply in enumerate(replies) if reply is None]
        heads = sorted({way[:t] for option in ways for way in option for t in range(len(way))})
        for part in _parts(open_ones, [len(question.tokens) * len(heads) for question in questions]):
            seen = self._next([questions[i] for i in part], heads, ways)
            for i, after in zip(part, seen, strict=True):
                logprobs = [[sum(after[way[:t]][way[t]] for t in range(len(way))) for way in option] for option in ways]
                replies[i] = Reply(tuple(min(0.0, x) for x in option_logprobs(ways, logprobs)))
        return [reply or Reply(error="not read") for reply in replies]

    def _next(
        self, questions: Sequence[Sample], heads: Sequence[Way], ways: Sequence[Sequence[Way]]
    ) -> list[dict[Way, dict[int, float]]]:
        """For each question and each beginning of an option: the log-probability of each token that may come next."""
        import torch
        from torch import Tensor

        from posttrain.forward import read
        from posttrain.pack import pack
        from posttrain.reads import log_probabilities
        from posttrain.types import At, Read, View

        wanted = sorted({token for option in ways for way in option for token in way})
        columns = torch.tensor(wanted, device=self.model.device)

        def next_logprobs(logits: Tensor, at: At) -> Tensor:  # [n, V] -> [n, W]
            return log_probabilities(logits, at)[:, columns]

        rows = []
        for number, question in enumerate(questions):
            for head in heads:
                more = [*head, wanted[0]]  # the last one only marks the place that is read
                rows.append(
                    question.with_(
                        tokens=[*question.tokens, *more],
                        origin=[*question.origin, *[0] * len(more)],
                        trained=[*[False] * (len(question) + len(head)), True],
                        turn=[],
                        group=str(number),
                    )
                )
        batch = pack(rows, dtype=torch.float64 if self.model.dtype == torch.float64 else torch.float32)
        view = View("judge", (Read("next", "logits", next_logprobs),), grad=False)
        found = read({"judge": self.model}, batch.to(self.model.device), {"judge": view}).judge.next  # [B, T, W]
        last = [found[row, len(sample) - 1].tolist() for row, sample in enumerate(rows)]
        tables = [dict(zip(wanted, values, strict=True)) for values in last]
        return [dict(zip(heads, tables[i * len(heads) : (i + 1) * len(heads)], strict=True)) for i in range(len(questions))]

    def write(self, prompts: Sequence[Messages], max_tokens: int) -> list[Reply]:
        """See `Judge.write`."""
        from posttrain.types import Sampling

        questions = [self._question(prompt).with_(index=i) for i, prompt in enumerate(prompts)]
        replies = [self._too_long(question, 1) for question in questions]
        open_ones = [i for i, reply in enumerate(replies) if reply is None]
        sampling = Sampling(greedy=True, max_tokens=max_tokens)
        answers = self.sampler.sample([questions[i] for i in open_ones], sampling=sampling, seed=0, step=0)
        for i, answer in zip(open_ones, answers, strict=True):
            replies[i] = Reply(text=self.renderer.decode(answer.said(self.renderer.stop_tokens)))
        return [reply or Reply(error="not written") for reply in replies]

    def _question(self, prompt: Messages) -> Sample:
        """The rendered messages, and behind them the beginning of the judge's own answer."""
        from posttrain.data.encode import encode

        begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
        asked = self.renderer.prompt(list(prompt[:-1] if begun else prompt))
        more = encode(self.tokenizer, begun, [(0, len(begun), self.renderer.control.inside)]).tokens if begun else []
        zeros = [0] * len(more)
        return asked.with_(
            tokens=[*asked.tokens, *more],
            origin=[*asked.origin, *zeros],
            trained=[False] * (len(asked) + len(more)),
            turn=[],
            group="",
        )

    def _too_long(self, question: Sample, room: int) -> Reply | None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None or len(question.tokens) + room <= limit:
            return None
        return Reply(error=f"a question of {len(question.tokens)} tokens does not fit the judge's context of {limit}")


def option_ways(tokenizer: Any, options: Sequence[str]) -> list[list[Way]]:
    """The ways of writing each option as tokens: as it stands, and with a space before it.

    Raises:
        ConfigError: An option has no tokens, or two options share a way.
    """
    from posttrain.data.encode import ids_of

    ways = [list(dict.fromkeys(tuple(ids_of(tokenizer, text)) for text in (option, f" {option}"))) for option in options]
    owner: dict[Way, str] = {}
    for option, own in zip(options, ways, strict=True):
        for way in own:
            if not way or owner.setdefault(way, option) != option:
                shared = "has no tokens" if not way else f"is the same tokens as {owner[way]!r}"
                raise ConfigError(f"option {option!r} {shared} for this judge's tokenizer; choose other options")
    return ways


def _parts(numbers: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """The numbers in runs whose sizes add up to `TOGETHER` at most, or that are one."""
    part: list[int] = []
    for number in numbers:
        if part and sum(sizes[i] for i in part) + sizes[number] > TOGETHER:
            yield part
            part = []
        part.append(number)
    if part:
        yield part
