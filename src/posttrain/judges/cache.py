"""What a judge said, kept by content: a run that was killed goes on without asking twice.

One JSON line a reply in an append-only file.  The key is the sha256 of the judge's identity, the question and its settings, so
that another judge, template or option is another question.  A torn last line is what a kill leaves, and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.judges.judge import Judge, Messages, Reply

__all__ = ["CachedJudge", "key_of"]

TOGETHER = 32
"""Questions that are asked before their replies are written down."""


def key_of(identity: str, question: Any) -> str:
    """The sha256 of a judge and a question (JSON values)."""
    return hashlib.sha256(json.dumps([identity, question], sort_keys=True).encode()).hexdigest()


@dataclass
class CachedJudge:
    """A judge that asks another one what it was not asked before.

    Every `*.jsonl` of the folder is read and one is written, so that several ranks may share a folder.  Failures are not kept:
    they are asked for again.
    """

    judge: Judge
    folder: Path
    file: str = "replies.jsonl"
    """What this process writes, in the folder."""
    asked: int = 0
    """Questions that went to the judge."""
    kept: int = 0
    """Questions that were answered from the folder."""
    versions: set[str] = field(default_factory=set)
    """What endpoints said they answered with."""
    _replies: dict[str, Reply] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                self._replies.update(_read(line))

    @property
    def identity(self) -> str:
        """That of the judge."""
        return self.judge.identity

    def choose(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[Reply]:
        """As the judge's own."""
        settings = {"options": list(options)}
        return self._replied(prompts, settings, lambda asked: self.judge.choose(asked, options))

    def write(self, prompts: Sequence[Messages], max_tokens: int) -> list[Reply]:
        """As the judge's own."""
        return self._replied(prompts, {"max_tokens": max_tokens}, lambda asked: self.judge.write(asked, max_tokens))

    def _replied(
        self, prompts: Sequence[Messages], settings: dict[str, Any], ask: Callable[[list[Messages]], list[Reply]]
    ) -> list[Reply]:
        keys = [key_of(self.identity, [list(prompt), settings]) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._replies}
        failed: dict[str, Reply] = {}
        todo = list(new.items())
        for start in range(0, len(todo), TOGETHER):
            part = todo[start : start + TOGETHER]
            replies = dict(zip([key for key, _ in part], ask([prompt for _, prompt in part]), strict=True))
            failed |= {key: reply for key, reply in replies.items() if reply.error}
            self._keep({key: reply for key, reply in replies.items() if not reply.error})
        self.asked, self.kept = self.asked + len(new), self.kept + len(prompts) - len(new)
        found = [failed.get(key) or self._replies[key] for key in keys]
        self.versions |= {reply.version for reply in found if reply.version}
        return found

    def _keep(self, replies: dict[str, Reply]) -> None:
        """Append replies, behind a line end where a kill tore the last line."""
        if not replies:
            return
        self._replies.update(replies)
        with (self.folder / self.file).open("ab+") as out:
            if out.tell():
                out.seek(-1, os.SEEK_END)
                if out.read(1) != b"\n":
                    out.write(b"\n")
            out.write("".join(_line(key, reply) for key, reply in replies.items()).encode())
            out.flush()
            os.fsync(out.fileno())


def _line(key: str, reply: Reply) -> str:
    logprobs = [None if x == -math.inf else x for x in reply.logprobs]
    return json.dumps({"key": key, "logprobs": logprobs, "text": reply.text, "version": reply.version}) + "\n"


def _read(line: bytes) -> dict[str, Reply]:
    """The reply of one line by its key; nothing where the line is torn."""
    try:
        found = json.loads(line)
        logprobs = tuple(-math.inf if x is None else float(x) for x in found["logprobs"])
        return {str(found["key"]): Reply(logprobs, str(found["text"]), version=str(found["version"]))}
    except (ValueError, KeyError, TypeError):
        return {}
