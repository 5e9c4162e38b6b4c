"""A maker turns models and rows into new rows: answers, rankings, preferences, critiques and revisions, step labels.

It is a frozen value whose fields are its settings, as a method is, and it is given a `Workshop`: the stage's rows, its models, and
who answers and judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from posttrain.distributed.world import World
from posttrain.errors import ConfigError, nearest
from posttrain.records import sample_to_json
from posttrain.types import Row, Sample, Sampling

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer
    from posttrain.judges.cache import CachedJudge
    from posttrain.judges.judge import Judge
    from posttrain.models.model import LanguageModel
    from posttrain.rewards.reward import Reward
    from posttrain.samplers.native import NativeSampler

__all__ = ["Made", "Maker", "Opened", "Workshop", "grouped", "message"]


@dataclass(frozen=True)
class Made:
    """What a sample stage leaves behind."""

    rows: list[dict[str, Any]]
    """Rows to train on, in any format that `data.formats` knows, or `{"sample": ...}` with the very tokens that were written."""
    metrics: dict[str, float]
    """Numbers for the summary."""
    records: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Further JSON lines beside the rows, by name: judgements, say, with all that led to them."""


@dataclass(frozen=True)
class Opened:
    """A model that is ready to write and to be read."""

    name: str
    """What the stage calls it."""
    source: str
    """Where it came from."""
    model: LanguageModel
    tokenizer: Any
    renderer: Renderer
    sampler: NativeSampler

    @property
    def identity(self) -> str:
        """A model as records name it: where it came from, and a digest of its weights."""
        return f"{self.source}@{self.model.fingerprint()[:12]}"


@dataclass
class Workshop:
    """What a maker works with."""

    sets: dict[str, list[Row]]
    """The stage's rows by the name of their set."""
    sources: Mapping[str, str | Path]
    """Models by name: `start`, and those that the stage names."""
    folder: Path
    """The stage's folder; what a maker keeps there survives a kill."""
    samples: int = 1
    """Answers to each prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    """How they are drawn."""
    rewards: tuple[Reward, ...] = ()
    """Who scores answers: the stage's rewards, else the task's."""
    values: Mapping[str, float] | None = None
    """Numbers of verdicts that differ from 0."""
    seed: int = 0
    world: World = field(default_factory=World)
    quiet: bool = False
    _opened: dict[str, Opened] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The first set of rows."""
        return next(iter(self.sets.values()))

    @property
    def draw(self) -> int:
        """The step under which a stage's answers are drawn: stages of one recipe share a seed, and each must draw anew."""
        return crc32(self.folder.name.encode())

    def need_several(self, what: str) -> None:
        """Raises ConfigError where a prompt has one answer, and there is nothing to compare."""
        if self.samples < 2:
            raise ConfigError(f"{what} the answers to one prompt: samples is {self.samples}, expected at least 2")

    def model(self, name: str = "start") -> Opened:
        """A model of the stage, loaded once.

        Raises:
            ConfigError: The stage names no such model.
        """
        if name not in self.sources:
            raise ConfigError(f"this stage has no model '{name}'{nearest(name, self.sources)}; name it under models")
        if name not in self._opened:
            same = [one for one in self._opened.values() if one.source == str(self.sources[name])]
            self._opened[name] = replace(same[0], name=name) if same else self._open(name)
        return self._opened[name]

    def _open(self, name: str) -> Opened:
        from posttrain.data.chat import renderer_of
        from posttrain.models.load import load
        from posttrain.samplers.native import NativeSampler

        model, tokenizer = load(self.sources[name])
        model.use_quickest()
        renderer = renderer_of(model, tokenizer)
        sampler = NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
        return Opened(name, str(self.sources[name]), model, tokenizer, renderer, sampler)

    def answers(
        self,
        rows: Sequence[Row],
        *,
        model: str = "start",
        samples: int | None = None,
        sampling: Sampling | None = None,
        step: int = 0,
    ) -> list[Sample]:
        """A model's answers to the prompts of rows, `samples` each side by side; every rank writes a share and gets them all.

        Args:
            rows: Each with a `prompt`.
            model: Who answers.
            samples: Answers to each; by default the stage's.
            sampling: How they are drawn; by default the stage's.
            step: With the seed, the key of what is drawn: other numbers give other answers.
        """
        from posttrain.experience import Desk

        who = self.model(model)
        copies = samples or self.samples
        desk = Desk(who.renderer, who.sampler, sampling or self.sampling, copies, self.seed, step, self.world)
        with self.progress(f"answers of {who.name}", len(rows) * copies) as advance:
            who.sampler.progress = lambda done, total: advance(done, total)
            try:
                return desk.rollout(rows)
            finally:
                who.sampler.progress = None

    def scored(self, samples: Sequence[Sample], *, model: str = "start") -> list[Sample]:
        """The samples with the verdicts and numbers of the stage's rewards; as they are where it has none."""
        from posttrain.rewards.runner import RewardRunner
        from posttrain.scoring import score_everywhere

        if not self.rewards:
            return list(samples)
        renderer = self.model(model).renderer
        with RewardRunner(max_failure_rate=0.5) as runner:
            return score_everywhere(self.rewards, samples, renderer, runner=runner, world=self.world, values=self.values)

    def text(self, sample: Sample, *, model: str = "start") -> str:
        """What was written after the prompt, without the token that ends it."""
        renderer = self.model(model).renderer
        return renderer.decode(sample.said(renderer.stop_tokens))

    def texts(
        self,
        prompts: Sequence[Sequence[Mapping[str, Any]]],
        *,
        model: str = "start",
        max_tokens: int = 0,
        temperature: float = 0.0,
        step: int = 0,
    ) -> list[tuple[str, bool]]:
        """What a model writes to each prompt, without white space around it, and whether it was cut at the limit.

        Args:
            prompts: One conversation each.
            model: Who writes.
            max_tokens: Longest text; 0: as long as an answer of the stage may be.
            temperature: 0 writes the likeliest.
            step: As of `answers`.
        """
        if not prompts:
            return []
        limit = max_tokens or self.sampling.max_tokens
        sampling = Sampling(temperature=temperature or 1.0, greedy=not temperature, max_tokens=limit)
        rows = [{"id": str(number), "prompt": prompt} for number, prompt in enumerate(prompts)]
        written = self.answers(rows, model=model, samples=1, sampling=sampling, step=step)
        return [(self.text(sample, model=model).strip(), sample.finish == "length") for sample in written]

    def judge(self, name: str) -> Judge:
        """A model of the stage as a judge."""
        from posttrain.judges.local import LocalJudge

        who = self.model(name)
        return LocalJudge(who.model, who.tokenizer, who.renderer, who.sampler, who.source)

    def cached(self, judge: Judge) -> CachedJudge:
        """A judge whose replies are kept in the stage's folder, so that a stage that was killed goes on."""
        from posttrain.judges.cache import CachedJudge

        return CachedJudge(judge, self.folder / "judge", f"replies-{self.world.rank}.jsonl")

    def pair(self, chosen: Sample, rejected: Sample, **more: Any) -> dict[str, Any]:
        """Two answers to a prompt as a row: texts to read, and the samples with the tokens to train on."""
        return {
            "id": chosen.query,
            "prompt": chosen.info["prompt"],
            "chosen": message(self.text(chosen)),
            "rejected": message(self.text(rejected)),
            "chosen_sample": sample_to_json(chosen),
            "rejected_sample": sample_to_json(rejected),
            **more,
        }

    def ranking(self, answers: Sequence[Sample], order: Sequence[int], **more: Any) -> dict[str, Any]:
        """The answers to a prompt as a row, with their places from the best to the worst."""
        return {
            "id": answers[0].query,
            "prompt": answers[0].info["prompt"],
            "responses": [message(self.text(sample)) for sample in answers],
            "ranking": list(order),
            "samples": [sample_to_json(sample) for sample in answers],
            **more,
        }

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """A bar that is told `(done, total)`; nothing is shown where there is no terminal."""
        from posttrain.report.live import counted

        with counted(what, quiet=self.quiet or self.world.rank != 0) as bar:
            if bar is not None:
                bar(0, total)
            yield bar or (lambda *_: None)


@dataclass(frozen=True, kw_only=True)
class Maker:
    """The base of every maker; concrete ones are final and override `make`."""

    def needs(self) -> tuple[str, ...]:
        """What a stage must have for it: 'rewards', or the names of models beside the start."""
        return ()

    def make(self, shop: Workshop) -> Made:
        """New rows.  Every rank calls it and gets the same."""
        raise NotImplementedError(f"{type(self).__name__} makes nothing")


def message(text: str) -> list[dict[str, Any]]:
    """An answer as a list of one message."""
    return [{"role": "assistant", "content": text}]


def grouped(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples by the group they belong to, in the order in which groups appear."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    return list(groups.values())
