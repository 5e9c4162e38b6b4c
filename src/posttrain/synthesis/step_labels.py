"""Step labels for process reward models: by a checker of each step, or by rollouts from every prefix (Math-Shepherd)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from posttrain.data.steps import written_ends
from posttrain.errors import ConfigError, DataError
from posttrain.experience import gather_samples
from posttrain.formulas.steps import hard_labels, soft_labels
from posttrain.records import sample_from_json, sample_to_json
from posttrain.synthesis.maker import Made, Maker, Workshop
from posttrain.tasks.word_problem_steps import solution_steps, step_ends, written_steps
from posttrain.types import Origin, Row, Sample

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer

__all__ = ["SPLITTERS", "StepLabels", "ends_of_steps", "lines"]


def lines(text: str) -> list[int]:
    """One past the last character of each line with something on it.

    >>> lines("3 + 4 = 7\\n\\n7 * 2 = 14")
    [10, 21]
    """
    ends, place = [], 0
    for line in text.splitlines(keepends=True):
        place += len(line)
        if line.strip():
            ends.append(place)
    return ends


SPLITTERS: Mapping[str, Callable[[str], list[int]]] = {"sentences": step_ends, "lines": lines}
"""Name -> where the steps of a text end."""


def ends_of_steps(sample: Sample, renderer: Renderer, split: Callable[[str], list[int]]) -> list[int]:
    """`[K]`: the place in the sample of the token that completes each step; the token that ends the answer belongs to none."""
    first = sample.prompt_length
    written = sample.said(renderer.stop_tokens)
    ends = split(renderer.decode(written))
    return [first + place for place in written_ends(written, ends, renderer.decode)] if ends else []


@dataclass(frozen=True, kw_only=True)
class StepLabels(Maker):
    """Worked answers with a label for each step, as `process_reward` learns from them.

    Rows are prompts, which the start answers, or answers that an earlier stage wrote (`sample`).  The last step's label is
    whether the answer is right; it is the row's `label` too, so that reward models of outcomes and of steps learn from the same
    solutions.

    Source: "Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human Annotations", arXiv:2312.08935, section 3.3.
    """

    labels: Literal["checked", "hard", "soft"] = "checked"
    """By a checker of word problems' steps, against the row's worked solution where it has one; by rollouts, 1 where any of them
    ends right; or the share of them that does."""
    completions: int = 8
    """Rollouts from each prefix (N), for 'hard' and 'soft'."""
    split: str = "sentences"
    """Where steps end: 'sentences' of a worked word problem, or 'lines'."""

    def __post_init__(self) -> None:
        if self.split not in SPLITTERS:
            raise ConfigError(f"split is '{self.split}'; expected one of {', '.join(SPLITTERS)}")
        if self.labels == "checked" and self.split != "sentences":
            raise ConfigError(
                "labels 'checked' knows the sentences of word problems alone; write labels: hard, or split: sentences"
            )
        if self.completions < 1:
            raise ConfigError(f"completions is {self.completions}; expected at least 1")

    def needs(self) -> tuple[str, ...]:
        """Whether an answer is right is what its last step, and every rollout, is judged by."""
        return ("rewards",)

    def make(self, shop: Workshop) -> Made:
        """Answer where nothing is written yet, cut into steps, label."""
        rows = {str(row.get("id", number)): row for number, row in enumerate(shop.rows)}
        if all("sample" in row for row in shop.rows):
            answers = [sample_from_json(row["sample"]) for row in shop.rows]
            answers = [replace(sample, index=number) for number, sample in enumerate(answers)]
        else:
            answers = shop.answers(shop.rows)
        answers = [sample for sample in shop.scored(answers) if sample.reward is not None]
        renderer = shop.model().renderer
        ends = [ends_of_steps(sample, renderer, SPLITTERS[self.split]) for sample in answers]
        kept = [number for number, each in enumerate(ends) if each]
        answers, ends = [answers[i] for i in kept], [ends[i] for i in kept]
        if self.labels == "checked":
            labels = [self._checked(shop, sample, len(each), rows) for sample, each in zip(answers, ends, strict=True)]
        else:
            labels = self._rolled_out(shop, answers, ends)
        made = [_row(sample, each, marks) for sample, each, marks in zip(answers, ends, labels, strict=True)]
        flat = [mark for marks in labels for mark in marks]
        return Made(
            made,
            {
                "answers": float(len(made)),
                "steps": float(len(flat)),
                "right_steps": sum(flat) / max(1, len(flat)),
                "right_answers": sum((sample.reward or 0.0) >= 1 for sample in answers) / max(1, len(answers)),
                "prompts": float(len(rows)),
            },
        )

    def _checked(self, shop: Workshop, sample: Sample, count: int, rows: Mapping[str, Row]) -> list[float]:
        """Labels of one answer by the checker of each step."""
        row = {"prompt": sample.info["prompt"], "answer": sample.info["answer"], **rows.get(sample.query, {})}
        steps = (solution_steps if "completion" in row else written_steps)(shop.text(sample), row)
        if len(steps) != count:
            raise DataError(f"{sample.query}: {len(steps)} steps are checked and {count} were cut; the row's texts do not fit")
        return [float(step.right) for step in steps]

    def _rolled_out(self, shop: Workshop, answers: Sequence[Sample], ends: Sequence[Sequence[int]]) -> list[list[float]]:
        """Labels by `completions` rollouts from the end of each step but the last."""
        prefixes = [
            replace(
                sample,
                tokens=sample.tokens[: end + 1],
                origin=[o if o < Origin.POLICY else int(Origin.PREFIX) for o in sample.origin[: end + 1]],
                trained=[False] * (end + 1),
                turn=sample.turn[: end + 1],
                logprobs=None,
                sampled_logprobs=None,
                verdicts={},
                reward=None,
            )
            for sample, each in zip(answers, ends, strict=True)
            for end in each[:-1]
        ]
        copies = [
            replace(prefix, index=number * self.completions + copy, group=str(number))
            for number, prefix in enumerate(prefixes)
            for copy in range(self.completions)
        ]
        who = shop.model("completer") if "completer" in shop.sources else shop.model()
        mine = [prompt for prompt in copies if int(prompt.group) % shop.world.size == shop.world.rank]
        with shop.progress("rollouts from prefixes", len(copies)) as advance:
            who.sampler.progress = advance
            written = who.sampler.sample(mine, sampling=shop.sampling, seed=shop.seed, step=1)
            who.sampler.progress = None
        judged = shop.scored(gather_samples(shop.world, written))
        right = torch.tensor([(sample.reward or 0.0) >= 1 for sample in judged]).view(-1, self.completions)
        marks = (hard_labels if self.labels == "hard" else soft_labels)(right).tolist() if len(prefixes) else []
        rest = iter(marks)
        return [
            [*(next(rest) for _ in each[:-1]), float((sample.reward or 0.0) >= 1)]
            for sample, each in zip(answers, ends, strict=True)
        ]


def _row(sample: Sample, ends: Sequence[int], labels: Sequence[float]) -> dict[str, Any]:
    """An answer with its labels at the tokens that end its steps; null elsewhere."""
    marks: list[float | None] = [None] * len(sample)
    for end, label in zip(ends, labels, strict=True):
        marks[end] = label
    right = float((sample.reward or 0.0) >= 1)
    named = {"id": f"{sample.query}#{sample.index}", "label": right}
    return {**named, "sample": sample_to_json(sample), "columns": {"step_label": marks}}
