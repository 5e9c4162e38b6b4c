"""Demonstrations paired with the start's own answers: what SPIN trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain.errors import DataError
from posttrain.records import sample_to_json
from posttrain.synthesis.maker import Made, Maker, Workshop, message
from posttrain.types import Row, Sample


def as_prompt(row: Row, number: int) -> dict[str, Any]:
    """A demonstration as `prompt` and `completion`; of a conversation the last answer is the completion.

    Raises:
        DataError: The row is no demonstration.
    """
    if "prompt" in row and "completion" in row:
        return dict(row)
    turns = row.get("messages") or []
    if len(turns) > 1 and turns[-1].get("role") == "assistant" and turns[-2].get("role") != "assistant":
        rest = {key: value for key, value in row.items() if key != "messages"}
        return {**rest, "prompt": turns[:-1], "completion": turns[-1:]}
    place = row.get("_source", f"row {number}")
    raise DataError(
        f"{place}: opponents answer the prompts of demonstrations: found the columns {sorted(row)}; expected prompt + completion, "
        "or messages that end with an answer"
    )


def trained_tokens(sample: Sample) -> list[int]:
    """The tokens that an objective trains: an answer with the token that ends it, without what a template adds."""
    return [token for token, on in zip(sample.tokens, sample.trained, strict=True) if on]


@dataclass(frozen=True, kw_only=True)
class Opponents(Maker):
    """The demonstration is chosen, what the start writes to the same prompt is rejected.

    One round of self-play: train `spin` from the same start on these rows.  A later round that also learns from the round before
    reads both: `data: {mix: [{stage: opponents-1}, {stage: opponents-2}]}`.  An answer that is the demonstration, token by
    token, teaches nothing and is left out.

    Source: Chen et al., "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models", arXiv:2401.01335,
    algorithm 1 and the public code.
    """

    drop_right: bool = False
    """Leave out answers whose reward is at least 1: with a verifier, what is right need not be pushed down."""
    truncated: bool = False
    """Are answers that were cut at the limit used?  They can be told apart by their missing end alone."""

    def needs(self) -> tuple[str, ...]:
        """A verifier, where right answers are left out."""
        return ("rewards",) if self.drop_right else ()

    def make(self, shop: Workshop) -> Made:
        """Answer, and pair with the demonstrations."""
        demonstrations = [as_prompt(row, number) for number, row in enumerate(shop.rows)]
        asked = [{key: value for key, value in row.items() if key != "completion"} for row in demonstrations]
        answers = shop.answers(asked, step=shop.draw)
        if self.drop_right:
            answers = shop.scored(answers)
        renderer, rows = shop.model().renderer, []
        counts = dict.fromkeys(("same", "cut", "right"), 0)
        copies = len(answers) // len(demonstrations)
        for place, answer in enumerate(answers):
            row = demonstrations[place // copies]
            real = renderer.completion(row["prompt"], row["completion"], row.get("tools"), row=row)
            if trained_tokens(real) == trained_tokens(answer):
                counts["same"] += 1
            elif answer.finish == "length" and not self.truncated:
                counts["cut"] += 1
            elif self.drop_right and (answer.reward is None or answer.reward >= 1):
                counts["right"] += 1
            else:
                rows.append(_pair(shop, row, answer))
        shares = {name: count / max(1, len(answers)) for name, count in counts.items()}
        return Made(rows, {"demonstrations": float(len(demonstrations)), "pairs": float(len(rows)), **shares})


def _pair(shop: Workshop, row: Row, answer: Sample) -> dict[str, Any]:
    """A demonstration and the opponent's answer as a row."""
    completion = row["completion"]
    return {
        "id": f"{answer.query}#{answer.index}",
        "prompt": row["prompt"],
        **({"tools": row["tools"]} if row.get("tools") else {}),
        "chosen": message(completion) if isinstance(completion, str) else completion,
        "rejected": message(shop.text(answer)),
        "rejected_sample": sample_to_json(answer),
    }
