"""Answers of the start compared by a judge under principles drawn from a constitution: soft preference pairs, or rankings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.constitution import drawn, load_constitution
from posttrain.constitution.choice import Case, Choice, choose, ranked
from posttrain.errors import ConfigError
from posttrain.judges.probabilities import clamped
from posttrain.judges.templates import template_named
from posttrain.synthesis.maker import Made, Maker, Workshop, grouped
from posttrain.types import Sample


@dataclass(frozen=True, kw_only=True)
class Choices(Maker):
    """K answers of the start to each prompt; the model `judge` chooses among them by a principle that is drawn for the prompt.

    They are lettered options; the judge is asked K times, with the options rotated, and the letters' probabilities are averaged.
    As `pairs`, every two answers become a row whose `preference` is p_i / (p_i + p_j), at least 0.5, which `bradley_terry` reads;
    as `rankings`, a row has all answers in order.  Answers that are the same text count once.  Whatever was asked and said is
    in `judgements.jsonl`.

    Source: Bai et al., "Constitutional AI: Harmlessness from AI Feedback", arXiv:2212.08073, section 4.1; more than two options and
    rotations as in public recipes.
    """

    constitution: str = ""
    """A YAML file of principles or the name of one that ships; empty: the seven default principles."""
    output: Literal["pairs", "rankings"] = "pairs"
    """Pairs with a soft preference, or whole rankings."""
    template: str = "multiple-choice"
    """The question: a template with letters, by name or as `FILE.yaml:NAME`."""
    least: float = 0.5
    """Pairs whose preference is below it are left out; 0.5 keeps all."""
    clamp: float = 1.0
    """Preferences are at most this, and at least 1 - this; the paper's 0.6 is for judges that reason first."""

    def __post_init__(self) -> None:
        if not (0.5 <= self.least < 1 and 0.5 < self.clamp <= 1):
            raise ConfigError(f"found least {self.least}, clamp {self.clamp}; expected least in [0.5, 1) and clamp in (0.5, 1]")
        load_constitution(self.constitution)
        template_named(self.template)

    def needs(self) -> tuple[str, ...]:
        """Somebody must choose."""
        return ("judge",)

    def make(self, shop: Workshop) -> Made:
        """Answer, compare, order."""
        shop.need_several("choices compare")
        answered, single = [], 0
        for samples in grouped(shop.answers(shop.rows, step=shop.draw)):
            different: dict[str, Sample] = {}
            for sample in samples:
                if shop.text(sample).strip():
                    different.setdefault(shop.text(sample), sample)
            if len(different) > 1:
                answered.append(list(different.values()))
            else:
                single += 1
        principles = drawn(load_constitution(self.constitution), len(answered), seed=shop.seed, step=shop.draw)
        cases = [
            Case(samples[0].info["prompt"], tuple(shop.text(sample) for sample in samples), principle)
            for samples, principle in zip(answered, principles, strict=True)
        ]
        with shop.progress("choices", len(cases)):
            choices = choose(shop.cached(shop.judge("judge")), cases, template_named(self.template))
        return self._made(shop, answered, cases, choices, single)

    def _made(
        self, shop: Workshop, answered: Sequence[Sequence[Sample]], cases: Sequence[Case], choices: Sequence[Choice], single: int
    ) -> Made:
        rows: list[dict[str, Any]] = []
        start, judge = shop.model().identity, shop.model("judge").identity
        records = []
        for samples, case, choice in zip(answered, cases, choices, strict=True):
            if choice.p:
                rows += self._rows(shop, samples, choice)
            records.append(
                {
                    "id": samples[0].query,
                    "kind": "choice",
                    "principle": case.principle.name,
                    "question": case.principle.choice,
                    "prompt": case.prompt,
                    "responses": list(case.responses),
                    "probabilities": list(choice.p),
                    "rotations": [list(rotation) for rotation in choice.rotations],
                    "neither": choice.neither,
                    "error": choice.error,
                    "choice_prompts": list(choice.asked),
                    "model": start,
                    "judge": judge,
                }
            )
        read = [choice for choice in choices if choice.p]
        n = max(1, len(read))
        metrics = {
            "prompts": float(len(cases) + single),
            "compared": float(len(cases)),
            "one_answer": float(single),
            "rows": float(len(rows)),
            "unread": float(len(choices) - len(read)),
            "confidence": sum(max(choice.p) for choice in read) / n,
            "neither": sum(choice.neither for choice in read) / n,
            "same_choice_in_all_orders": sum(len({ranked(r)[0] for r in choice.rotations}) == 1 for choice in read) / n,
        }
        return Made(rows, metrics, {"judgements": records})

    def _rows(self, shop: Workshop, samples: Sequence[Sample], choice: Choice) -> list[dict[str, Any]]:
        """All answers of a prompt by their probability, or every two of them, the more probable one chosen."""
        order = ranked(choice.p)
        if self.output == "rankings":
            return [shop.ranking(samples, order, probabilities=list(choice.p))]
        rows = []
        for i, j in itertools.combinations(order, 2):
            preference = clamped(choice.p[i] / (choice.p[i] + choice.p[j]), 1 - self.clamp, self.clamp)
            if preference >= self.least:
                name = f"{samples[i].query}#{i}-{j}"
                rows.append(shop.pair(samples[i], samples[j], id=name, columns={"preference": preference}))
        return rows
