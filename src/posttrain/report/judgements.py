"""`judgements.html`: what models said of answers, under a constitution's principles or not, beside the report of a run.

It is made of the `rows/judgements.jsonl` that sample stages leave (`synthesis.revisions`, `choices`, `preferences`).  As in the
report, nothing on the page runs or is loaded, and everything that a model wrote is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.files import atomic_write
from posttrain.report.lines import read_lines
from posttrain.report.templates import template_of

__all__ = ["Judged", "judgements_page", "judgements_of", "write_judgements"]

SHOWN = 40
"""Judgements of a stage that the page shows."""

KINDS = ("revision", "choice", "comparison", "selection")
"""A revision under a principle; K answers in every rotation; two answers in both orders; K answers in one order."""


@dataclass(frozen=True)
class Judged:
    """The judgements of one stage."""

    name: str
    records: list[dict[str, Any]]


def judgements_of(folder: str | Path) -> list[Judged]:
    """The stages of a run folder that judged, in order of their names, with the judgements of known kinds."""
    found = []
    for path in sorted(Path(folder).glob("*/rows/judgements.jsonl")):
        records = [_as_choice(record) for record in read_lines(path) if record.get("kind") in KINDS]
        if records:
            found.append(Judged(path.parent.parent.name, records))
    return found


def write_judgements(folder: str | Path) -> Path | None:
    """Write `judgements.html` into a run folder whose stages judged answers.

    Returns:
        The file; None where no stage did.

    Raises:
        CheckpointError: The file cannot be written; an earlier one stands.
    """
    found = judgements_of(folder)
    if not found:
        return None
    path = Path(folder) / "judgements.html"
    atomic_write(path, judgements_page(Path(folder).resolve().name, found).encode("utf-8", "replace"))
    return path


def judgements_page(name: str, found: Sequence[Judged]) -> str:
    """The page as HTML, the same for the same judgements."""
    stages = [
        {
            "name": stage.name,
            "total": len(stage.records),
            "models": _models(stage.records),
            "principles": _principles(stage.records),
            "shown": [_case(record) for record in _spread(stage.records)],
        }
        for stage in found
    ]
    return template_of("judgements.html.j2").render(name=name, stages=stages)


def _as_choice(record: dict[str, Any]) -> dict[str, Any]:
    """A judge's comparison or selection in the form of a choice: responses, their probabilities, and those of each order."""
    p = record.get("p")
    if record["kind"] == "comparison":
        first, second = record.get("pair") or (0, 1)
        answers = list(record.get("answers") or [])
        orders = [(one, 1 - one) if number == 0 else (1 - one, one) for number, one in enumerate(record.get("orders") or [])]
        own = {"responses": [answers[place] for place in (first, second) if place < len(answers)], "rotations": orders}
        return {**record, **own, "probabilities": [] if p is None else [p, 1 - p], "said": list(record.get("rationales") or [])}
    if record["kind"] == "selection":
        said = [record["rationale"]] if record.get("rationale") else []
        return {**record, "responses": list(record.get("answers") or []), "probabilities": list(p or []), "said": said}
    return record


def _spread(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `SHOWN` records, evenly over all."""
    count = min(SHOWN, len(records))
    return [records[place * len(records) // count] for place in range(count)]


def _models(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who answered and who judged, with the digests of their weights."""
    roles = {"model": "answers by", "critic": "critiques and revisions by", "judge": "choices by"}
    found = dict.fromkeys(f"{said} {record[role]}" for record in records for role, said in roles.items() if record.get(role))
    return list(found)


def _principles(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a principle: how often it was drawn, and what came of it."""
    lines = []
    for name in dict.fromkeys(_principle(record) for record in records):
        own = [record for record in records if _principle(record) == name]
        revised = [record for record in own if record["kind"] == "revision"]
        sure = [max(record["probabilities"]) for record in own if record.get("probabilities")]
        lines.append(
            {
                "name": name,
                "count": len(own),
                "changed": sum(map(_changed, revised)) if revised else "–",
                "faults": sum(bool(record.get("fault") or record.get("error")) for record in own),
                "confidence": f"{sum(sure) / len(sure):.3f}" if sure else "–",
            }
        )
    return lines


def _principle(record: Mapping[str, Any]) -> str:
    """What was judged by: a principle, or the question alone."""
    return str(record.get("principle") or record.get("template") or "")


def _changed(record: Mapping[str, Any]) -> bool:
    return str(record.get("before", "")).strip() != str(record.get("after", "")).strip()


def _case(record: Mapping[str, Any]) -> dict[str, Any]:
    """One judgement as the page shows it."""
    p = list(record.get("probabilities") or [])
    sent = [record[key] for key in ("critique_prompt", "revision_prompt") if record.get(key)]
    sent += list(record.get("choice_prompts") or [])
    return {
        "kind": record["kind"],
        "id": str(record.get("id", "")),
        "principle": _principle(record),
        "round": record.get("round"),
        "fault": str(record.get("fault") or ""),
        "changed": record["kind"] == "revision" and _changed(record),
        "prompt": _turns(record.get("prompt")),
        **{key: str(record.get(key) or "") for key in ("before", "critique", "after", "question", "error")},
        "said": [str(text) for text in record.get("said") or []],
        "responses": [str(response) for response in record.get("responses") or []],
        "probabilities": p,
        "rotations": list(record.get("rotations") or []),
        "names": [str(place) for place in range(1, len(p) + 1)],
        "best": _best(p),
        "sent": [_turns(messages) for messages in sent],
    }


def _best(p: Sequence[float]) -> int | None:
    """The place of the likeliest; None where another is as likely to what the page shows."""
    most = max(p, default=0.0)
    return p.index(most) if sum(f"{one:.3f}" == f"{most:.3f}" for one in p) == 1 else None


def _turns(messages: Any) -> str:
    """Messages as text, one turn a paragraph; anything else as it stands."""
    if not isinstance(messages, list):
        return str(messages or "")
    return "\n\n".join(f"[{turn.get('role', '')}] {turn.get('content', '')}" for turn in messages if isinstance(turn, Mapping))
