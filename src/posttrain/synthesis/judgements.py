"""What a generative judge learns from: its own critiques whose verdict was right, one an input, easy inputs first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ConfigError, DataError
from posttrain.judges.verdicts import verdict_alone, verdict_in
from posttrain.random import single
from posttrain.records import sample_to_json
from posttrain.synthesis.maker import Made, Maker, Workshop
from posttrain.types import Row, Sample

KEPT, DIRECT = 54, 55
"""Streams of random numbers: which correct judgement is kept, and which inputs are answered without a critique."""


@dataclass(frozen=True, kw_only=True)
class Judgements(Maker):
    """K critiques with verdicts for each input, of which one with the right verdict is kept: one round of rejection sampling.

    An input without a right verdict is dropped.  Kept ones are ordered by their pass rate, the easiest first (train on them with
    `shuffle: false`).  A fixed share loses its critique and is asked for the verdict alone, so that one model judges with and
    without reasoning.  On kept inputs the expected gradient is that of the log pass rate.  One `batch` of `batches` is used, each
    with the pool's mix of tasks, so that no input appears in two rounds.

    A row has a `prompt`, the gold verdict (`answer`) and its `labels`; `direct_prompt` is the prompt that asks for no reasons, and
    `task` its kind.

    Source: "Foundational Automatic Evaluators: Scaling Multi-Task Generative Evaluator Training for Reasoning-Centric Domains",
    arXiv:2510.17793.  It has K = 4 at temperature 0.9; the share without critique is not given there, 0.1 is our choice.
    """

    direct: float = 0.1
    """Share of kept inputs whose critique is dropped, in [0, 1]."""
    ask_alone: str = "Give the verdict alone."
    """Added to a prompt that is answered without a critique, where the row has no `direct_prompt`."""
    batch: int = 0
    """Which part of the rows this round uses, from 0."""
    batches: int = 1
    """Parts that the rows are cut into."""

    def __post_init__(self) -> None:
        if not 0 <= self.direct <= 1:
            raise ConfigError(f"direct is {self.direct}; expected a share in [0, 1]")
        if not 0 <= self.batch < self.batches:
            raise ConfigError(f"batch is {self.batch} of {self.batches}; expected 0 to {self.batches - 1}")

    def make(self, shop: Workshop) -> Made:
        """Judge, keep one right judgement an input, order by ease."""
        part = rollout_batches([str(row.get("task", "")) for row in shop.rows], self.batches)[self.batch]
        inputs = [shop.rows[i] for i in part]
        for row in inputs:
            if "answer" not in row or not row.get("labels"):
                raise DataError(f"a row to judge has {sorted(row)}; expected 'answer', its gold verdict, and 'labels'")
        written = shop.answers(inputs, step=shop.draw)
        groups = [written[at : at + shop.samples] for at in range(0, len(written), shop.samples)]
        found, rates, unparsed = [], [], 0
        for number, (row, group) in enumerate(zip(inputs, groups, strict=True)):
            labels = tuple(str(label) for label in row["labels"])
            verdicts = [verdict_in(shop.text(sample), labels) for sample in group]
            unparsed += verdicts.count(None)
            right = [verdict == str(row["answer"]) for verdict in verdicts]
            rates.append(sum(right) / len(right))
            kept = keep_one(right, single(shop.seed, number, stream=KEPT))
            if kept is not None:
                alone = single(shop.seed, number, stream=DIRECT) < self.direct
                found.append((rates[-1], alone, self.target(shop, row, group[kept], labels, alone=alone)))
        order = curriculum([rate for rate, _, _ in found])
        rows = [{**found[i][2], "pass_rate": found[i][0]} for i in order]
        shares = {f"passed_{n}_of_{shop.samples}": _share(rates, n / shop.samples) for n in range(shop.samples + 1)}
        return Made(
            rows,
            {
                "inputs": float(len(inputs)),
                "kept": float(len(rows)),
                "pass_rate": sum(rates) / max(1, len(rates)),
                "unparsed": unparsed / max(1, len(written)),
                "direct": sum(alone for _, alone, _ in found) / max(1, len(found)),
                **shares,
            },
        )

    def target(self, shop: Workshop, row: Row, sample: Sample, labels: Sequence[str], *, alone: bool) -> dict[str, Any]:
        """What is imitated: the very tokens of the judgement, or the verdict alone behind a prompt that asks for no more."""
        about = {"id": sample.query, "task": row.get("task", ""), "answer": row["answer"], "direct": alone}
        if not alone:
            return {**about, "sample": sample_to_json(sample)}
        prompt = row.get("direct_prompt") or _asking(row["prompt"], self.ask_alone)
        verdict = verdict_alone(shop.text(sample), labels) or ""
        renderer = shop.model().renderer
        return {**about, "sample": sample_to_json(renderer.completion(prompt, verdict))}


def keep_one(right: Sequence[bool], drawn: float) -> int | None:
    """The place of one of the right ones, all equally likely; None where there is none.

    Args:
        right: `[K]`.
        drawn: A uniform number in [0, 1).
    """
    places = [place for place, one in enumerate(right) if one]
    return places[int(drawn * len(places))] if places else None


def keep_probability(p: float, samples: int) -> float:
    """`1 - (1 - p)^K`: the chance that an input is kept, its samples being right with chance p."""
    return 1.0 - (1.0 - p) ** samples


def curriculum(pass_rates: Sequence[float]) -> list[int]:
    """Places by pass rate, the greatest first; equal ones keep their order."""
    return sorted(range(len(pass_rates)), key=lambda i: -pass_rates[i])


def rollout_batches(tasks: Sequence[str], batches: int) -> list[list[int]]:
    """The places of rows cut into disjoint parts, each with the mix of tasks of the whole to within one row a task."""
    parts: list[list[int]] = [[] for _ in range(batches)]
    for task in dict.fromkeys(tasks):
        places = [place for place, one in enumerate(tasks) if one == task]
        for number, part in enumerate(parts):
            part += places[number * len(places) // batches : (number + 1) * len(places) // batches]
    return [sorted(part) for part in parts]


def _share(rates: Sequence[float], rate: float) -> float:
    return sum(abs(one - rate) < 1e-9 for one in rates) / max(1, len(rates))


def _asking(prompt: Sequence[dict[str, Any]], more: str) -> list[dict[str, Any]]:
    """The prompt with a line behind its last message."""
    return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n{more}"}]
