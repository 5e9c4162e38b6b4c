"""A judge behind an OpenAI-compatible endpoint: `POST URL/chat/completions`, with the standard library alone.

Where the endpoint offers log-probabilities, options are read from the likeliest tokens; elsewhere from the votes of several
answers.  Asking again is tried for what may pass (429, 5xx, timeouts, broken replies); what will not pass (a wrong key, no such
model) stops at once.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, NoReturn

from posttrain.errors import ConfigError
from posttrain.judges.judge import Messages, Reply
from posttrain.judges.probabilities import option_logprobs

__all__ = ["EndpointJudge", "chosen_of", "vote_in"]

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which the same question may succeed."""
LARGEST_REPLY = 16 << 20
"""Bytes of a reply that are read."""


class _Failed(Exception):
    """This question has no answer; the text says why."""


class _NoLogprobs(Exception):
    """The endpoint answers, without log-probabilities."""


@dataclass
class EndpointJudge:
    """A model behind an endpoint.

    Raises:
        ConfigError: A setting is impossible.
    """

    url: str
    """For instance `https://host/v1`; `/chat/completions` is added."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; unset sends none.  The key is never shown or stored."""
    votes: int = 8
    """Answers that vote where there are no log-probabilities."""
    top_logprobs: int = 20
    """Tokens whose log-probabilities are asked for; 0 always votes."""
    prefill: bool = False
    """May a prompt begin the judge's answer?  vLLM and SGLang continue it; others do not."""
    concurrency: int = 8
    """Questions that are under way at once."""
    timeout_seconds: float = 60.0
    """Of one request."""
    deadline_seconds: float = 300.0
    """Of one question, with everything that is tried again."""
    attempts: int = 6
    """Requests for one answer at most."""
    wait_seconds: float = 0.5
    """Before the second request; doubled each time, 30 at most.  `Retry-After` counts where it is longer."""
    _votes_only: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if not re.match(r"https?://[^/]", self.url):
            raise ConfigError(f"the judge's url is {self.url!r}; write http(s)://HOST/v1")
        for name in ("votes", "concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the judge's {name} is {getattr(self, name)}; write at least 1")
        if self.timeout_seconds <= 0 or self.deadline_seconds <= 0:
            raise ConfigError("the judge's timeout_seconds and deadline_seconds must be above 0")

    @property
    def identity(self) -> str:
        """Endpoint and model, and how options are read."""
        return f"openai:{self.url}#{self.model} (top {self.top_logprobs}, {self.votes} votes)"

    def choose(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[Reply]:
        """See `Judge.choose`.

        Raises:
            ConfigError: The endpoint refuses in a way that asking again cannot mend.
        """
        return self._each([lambda prompt=prompt: self._choose(prompt, tuple(options)) for prompt in prompts])

    def write(self, prompts: Sequence[Messages], max_tokens: int) -> list[Reply]:
        """See `Judge.write`."""

        def one(prompt: Messages) -> Reply:
            found = self._ask(prompt, time.monotonic() + self.deadline_seconds, temperature=0.0, max_tokens=max_tokens)
            text = _content(found)
            return Reply(text=text, version=_version(found)) if text.strip() else Reply(error="the judge wrote nothing")

        return self._each([lambda prompt=prompt: one(prompt) for prompt in prompts])

    def _each(self, jobs: Sequence[Any]) -> list[Reply]:
        """The jobs side by side; one that fails is a reply with an error, a refusal ends them all."""

        def guarded(job: Any) -> Reply:
            try:
                reply: Reply = job()
                return reply
            except _Failed as cause:
                return Reply(error=str(cause))

        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [pool.submit(guarded, job) for job in jobs]
            try:
                return [each.result() for each in waiting]
            except BaseException:
                for each in waiting:
                    each.cancel()
                raise

    def _choose(self, prompt: Messages, options: tuple[str, ...]) -> Reply:
        deadline = time.monotonic() + self.deadline_seconds
        longest = max(8, *(len(option) for option in options))  # tokens; votes may come with marks around them
        if self.top_logprobs and not self._votes_only:
            try:
                asked = {"logprobs": True, "top_logprobs": self.top_logprobs}
                found = self._ask(prompt, deadline, temperature=0.0, max_tokens=longest, more=asked)
                return Reply(tuple(chosen_of(_places(found), options)), version=_version(found))
            except _NoLogprobs:
                self._votes_only = True
        counts, version = dict.fromkeys(options, 0), ""
        for number in range(self.votes):
            found = self._ask(prompt, deadline, temperature=1.0, max_tokens=longest, more={"seed": number})
            vote, version = vote_in(_content(found), options), _version(found)
            if vote is not None:
                counts[vote] += 1
        shares = [counts[option] / self.votes for option in options]
        return Reply(tuple(math.log(share) if share else -math.inf for share in shares), version=version)

    # --------------------------------------------------------------------------------------------------------- requests

    def _ask(
        self,
        prompt: Messages,
        deadline: float,
        *,
        temperature: float,
        max_tokens: int,
        more: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One completion, asked for until it comes or the deadline does."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(prompt),
            "temperature": temperature,
            "max_tokens": max_tokens,
            **(more or {}),
        }
        if prompt[-1]["role"] == "assistant":
            if not self.prefill:
                raise ConfigError("this template begins the judge's answer; set prefill=True where the endpoint continues it")
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        trouble = ""
        for attempt in range(self.attempts):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                return self._post(body, min(self.timeout_seconds, left))
            except _Passing as cause:
                trouble = str(cause)
                wait = min(30.0, max(self.wait_seconds * 2**attempt, cause.after)) * (0.75 + 0.5 * random.random())
            if attempt + 1 < self.attempts:
                time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
        tried = f"after {self.attempts} requests" if deadline > time.monotonic() else f"within {self.deadline_seconds:g} s"
        raise _Failed(f"{self.url} gave no answer {tried}; the last trouble: {trouble or 'the deadline'}")

    def _post(self, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        key = os.environ.get(self.key_variable, "")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers, method="POST")
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                raw = _body(response, time.monotonic() + timeout)
        except urllib.error.HTTPError as cause:
            self._refused(cause, asks_logprobs="logprobs" in body)
        except (OSError, HTTPException) as cause:  # timeouts, refused and dropped connections
            raise _Passing(f"{type(cause).__name__}: {cause}") from None
        try:
            found = json.loads(raw)
        except ValueError:
            raise _Passing(f"a reply that is not JSON: {raw[:80]!r}") from None
        choices = found.get("choices") if isinstance(found, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _Passing(f"a reply without choices: {json.dumps(found)[:200]}")
        return dict(found)

    def _refused(self, cause: urllib.error.HTTPError, *, asks_logprobs: bool) -> NoReturn:
        """What an HTTP error means.

        Raises:
            _Passing: Asking again may help.
            _NoLogprobs: It is about log-probabilities.
            ConfigError: Asking again will not help.
        """
        told = cause.read(2000).decode(errors="replace")
        if cause.code in PASSING:
            after = cause.headers.get("Retry-After", "")
            raise _Passing(f"HTTP {cause.code}: {told[:200]}", float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else 0.0)
        if cause.code in (400, 422) and asks_logprobs and "logprob" in told.lower():
            raise _NoLogprobs
        if cause.code in (400, 413, 422) and "context" in told.lower():
            raise _Failed(f"HTTP {cause.code}: {told[:200]}")
        hint = {401: f"; check {self.key_variable}", 403: f"; check {self.key_variable}", 404: "; check url and model"}
        raise ConfigError(f"{self.url} refused '{self.model}': HTTP {cause.code}: {told[:300]}{hint.get(cause.code, '')}")


class _Passing(Exception):
    """Trouble that may pass; `after` are the seconds the endpoint asks to wait."""

    def __init__(self, text: str, after: float = 0.0) -> None:
        super().__init__(text)
        self.after = after


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is refused: the key goes to the host that was named, and to no other."""

    def redirect_request(self, *args: Any, **more: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


def _body(response: Any, deadline: float) -> bytes:
    """What was sent, up to a size and a time: an endpoint that sends a byte a second is late too."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LARGEST_REPLY or time.monotonic() > deadline:
            raise TimeoutError(f"{size} bytes and no end within the time or size of a reply")
    if response.length:
        raise ConnectionError(f"{response.length} bytes of the reply did not come")
    return b"".join(parts)


def _content(found: dict[str, Any]) -> str:
    message = found["choices"][0].get("message")
    return str(message.get("content") or "") if isinstance(message, dict) else ""


def _version(found: dict[str, Any]) -> str:
    parts = (found.get("model"), found.get("system_fingerprint"))
    return " ".join(str(part) for part in parts if part)


def _places(found: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """(token that was written, log-probability of each of the likeliest) for each token of an answer.

    Raises:
        _NoLogprobs: There are none.
    """
    told = found["choices"][0].get("logprobs")
    content = told.get("content") if isinstance(told, dict) else None
    if not isinstance(content, list):
        raise _NoLogprobs
    try:
        return [
            (str(place["token"]), {str(top["token"]): float(top["logprob"]) for top in place["top_logprobs"]}) for place in content
        ]
    except (KeyError, TypeError, ValueError):
        raise _NoLogprobs from None


def chosen_of(places: Sequence[tuple[str, dict[str, float]]], options: Sequence[str]) -> list[float]:
    """The log-probability of each option from the likeliest tokens at the places of an answer that was written.

    White space before an option does not matter.  A token that only begins an option is followed where the answer went that
    way; elsewhere it counts for the option that it is, or for none.

    Args:
        places: For each token of the answer: the token, and the log-probabilities of the likeliest.
        options: K texts.

    Returns:
        `[K]`, `-inf` for an option that was not among the likeliest.
    """
    ways: dict[str, list[tuple[str, ...]]] = {option: [] for option in options}
    logprobs: dict[str, list[float]] = {option: [] for option in options}
    written: tuple[str, ...] = ()
    before = 0.0
    for token, likeliest in places:
        for top, logprob in likeliest.items():
            text = "".join((*written, top)).lstrip()
            if text in ways:
                ways[text].append((*written, top))
                logprobs[text].append(before + logprob)
        written, before = (*written, token), before + likeliest.get(token, -math.inf)
        text = "".join(written).lstrip()
        if before == -math.inf or not any(option.startswith(text) and option != text for option in options):
            break
    return option_logprobs([ways[option] for option in options], [logprobs[option] for option in options])


def vote_in(text: str, options: Sequence[str]) -> str | None:
    """The option that a whole answer is, marks around it aside: `(A)`, `[A]`, `A.`, `**A**`; None for anything else."""
    bare = re.sub(r"^[\s\"'*(\[]+|[\s\"'*)\].:]+$", "", text)
    return bare if bare in options else None
