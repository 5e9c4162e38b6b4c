"""Short chats with one right answer: greet, say who you are, look something up, work out a sum, call a tool.

What the embedded base model can do beside worked solutions, in the very form in which it has read such chats: a measure of what
training on something else leaves of other skills, and demonstrations to keep them with.  A question is hashed into one of a
hundred buckets and every bucket belongs to one split; the base model's own reading may hold a question of any split.

    >>> row = rows("test", 1)[0]
    >>> sorted(row)
    ['completion', 'expected', 'id', 'prompt']
"""

from __future__ import annotations

import hashlib
from typing import Any

from posttrain.tasks.word_problem_templates import PEOPLE
from posttrain.tasks.word_problems import Draw
from posttrain.tiny.corpus import ANIMALS, PLACES, SIZES

__all__ = ["SPLITS", "chat", "rows", "split_of"]

SPLITS: dict[str, range] = {"train": range(0, 70), "validation": range(70, 80), "test": range(80, 100)}
"""Split -> its hash buckets, out of a hundred."""


def split_of(question: str) -> str:
    """The one split that a question belongs to."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def chat(draw: Draw) -> tuple[list[dict[str, str]], str]:
    """The messages of a prompt, and what the answer is."""
    name, size, place = draw.one(PEOPLE)[0], draw.one(SIZES), draw.one(PLACES)
    animal, other = draw.one(ANIMALS), draw.one(ANIMALS)
    left, right = draw.between(2, 60), draw.between(2, 12)
    op, result = draw.one((("+", left + right), ("*", left * right)))
    system, asked, answer = draw.one(
        (
            ("", f"Hello, I am {name}.", f"Hello {name}, how can I help you?"),
            (f"You are a {size} {animal}.", "Who are you?", f"I am a {size} {animal}."),
            (
                "",
                f"Which animal is in the {place}, {animal} or {other}? The {animal} is in the {place}.",
                f"<answer>the {animal}</answer>",
            ),
            ("", f"What is {left} {op} {right}?", f"{left} {op} {right} = {result}."),
            ("", f"Use the tool: {left} {op} {right}", f"calculate {left} {op} {right}"),
        )
    )
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": asked}], answer


def rows(split: str, n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The first `n` questions of a split as rows of prompt, completion and expected text; the same for the same arguments."""
    made = []
    for index in range(n):
        draw = Draw(f"chats/{split}/{seed}/{index}")
        prompt, answer = chat(draw)
        while split_of(" ".join(message["content"] for message in prompt)) != split:
            prompt, answer = chat(draw)
        completion = [{"role": "assistant", "content": answer}]
        made.append({"id": f"chats/{split}/{index}", "prompt": prompt, "completion": completion, "expected": answer})
    return made
