"""New prompts that a model writes after the pattern of some, without near copies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.formats import need
from posttrain.errors import ConfigError
from posttrain.judges.templates import conversation, fenced
from posttrain.random import shuffled
from posttrain.synthesis.maker import Made, Maker, Workshop

SEEDS = 56
"""Stream of random numbers that the shown prompts are drawn from."""


@dataclass(frozen=True, kw_only=True)
class Prompts(Maker):
    """Prompts written by the start: it is shown a few of the stage's, and asked for one more of the kind.

    Kept is what ended by itself, has enough words, and shares few n-grams with the seeds and with what was kept before.

    Sources: model-written prompts as in "Constitutional AI", arXiv:2212.08073, and "Self-Instruct", arXiv:2212.10560, which
    compares by ROUGE-L; the overlap of n-grams and its bounds are our choice.
    """

    count: int = 100
    """Prompts that are wanted."""
    shown: int = 3
    """Seeds in one request."""
    ask: str = "Write one more request of this kind, unlike these in what it is about. Reply with the request alone."
    """What the start is told below the seeds."""
    words: int = 3
    """Fewest words of a prompt."""
    ngram: int = 3
    """Words of the runs that are compared."""
    overlap: float = 0.5
    """Largest share of a prompt's n-grams that another one may have, in [0, 1]."""
    rounds: int = 8
    """Times that the start is asked for what is missing."""

    def __post_init__(self) -> None:
        if min(self.count, self.shown, self.words, self.ngram, self.rounds) < 1 or not 0 <= self.overlap <= 1:
            raise ConfigError("count, shown, words, ngram and rounds must be at least 1, and overlap in [0, 1]")

    def make(self, shop: Workshop) -> Made:
        """Ask for what is missing, round after round."""
        need(shop.rows, "prompts", "prompts")
        texts = [conversation(row["prompt"]) for row in shop.rows]
        others = [ngrams(text, self.ngram) for text in texts]
        rows: list[dict[str, Any]] = []
        tally = {"written": 0.0, "cut": 0.0, "short": 0.0, "copies": 0.0}
        for round_number in range(self.rounds):
            missing = self.count - len(rows)
            if missing <= 0:
                break
            shown = [self.drawn(shop.seed, round_number, number, len(texts)) for number in range(-(-missing // shop.samples))]
            requests = [{"id": f"request-{i}", "prompt": self.request([texts[j] for j in part])} for i, part in enumerate(shown)]
            for place, sample in enumerate(shop.answers(requests, step=shop.draw + round_number)):
                text, tally["written"] = shop.text(sample).strip(), tally["written"] + 1
                found = ngrams(text, self.ngram)
                if sample.finish == "length":
                    tally["cut"] += 1
                elif len(_WORDS.findall(text)) < self.words:
                    tally["short"] += 1
                elif any(shared(found, other) > self.overlap for other in others):
                    tally["copies"] += 1
                elif len(rows) < self.count:
                    others.append(found)
                    seeds = [str(shop.rows[j].get("id", j)) for j in shown[place // shop.samples]]
                    message = {"role": "user", "content": text}
                    rows.append({"id": f"{shop.folder.name}-{len(rows)}", "prompt": [message], "seeds": seeds})
        return Made(rows, {"prompts": float(len(rows)), **tally})

    def drawn(self, seed: int, round_number: int, number: int, count: int) -> list[int]:
        """The seeds of one request, all different."""
        return shuffled(seed, number, count, stream=SEEDS, step=round_number)[: self.shown]

    def request(self, seeds: Sequence[str]) -> list[dict[str, str]]:
        """What the start is asked."""
        shown = "\n".join(f"{number}.\n{fenced(text)}" for number, text in enumerate(seeds, start=1))
        return [{"role": "user", "content": f"{shown}\n{self.ask}"}]


_WORDS = re.compile(r"\w+")


def ngrams(text: str, n: int) -> frozenset[tuple[str, ...]]:
    """The runs of n words of a text, in lower case; the whole of a shorter one."""
    words = [word.lower() for word in _WORDS.findall(text)]
    if len(words) < n:
        return frozenset({tuple(words)})
    return frozenset(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def shared(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """The share of the first one's n-grams that the other has."""
    return len(one & other) / max(1, len(one))
