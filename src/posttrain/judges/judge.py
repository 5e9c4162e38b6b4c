"""The one seam to whoever judges: choose among options, or write.

A judge is asked with messages whose last one is the user's; behind it may stand one assistant message, the beginning of the
judge's own answer.  What cannot be had (the endpoint is down, the prompt does not fit) is a `Reply` with an error, never a guess.

>>> judge = ScriptedJudge(lambda text, options: [-0.1, -2.5] if options else "Because it is right.")
>>> judge.choose([[{"role": "user", "content": "Which is better, A or B?"}]], ("A", "B"))[0].logprobs
(-0.1, -2.5)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.errors import ConfigError

__all__ = ["Judge", "Messages", "Reply", "ScriptedJudge", "judge_named", "shown"]

Messages = Sequence[dict[str, str]]
"""`[{"role": "user", "content": ...}]`, perhaps with a system message before and the begun answer behind."""


@dataclass(frozen=True)
class Reply:
    """What a judge gave for one prompt."""

    logprobs: tuple[float, ...] = ()  # [K] of the options, absolute: the rest of 1 is mass on neither; empty when it wrote
    text: str = ""  # what it wrote
    error: str = ""  # why there is no answer; then the others are empty
    version: str = ""  # what an endpoint says it answered with


class Judge(Protocol):
    """Who answers: a local model, an endpoint, or a script."""

    @property
    def identity(self) -> str:
        """Who it is, with everything that decides its answers: the key of caches, and what records name."""
        ...

    def choose(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[Reply]:
        """How likely the answer begins with each option, and with no longer one: a reply a prompt, in order, `logprobs` `[K]`."""
        ...

    def write(self, prompts: Sequence[Messages], max_tokens: int) -> list[Reply]:
        """An answer in words, at temperature 0: a reply a prompt, in order."""
        ...


@dataclass(frozen=True)
class ScriptedJudge:
    """The judge that answers what a function says: for tests, and for rules written as a judge.

    Example:
        >>> ScriptedJudge(lambda text, options: "7").write([[{"role": "user", "content": "3 + 4?"}]], 8)[0].text
        '7'
    """

    fn: Callable[[str, tuple[str, ...]], Any]
    """`fn(text, options)`: log-probabilities of the options `[K]`, or, where there are none, what it writes; None is a failure."""
    name: str = "script"

    @property
    def identity(self) -> str:
        """Its name."""
        return f"scripted:{self.name}"

    def choose(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[Reply]:
        """The function's log-probabilities."""
        return [self._chosen(self.fn(shown(prompt), tuple(options)), options) for prompt in prompts]

    def write(self, prompts: Sequence[Messages], max_tokens: int) -> list[Reply]:
        """The function's text."""
        told = [self.fn(shown(prompt), ()) for prompt in prompts]
        return [Reply(error="the script gave no answer") if text is None else Reply(text=str(text)) for text in told]

    def _chosen(self, found: Any, options: Sequence[str]) -> Reply:
        if found is None:
            return Reply(error="the script gave no answer")
        logprobs = tuple(float(x) for x in found)
        if len(logprobs) != len(options) or any(math.isnan(x) or x > 1e-6 for x in logprobs):
            raise ConfigError(
                f"judge '{self.name}' gave {found} for the options {list(options)}; "
                f"return {len(options)} log-probabilities, each at most 0"
            )
        return Reply(logprobs=logprobs)


def shown(prompt: Messages) -> str:
    """The contents of a prompt's messages, one after another."""
    return "\n\n".join(message["content"] for message in prompt)


def judge_named(spec: str) -> Judge:
    """A judge by name.

    Args:
        spec: `local:FOLDER` (or any name that `models.load` opens, such as `local:tiny`), `openai:URL#MODEL` for a server that
            speaks the OpenAI protocol (the key is read from OPENAI_API_KEY), or `file.py:function` for a function of
            `(text, options)` as `ScriptedJudge` takes it.

    Raises:
        ConfigError: What was found is none of these, or what it names is not there.
    """
    head, colon, rest = spec.partition(":")
    if head == "local" and rest:
        from posttrain.judges.local import LocalJudge

        return LocalJudge.open(rest)
    if head == "openai" and rest:
        from posttrain.judges.endpoint import EndpointJudge

        url, mark, model = rest.partition("#")
        if not mark or not model or not re.match(r"https?://", url):
            raise ConfigError(f"found judge {spec!r}; write openai:URL#MODEL, for instance openai:http://localhost:8000/v1#judge")
        return EndpointJudge(url, model)
    file, colon, function = spec.rpartition(":")
    if colon and file.endswith(".py") and function:
        return _from_file(Path(file).expanduser(), function)
    raise ConfigError(f"found judge {spec!r}; write local:FOLDER, openai:URL#MODEL or file.py:function")


def _from_file(file: Path, function: str) -> ScriptedJudge:
    """The function of a file of the user's own, run here."""
    from posttrain.rewards.reference import load_file

    if not file.is_file():
        raise ConfigError(f"there is no file {file}; a judge is written file.py:function")
    fn = getattr(load_file(file), function, None)
    if not callable(fn):
        raise ConfigError(f"{file} has no function '{function}'; a judge is a function of (text, options)")
    content = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return ScriptedJudge(fn, name=f"{file.name}:{function}@{content}")
