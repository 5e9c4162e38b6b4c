"""Answers criticised and revised by a model under principles drawn from a constitution, as preference triples or demonstrations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.constitution import (
    Principle,
    critique_prompt,
    drawn,
    elicitation,
    fault_of,
    load_constitution,
    load_examples,
    revision_prompt,
)
from posttrain.errors import ConfigError
from posttrain.records import sample_to_json
from posttrain.synthesis.maker import Made, Maker, Workshop, message
from posttrain.types import Row, Sample


@dataclass
class Case:
    """One answer on its way through the rounds."""

    row: Row  # with the prompt that was given, which elicitation may have changed
    first: Sample
    texts: list[str]  # the answer, then its revisions
    faults: list[str] = field(default_factory=list)  # one a revision, "" where its form is right
    records: list[dict[str, Any]] = field(default_factory=list)  # one a revision


@dataclass(frozen=True, kw_only=True)
class Revisions(Maker):
    """The start answers; `critic` says by a drawn principle what is wrong with the answer and writes it again, `rounds` times.

    As `triples` a row is (prompt, chosen: the last revision, rejected: the first answer), for DPO or a reward model.  As
    `demonstrations` each revision is a completion of the prompt that was given, without the critique, for SFT; with no rounds these
    are the start's own answers.  A revision with a fault (empty, cut, or with text of the critique in it) ends its
    case and is not used; a pair whose two answers are the same text teaches nothing and is left out.  Whatever was asked and
    written is in `judgements.jsonl`.

    Source: Bai et al., "Constitutional AI: Harmlessness from AI Feedback", arXiv:2212.08073, section 3.1; triples and elicitation
    as in simplified public recipes.
    """

    constitution: str = ""
    """A YAML file of principles or the name of one that ships; empty: the seven default principles."""
    rounds: int = 1
    """Critiques and revisions of an answer, each under a principle drawn anew; the paper's: 4."""
    output: Literal["triples", "demonstrations"] = "triples"
    """Preference rows of first answer and last revision, or every revision as a demonstration."""
    elicit: bool = False
    """Does the critic first rewrite a benign prompt so that it tempts to violate the principle?"""
    examples: str = ""
    """A YAML file of worked examples that are shown before each case."""
    temperature: float = 0.0
    """Of critiques and revisions; 0 writes the likeliest."""
    max_tokens: int = 0
    """Longest critique or revision; 0: as long as an answer may be."""

    def __post_init__(self) -> None:
        if self.rounds < (1 if self.output == "triples" else 0):
            raise ConfigError(f"rounds is {self.rounds}; expected at least 1, or 0 for demonstrations that are not revised")
        if self.temperature < 0 or self.max_tokens < 0:
            raise ConfigError(f"found temperature {self.temperature}, max_tokens {self.max_tokens}; expected numbers >= 0")
        load_constitution(self.constitution)
        if self.examples:
            load_examples(self.examples)

    def make(self, shop: Workshop) -> Made:
        """Elicit, answer, and for each round criticise and revise."""
        critic = "critic" if "critic" in shop.sources else "start"
        principles, draw = load_constitution(self.constitution), shop.draw
        rows = self._elicited(shop, critic, principles, draw) if self.elicit else list(shop.rows)
        answers = shop.answers(rows, step=draw)
        copies = len(answers) // max(1, len(rows))
        cases = [Case(rows[place // copies], answer, [shop.text(answer)]) for place, answer in enumerate(answers)]
        for number in range(self.rounds):
            chosen = drawn(principles, len(cases), seed=shop.seed, step=draw + number)
            if self.elicit and number == 0:  # what the prompt was made to tempt to
                chosen = [next(p for p in principles if p.name == case.row["principle"]) for case in cases]
            pairs = [(case, principle) for case, principle in zip(cases, chosen, strict=True) if not any(case.faults)]
            self._round(shop, critic, pairs, number=number, draw=draw + 3 * number + 1)
        return self._made(shop, cases)

    def _elicited(self, shop: Workshop, critic: str, principles: Sequence[Principle], draw: int) -> list[Row]:
        """The rows with prompts that tempt to violate a principle each."""
        chosen = drawn(principles, len(shop.rows), seed=shop.seed, step=draw)
        asked = [elicitation(row["prompt"], principle) for row, principle in zip(shop.rows, chosen, strict=True)]
        rows: list[Row] = []
        for row, principle, (text, _) in zip(shop.rows, chosen, self._written(shop, critic, asked, draw), strict=True):
            last = {**row["prompt"][-1], "content": text.strip() or row["prompt"][-1]["content"]}
            rows.append({**row, "prompt": [*row["prompt"][:-1], last], "principle": principle.name, "benign": row["prompt"]})
        return rows

    def _written(self, shop: Workshop, who: str, prompts: Sequence[list[dict[str, Any]]], draw: int) -> list[tuple[str, bool]]:
        """One text a prompt, and whether it was cut at the limit."""
        return shop.texts(prompts, model=who, max_tokens=self.max_tokens, temperature=self.temperature, step=draw)

    def _round(self, shop: Workshop, critic: str, pairs: Sequence[tuple[Case, Principle]], *, number: int, draw: int) -> None:
        """Criticise and revise the latest text of each case."""
        examples = load_examples(self.examples) if self.examples else ()
        asked = [critique_prompt(case.row["prompt"], case.texts[-1], principle, examples) for case, principle in pairs]
        critiques = [text for text, _ in self._written(shop, critic, asked, draw)]
        then = [
            revision_prompt(case.row["prompt"], case.texts[-1], principle, critique, examples)
            for (case, principle), critique in zip(pairs, critiques, strict=True)
        ]
        revisions = self._written(shop, critic, then, draw + 1)
        start, other = shop.model().identity, shop.model(critic).identity
        for place, (case, principle) in enumerate(pairs):
            revision, cut = revisions[place]
            fault = fault_of(revision, critique=critiques[place], principle=principle, cut=cut)
            case.records.append(
                {
                    "id": f"{case.first.query}#{case.first.index}",
                    "kind": "revision",
                    "round": number + 1,
                    "principle": principle.name,
                    "prompt": case.row["prompt"],
                    "benign": case.row.get("benign"),
                    "before": case.texts[-1],
                    "critique": critiques[place],
                    "after": revision,
                    "fault": fault,
                    "critique_prompt": asked[place],
                    "revision_prompt": then[place],
                    "model": start,
                    "critic": other,
                }
            )
            case.texts.append(revision)
            case.faults.append(fault)

    def _made(self, shop: Workshop, cases: Sequence[Case]) -> Made:
        """Rows, what became of the cases, and all records."""
        counts = Counter(fault for case in cases for fault in case.faults if fault)
        rows: list[dict[str, Any]] = []
        same = 0
        for case in cases:
            base = {"id": f"{case.first.query}#{case.first.index}", "prompt": case.row["prompt"]}
            good = [text for text, fault in zip(case.texts[1:], case.faults, strict=True) if not fault]
            if self.output == "demonstrations":
                kept = good if self.rounds else ([] if case.first.finish == "length" else case.texts)
                rows += [{**base, "id": f"{base['id']}/{i}", "completion": message(text)} for i, text in enumerate(kept, start=1)]
            elif any(case.faults) or case.first.finish == "length":
                continue
            elif case.texts[-1] == case.texts[0].strip():
                same += 1
            else:
                rejected = {"rejected": message(case.texts[0]), "rejected_sample": sample_to_json(case.first)}
                rows.append({**base, "chosen": message(case.texts[-1]), **rejected, "columns": {"preference": 1.0}})
        total = max(1, sum(len(case.faults) for case in cases))
        changed = sum(record["before"].strip() != record["after"] for case in cases for record in case.records)
        metrics = {"answers": float(len(cases)), "rows": float(len(rows)), "changed": changed / total}
        metrics |= {name: counts[name] / total for name in ("empty", "cut", "leaked")}
        if self.output == "triples":
            metrics["same"] = same / max(1, len(cases))
        return Made(rows, metrics, {"judgements": [record for case in cases for record in case.records]})
