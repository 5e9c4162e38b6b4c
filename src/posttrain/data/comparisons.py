"""Comparisons in other forms: a ranking as its pairs, a pair as two labelled answers (`load_rows` reads all of them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["labelled", "ranked_pairs"]


def ranked_pairs(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of a ranking, the better response chosen: K responses make K (K - 1) / 2 rows of one `id`.

    Where a policy's own samples stand beside the responses, each pair brings the two with their tokens.
    """
    made = []
    for row in rows:
        rest = {key: value for key, value in row.items() if key not in ("responses", "ranking", "samples", "scores")}
        order, written = row["ranking"], row.get("samples")
        for better in range(len(order)):
            for worse in range(better + 1, len(order)):
                sides = {"chosen": order[better], "rejected": order[worse]}
                pair = {**rest, **{side: row["responses"][place] for side, place in sides.items()}, "ranks": [better, worse]}
                if written is not None:
                    pair |= {f"{side}_sample": written[place] for side, place in sides.items()}
                made.append(pair)
    return made


def labelled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two rows of every pair for methods that learn from labels (KTO): the chosen answer, true, and the rejected one, false.

    As many good as bad ones, so that weights of 1 fit.  Answers that a policy wrote keep their tokens.
    """
    sides = {f"{side}{end}" for side in ("chosen", "rejected") for end in ("", "_sample")}
    made = []
    for row in rows:
        rest = {key: value for key, value in row.items() if key not in sides}
        for side, label in (("chosen", True), ("rejected", False)):
            written = {"sample": row[f"{side}_sample"]} if f"{side}_sample" in row else {}
            made.append({**rest, "completion": row[side], **written, "label": label})
    return made
