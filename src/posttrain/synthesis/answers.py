"""The start's answers to prompts, judged and sieved: rejection sampling, best-of-n, or all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.errors import ConfigError
from posttrain.records import sample_to_json
from posttrain.rewards.readable import is_readable
from posttrain.synthesis.maker import Made, Maker, Workshop
from posttrain.types import Sample


@dataclass(frozen=True, kw_only=True)
class Answers(Maker):
    """Answers of the start with the very tokens it wrote, ready to imitate.

    Source: rejection sampling for SFT as in RFT, arXiv:2308.01825, and the 600 k set of DeepSeek-R1, arXiv:2501.12948.
    """

    keep: Literal["all", "passed", "best"] = "all"
    """Every answer, those whose reward is at least 1, or the best to each prompt."""
    most: int = 0
    """Answers to one prompt that are kept at most, so that easy prompts do not crowd out others; 0 keeps all."""
    distinct: bool = False
    """Keep one of several answers to a prompt that are the same text."""
    readable: bool = False
    """Leave out what a reader would not follow: see `rewards.readable.is_readable`."""

    def __post_init__(self) -> None:
        if self.most < 0:
            raise ConfigError(f"most is {self.most}; expected a number >= 0, 0 for no limit")

    def needs(self) -> tuple[str, ...]:
        """What is kept by its reward needs one."""
        return () if self.keep == "all" else ("rewards",)

    def make(self, shop: Workshop) -> Made:
        """Answer, score, sieve."""
        scored = shop.scored(shop.answers(shop.rows))
        clear = [sample for sample in scored if not self.readable or is_readable(shop.text(sample))]
        kept = self.sieved(clear)
        rewards = [sample.reward for sample in scored if sample.reward is not None]
        rows = [{"id": f"{sample.query}#{sample.index}", "sample": sample_to_json(sample)} for sample in kept]
        return Made(
            rows,
            {
                "samples": float(len(scored)),
                "kept": float(len(kept)),
                "prompts_kept": float(len({sample.group for sample in kept})),
                "reward": sum(rewards) / max(1, len(rewards)),
                **({"readable": len(clear) / max(1, len(scored))} if self.readable else {}),
            },
        )

    def sieved(self, samples: Sequence[Sample]) -> list[Sample]:
        """What is kept, in the order in which it was written."""
        kept = list(samples)
        if self.keep == "passed":
            kept = [sample for sample in samples if (sample.reward or 0.0) >= 1.0]
        elif self.keep == "best":
            kept = best_of_each(samples)
        if self.distinct:
            kept = list({(sample.group, tuple(sample.completion)): sample for sample in reversed(kept)}.values())[::-1]
        if not self.most:
            return kept
        seen: Counter[str] = Counter()
        few = []
        for sample in kept:
            seen[sample.group] += 1
            if seen[sample.group] <= self.most:
                few.append(sample)
        return few


def best_of_each(samples: Sequence[Sample]) -> list[Sample]:
    """The best-scored sample of each group, the first of equals; groups in order of their first sample."""
    best: dict[str, Sample] = {}
    for sample in samples:
        if sample.reward is not None and (sample.group not in best or sample.reward > (best[sample.group].reward or 0.0)):
            best[sample.group] = sample
    return list(best.values())
