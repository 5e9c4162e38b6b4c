"""Rows become samples: demonstrations as they stand, pairs, and the policy's own answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import TYPE_CHECKING, Any

from posttrain.data.comparisons import ranked_pairs
from posttrain.data.steps import label_column, step_columns
from posttrain.distributed.world import World
from posttrain.errors import ConfigError, DataError
from posttrain.records import sample_from_json, sample_to_json
from posttrain.types import Origin, Row, Sample, Sampler, Sampling

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer


def row_identity(row: Row, number: int) -> str:
    """What a row is called in samples and reports: its id, else where it came from, else its number."""
    return str(row.get("id") or row.get("_source") or f"row-{number}")


def _info(row: Row) -> dict[str, Any]:
    """What rewards and reports need of a row beside its messages."""
    from posttrain.data.chat import RENDERED_KEYS

    return {key: value for key, value in row.items() if key not in RENDERED_KEYS or key == "text"}  # a reward may read it


def _columns(row: Row) -> dict[str, Any]:
    """The row's named values; null, which is no value, becomes NaN."""
    given = row.get("columns", {})
    return {name: [nan if v is None else v for v in value] if isinstance(value, list) else value for name, value in given.items()}


@dataclass
class Desk:
    """The one implementation of `types.Writer`: what a method's `experience` turns rows into samples with."""

    renderer: Renderer
    sampler: Sampler | None = None
    sampling: Sampling = field(default_factory=Sampling)
    samples_per_prompt: int = 1
    seed: int = 0
    step: int = 0
    world: World = field(default_factory=World)
    numbered: int = 0
    """Samples of this step that have their number already."""
    done: Callable[[Sample], None] | None = None
    """Told of every answer of a rollout as soon as it is whole."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by phase (`render`, `sample`)."""

    def _spent(self, phase: str, since: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - since

    def _number(self, samples: list[Sample]) -> list[Sample]:
        """Give every sample its global number in this step, the key of counter-based randomness."""
        first, self.numbered = self.numbered, self.numbered + len(samples)
        return [replace(sample, index=first + i) for i, sample in enumerate(samples)]

    def demonstrations(self, row: Row) -> list[Sample]:
        """What one row teaches by imitation; a row that a policy wrote before keeps its very tokens."""
        if "sample" in row:
            return [as_demonstration(sample_from_json(row["sample"]))]
        return self.renderer.demonstrations(row)

    def _rendered(self, rows: Sequence[Row], make: Callable[[Row, str, dict[str, Any]], Sequence[Sample]]) -> list[Sample]:
        """The samples that `make` gives of each row (and of its name and columns, to which it may add), one group a row."""
        began = time.perf_counter()
        samples = []
        for number, row in enumerate(rows):
            name, columns, info = row_identity(row, number), _columns(row), _info(row)
            for sample in make(row, name, columns):
                own = {**sample.info, **info}
                samples.append(replace(sample, group=f"{self.step}/{number}", query=name, info=own, columns=columns))
        self._spent("render", began)
        return self._number(samples)

    def replay(self, rows: Sequence[Row]) -> list[Sample]:
        """Demonstrations as they stand: one sample a row (one a turn where a template drops earlier thinking)."""
        return self._rendered(rows, lambda row, *_: self.demonstrations(row))

    def pair(self, row: Row) -> list[Sample]:
        """Chosen and rejected of one row; what a policy wrote before (`chosen_sample`, `rejected_sample`) keeps its very tokens."""
        if "ranking" in row and "chosen" not in row:  # every pair of a ranking
            return [sample for one in ranked_pairs([row]) for sample in self.pair(one)]
        if "chosen_sample" not in row and "rejected_sample" not in row:
            return list(self.renderer.pair(row))
        written = {side: row.get(f"{side}_sample") for side in ("chosen", "rejected")}
        return [
            as_demonstration(sample_from_json(record))
            if record is not None
            else self.renderer.completion(row["prompt"], row[side], row.get("tools"), row=row)
            for side, record in written.items()
        ]

    def replay_or_prompts(self, rows: Sequence[Row]) -> list[Sample]:
        """Rows as they would be trained on, whatever they hold: pairs, demonstrations, or prompts."""
        if all("chosen" in row or "chosen_sample" in row for row in rows):
            return self.pairs(rows)
        if all("responses" in row and "ranking" in row for row in rows):
            return self.rankings(rows)
        imitated = all(any(key in row for key in ("messages", "completion", "text", "sample")) for row in rows)
        return self.replay(rows) if imitated else self.prompts(rows, 1)

    def pairs(self, rows: Sequence[Row]) -> list[Sample]:
        """Chosen and rejected, two samples a row, in this order."""
        return self._rendered(rows, lambda row, *_: self.pair(row))

    def rankings(self, rows: Sequence[Row]) -> list[Sample]:
        """All responses of a row as one group, best first; those that a policy wrote before (`samples`) keep their very tokens."""

        def ranked(row: Row, *_: Any) -> Sequence[Sample]:
            if "samples" in row:
                return [as_demonstration(sample_from_json(row["samples"][place])) for place in row["ranking"]]
            return self.renderer.ranking(row)

        return self._rendered(rows, ranked)

    def steps(self, rows: Sequence[Row]) -> list[Sample]:
        """Worked answers with the columns `step_end` and `step_label`, `[T]`; one sample a row."""

        def stepped(row: Row, name: str, columns: dict[str, Any]) -> Sequence[Sample]:
            try:
                if "step_label" in columns and "sample" in row:
                    sample = as_demonstration(sample_from_json(row["sample"]))
                    columns |= label_column(columns, len(sample))
                else:
                    sample, ends = self.renderer.stepped(row)
                    columns |= step_columns(len(sample), ends, row["labels"])
            except DataError as cause:
                raise DataError(f"{name}: {cause}") from cause
            return [sample]

        return self._rendered(rows, stepped)

    def prompts(self, rows: Sequence[Row], copies: int) -> list[Sample]:
        """Prompts ready to be continued, `copies` of each standing together as a group."""
        began = time.perf_counter()
        prompts = []
        for number, row in enumerate(rows):
            prompt = self.renderer.prompt(row["prompt"], row.get("tools"))
            prompt = replace(prompt, group=f"{self.step}/{number}", query=row_identity(row, number))
            prompts += [replace(prompt, info={**_info(row), "prompt": row["prompt"]})] * copies
        self._spent("render", began)
        return self._number(prompts)

    def rollout(self, rows: Sequence[Row], *, samples: int | None = None, temperature: float | None = None) -> list[Sample]:
        """The policy's own answers, `samples` a row (default: the run's), grouped by row.

        Each rank writes the answers to its share of the rows; every rank gets them all.
        """
        if self.sampler is None:
            raise ConfigError("this method samples, and the run has no sampler")
        sampling = self.sampling if temperature is None else replace(self.sampling, temperature=temperature)
        prompts = self.prompts(rows, samples or self.samples_per_prompt)
        began = time.perf_counter()
        copies = samples or self.samples_per_prompt
        mine = [p for i, p in enumerate(prompts) if (i // copies) % self.world.size == self.world.rank]
        answers = self.sampler.sample(mine, sampling=sampling, seed=self.seed, step=self.step, done=self.done)
        self._spent("sample", began)
        return gather_samples(self.world, answers)


def gather_samples(world: World, samples: list[Sample]) -> list[Sample]:
    """The samples of all ranks, in the order of their numbers."""
    if world.size == 1:
        return samples
    records = world.all_gather_json([sample_to_json(sample) for sample in samples])
    everyone = [sample_from_json(record) for part in records for record in part]
    return sorted(everyone, key=lambda sample: sample.index)


def as_demonstration(sample: Sample) -> Sample:
    """A sample that a policy wrote, as something to imitate: the same tokens, origin DEMONSTRATION."""
    origin = [int(Origin.DEMONSTRATION) if o == Origin.POLICY else o for o in sample.origin]
    return replace(sample, origin=origin, temperature=1.0)
