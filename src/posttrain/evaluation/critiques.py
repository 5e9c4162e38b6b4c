"""What a critic's critiques and revisions are worth, on answers of which both are known."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.constitution import Principle, critique_prompt, revision_prompt
from posttrain.evaluation.accuracy import Outcome
from posttrain.evaluation.examiner import Examiner, entry, need_columns
from posttrain.report.statistics import proportion_interval
from posttrain.synthesis.maker import Workshop

__all__ = ["Critiques"]


@dataclass(frozen=True, kw_only=True)
class Critiques(Examiner):
    """The model criticises and revises the `response` of rows that hold the right `critique` and `revision`, greedily.

    Numbers, with Wilson intervals: `critique_accuracy` and `revision_accuracy` (the very text), among all rows and, as
    `critique_accuracy_faulty` and so on, among those that say `fault`.  The revision is asked for behind the model's own critique.
    """

    max_tokens: int = 64
    """Longest critique or revision."""
    task: str = "forbidden-words"
    """How the rows are called in the summary."""
    split: str = "test-critiques"
    """How their split is called in the summary."""

    def examine(self, shop: Workshop, *, model_name: str) -> Outcome:
        """The numbers, and one record a row."""
        needed = ("prompt", "response", "critique_request", "revision_request", "critique", "revision")
        need_columns(shop.rows, needed, kind="critiques")
        asked = [
            Principle(name="asked", critique=row["critique_request"], revision=row["revision_request"], choice="-")
            for row in shop.rows
        ]
        pairs = list(zip(shop.rows, asked, strict=True))
        prompts = [critique_prompt(row["prompt"], row["response"], p) for row, p in pairs]
        critiques = [text for text, _ in shop.texts(prompts, max_tokens=self.max_tokens)]
        prompts = [
            revision_prompt(row["prompt"], row["response"], asked_by, critique)
            for (row, asked_by), critique in zip(pairs, critiques, strict=True)
        ]
        revisions = [text for text, _ in shop.texts(prompts, max_tokens=self.max_tokens)]
        records = [
            {
                "kind": "critiques",
                "model": model_name,
                "id": row.get("id"),
                "response": row["response"],
                "expected": {"critique": row["critique"], "revision": row["revision"]},
                "critique": critique,
                "revision": revision,
                "fault": bool(row.get("fault")),
                "right": [critique == row["critique"], revision == row["revision"]],
            }
            for row, critique, revision in zip(shop.rows, critiques, revisions, strict=True)
        ]
        numbers = []
        for suffix, chosen in (("", records), ("_faulty", [record for record in records if record["fault"]])):
            for place, what in enumerate(("critique", "revision")):
                share = proportion_interval(sum(record["right"][place] for record in chosen), len(chosen))
                numbers.append(entry(model_name, self.task, self.split, f"{what}_accuracy{suffix}", len(chosen), share))
        return Outcome([number for number in numbers if number["n"]], records)
