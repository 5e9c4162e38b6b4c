"""What a recipe means: its task, rows, rewards, methods and settings, all of which are looked at before anything runs."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.distributed.world import World
from posttrain.errors import ConfigError, DataError, extra, nearest
from posttrain.evaluation.accuracy import Evaluation
from posttrain.method import Method, Optimizer
from posttrain.options import build
from posttrain.recipe import DataSpec, EvaluateSpec, Recipe, StageSpec, sets_of
from posttrain.rewards.reward import Reward
from posttrain.run import Run
from posttrain.types import Row, Sampling

if TYPE_CHECKING:
    from posttrain.evaluation.examiner import Examiner
    from posttrain.synthesis.maker import Maker, Workshop


@dataclass
class Plan:
    """A recipe and the folder it runs into."""

    recipe: Recipe
    out: Path
    quiet: bool = False
    _read: dict[str, list[Row]] = field(default_factory=dict)

    def folder_of(self, name: str) -> str | Path:
        """What a stage's name means as a model: its output, or the base."""
        if name == "base":
            return self.recipe.model
        if any(stage.name == name for stage in self.recipe.stages):
            return self.out / name / "model"
        return name

    def rows(self, spec: DataSpec, what: str) -> list[Row]:
        """The rows that a data specification names.

        Raises:
            ConfigError: It names nothing, or two things.
        """
        key = spec.model_dump_json()
        if key not in self._read:
            found = self._rows(spec, what)
            if spec.stages:  # made while the recipe runs
                return found
            self._read[key] = found
        return self._read[key]

    def _rows(self, spec: DataSpec, what: str) -> list[Row]:
        given = [key for key in ("split", "file", "stage", "mix") if getattr(spec, key)]
        if len(given) != 1:
            raise ConfigError(f"{what}: data names {given or 'nothing'}; expected exactly one of split, file, stage, mix")
        end = None if spec.count is None else spec.skip + spec.count
        if spec.split:
            found = list(self.task(what, spec.task).rows(spec.split, end, spec.seed))
        elif spec.file:
            from posttrain.data.rows import load_rows

            found = load_rows(spec.file, rename=spec.rename, split=spec.hub_split, limit=end)
        elif spec.stage:
            lines = (self.out / spec.stage / "rows" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines if line]
        else:
            found = [row for part in spec.mix for row in self._rows(part, what)]
        if not found[spec.skip : end]:
            if not spec.stage:
                raise DataError(f"{what}: the data is empty" + (f" after the first {spec.skip} rows" if spec.skip else ""))
            more = f"; {spec.skip} of its rows are skipped, and it has {len(found)}" if found else "; it kept no sample"
            raise DataError(f"{what}: stage '{spec.stage}' gave no rows{more}")
        return found[spec.skip : end]

    def task(self, what: str, given: Mapping[str, Any] | str | None = None) -> Any:
        """A task, by default the recipe's.

        Raises:
            ConfigError: None is given and the recipe has none.
        """
        from posttrain.tasks import task

        given = given or self.recipe.task
        if given is None:
            raise ConfigError(f"{what}: this needs a task; write 'task: word-problems' into the recipe")
        options = {"name": given} if isinstance(given, str) else dict(given)
        return task(options.pop("name"), **options)

    def rewards(self, stage: StageSpec | EvaluateSpec) -> tuple[Reward, ...]:
        """The rewards of a stage: the task's own unless it names some."""
        where, other = (stage.name, None) if isinstance(stage, StageSpec) else ("evaluate", stage.task)
        if not stage.rewards:
            return tuple(self.task(where, other).rewards)
        from posttrain.rewards.named import named_rewards

        named = [self._placed(name) for name in stage.rewards]
        return named_rewards(named, task=self.task(where, other) if other or self.recipe.task else None)

    def _placed(self, reward: str) -> str:
        """A reward's name with the folder in place of the stage that made its model: `model:rm` -> `model:out/rm/model`."""
        from posttrain.rewards.parse import parts_of_model_reward

        kind, source, rest = parts_of_model_reward(reward)
        return f"{kind}:{self.folder_of(source)}{rest}" if source else reward

    def build_run(self, stage: StageSpec, *, rows: Mapping[str, Sequence[Row]] | None = None) -> Run:
        """The `Run` of a train stage; `rows` stand in place of its data."""
        method = build_method(str(stage.train), stage.method)
        if stage.data is None:
            raise ConfigError(f"stage '{stage.name}' has no data")
        if rows is None:
            rows = {name: self.rows(spec, stage.name) for name, spec in sets_of(stage).items()}
        settings = dict(stage.run)
        samples = any(part.method.rows == "prompts" for part in method.parts().values())
        sampling = dict(settings.pop("sampling", {}))
        if samples and self.recipe.task is not None:
            sampling.setdefault("max_tokens", self.task(stage.name).max_tokens)
        more: dict[str, Any] = {}
        if settings.get("lora") is not None:
            from posttrain.models.lora import Lora

            more["lora"] = build(Lora, settings.pop("lora"), what="lora")
        if settings.get("evaluate_every") and self.recipe.task is not None:
            more["evaluation"] = validation(self.task(stage.name), self.recipe.seed)
        return build(
            Run,
            {
                "seed": self.recipe.seed,
                **settings,
                "method": method,
                "model": str(self.folder_of(stage.start)),
                "models": {name: str(self.folder_of(source)) for name, source in stage.models.items()},
                "data": rows["data"] if isinstance(stage.data, DataSpec) else rows,
                "out": str(self.out / stage.name),
                "rewards": self.rewards(stage) if samples else (),
                "verdicts": {**self._verdicts(stage, samples=samples), **settings.get("verdicts", {})},
                "sampling": build(Sampling, sampling, what="sampling"),
                "optimizer": build(Optimizer, dict(settings.pop("optimizer", {})), what="optimizer"),
                "quiet": self.quiet,
                **self._watched(stage),
                **more,
            },
            what=f"stage '{stage.name}'",
        )

    def _verdicts(self, stage: StageSpec, *, samples: bool) -> dict[str, float]:
        """The numbers of the task's verdicts, where the stage samples."""
        return dict(self.task(stage.name).values) if samples and self.recipe.task is not None else {}

    def _watched(self, stage: StageSpec) -> dict[str, Any]:
        """The settings of an evaluation while the stage trains: accuracy on a split of the task."""
        watch = stage.watch
        if watch is None:
            return {}
        spec = EvaluateSpec(of=[], split=watch.split, count=watch.count, samples=0)
        return {"evaluation": self.evaluation(spec), "evaluate_every": watch.every}

    def evaluation(self, spec: EvaluateSpec) -> Evaluation:
        """What an evaluation of accuracy asks, of any model."""
        unread = [key for key in ("data", "models", "rewards", "options") if getattr(spec, key)]
        if unread:
            raise ConfigError(f"evaluate: kind 'accuracy' asks the task and does not read {unread[0]}; it reads split and count")
        rows = (spec.split, spec.count, spec.seed)
        return _of_task(
            self.task("evaluate", spec.task), rows, samples=spec.samples, max_tokens=spec.max_tokens, seed=self.recipe.seed
        )

    def examiner(self, spec: EvaluateSpec) -> Examiner:
        """An evaluation that is not of accuracy, from its options.

        Raises:
            ConfigError: There is no such kind, or an option is not its own.
        """
        from posttrain.evaluation import examiner_named

        if not sets_of(spec):
            raise ConfigError(f"evaluate: kind '{spec.kind}' needs data: a stage, a file or a split")
        return build(examiner_named(spec.kind), spec.options, what=f"evaluate {spec.kind}")

    # ------------------------------------------------------------------------------------------ before anything runs

    def check(self) -> None:
        """Refuse what a later stage would refuse, before the first one works.

        Raises:
            PosttrainError: The first thing that cannot be honoured, by its stage.
        """
        if self.recipe.task is not None:
            self.task(self.recipe.name)
        for stage in self.recipe.stages:
            for source in (stage.built_on, *stage.models.values()):
                self._check_model(source)
            if stage.verb == "train":
                self._check_train(stage)
            elif stage.verb == "sample":
                self._check_sample(stage)
            elif stage.verb == "normalise" and not sets_of(stage):
                raise ConfigError(f"stage '{stage.name}' has no data; name the rows whose answers are to score 0 on average")
        for spec in self.recipe.evaluate:
            if spec.kind == "accuracy":
                self.evaluation(spec)
            else:
                self.examiner(spec)
            for name in (*spec.of, *spec.models.values()):
                self._check_model(name)

    def _check_model(self, name: str) -> None:
        """Is a model that no stage makes there, as far as can be seen here?"""
        from posttrain.models.load import resolve

        if all(stage.name != name for stage in self.recipe.stages):
            resolve(self.folder_of(name))

    def _check_train(self, stage: StageSpec) -> None:
        """Settings, rewards and rows of a train stage; rows that a stage is to write are taken to fit."""
        from posttrain.data.formats import need
        from posttrain.wiring import wanted_models

        later = {name for name, spec in sets_of(stage).items() if spec.stages}
        read = {name: [] if name in later else self.rows(spec, stage.name) for name, spec in sets_of(stage).items()}
        run = self.build_run(stage, rows=read)
        wanted = wanted_models(run.method)
        for name in stage.models:
            if name not in wanted:
                raise ConfigError(f"stage '{stage.name}': {stage.train} reads no model '{name}'{nearest(name, wanted[1:])}")
        if run.lora is not None:
            extra("peft", "peft")
        for part in run.method.parts().values():
            name = part.data or next(iter(read))
            if name not in read:
                raise ConfigError(f"stage '{stage.name}': a part reads data set '{name}', and the stage has {sorted(read)}")
            if part.supply is None and name not in later:
                need(read[name], part.method.rows, f"stage '{stage.name}': {stage.train}")

    def maker(self, stage: StageSpec) -> Maker:
        """What a sample stage writes, from its settings.

        Raises:
            ConfigError: Its settings do not fit together.
        """
        from posttrain.synthesis import maker_named

        made = build(maker_named(str(stage.sample)), stage.method, what=f"stage '{stage.name}': {stage.sample}")
        if not sets_of(stage):
            raise ConfigError(f"stage '{stage.name}' has no data")
        unread = sorted(set(stage.run) - {"sampling"})
        if unread:
            raise ConfigError(f"stage '{stage.name}' samples and does not read run.{unread[0]}; it reads run.sampling")
        has = {"start", *stage.models, *(["rewards"] if stage.rewards or self.recipe.task is not None else [])}
        lacks = [need for need in made.needs() if need not in has]
        if lacks:
            what = (
                "has no rewards; name some, or a task"
                if lacks[0] == "rewards"
                else f"needs a model '{lacks[0]}'; name it under models"
            )
            raise ConfigError(f"stage '{stage.name}': '{stage.sample}' {what}")
        return made

    def workshop(self, spec: StageSpec | EvaluateSpec, *, start: str, folder: Path, world: World | None = None) -> Workshop:
        """What a sample stage's maker, or an evaluation that is not of accuracy, works with."""
        from posttrain.synthesis.maker import Workshop

        name = spec.name if isinstance(spec, StageSpec) else f"evaluate {spec.kind}"
        other = spec.task if isinstance(spec, EvaluateSpec) else None
        task = self.task(name, other) if other or self.recipe.task is not None else None
        options = dict(spec.run.get("sampling", {})) if isinstance(spec, StageSpec) else {}
        if task is not None:
            options.setdefault("max_tokens", task.max_tokens)
        sources = {"start": start, **spec.models}
        return Workshop(
            sets={key: self.rows(data, name) for key, data in sets_of(spec).items()},
            sources={key: self.folder_of(source) for key, source in sources.items()},
            folder=folder,
            samples=max(1, spec.samples),
            sampling=build(Sampling, options, what=f"{name}: sampling"),
            rewards=self.rewards(spec) if spec.rewards or task is not None else (),
            values=task.values if task is not None else None,
            seed=self.recipe.seed,
            world=world or World(),
            quiet=self.quiet,
        )

    def _check_sample(self, stage: StageSpec) -> None:
        """Settings, rewards and rows of a sample stage."""
        self.maker(stage)
        build(Sampling, stage.run.get("sampling", {}), what=f"stage '{stage.name}': sampling")
        if stage.rewards:
            self.rewards(stage)
        for data in sets_of(stage).values():
            if not data.stages:
                self.rows(data, stage.name)


def validation(task: Any, seed: int, *, count: int = 100) -> Evaluation:
    """What `evaluate_every` watches: greedy answers to questions of the task's validation split, of its last where it has none."""
    split = "validation" if "validation" in task.splits else task.splits[-1]
    return _of_task(task, (split, count, seed), seed=seed)


def _of_task(task: Any, rows: tuple[str, int, int], *, seed: int, samples: int = 0, max_tokens: int | None = None) -> Evaluation:
    """An evaluation by a task's own rewards; `rows` are split, count and seed of its questions."""
    return Evaluation(
        task=task.name,
        rows=list(task.rows(*rows)),
        rewards=tuple(task.rewards),
        verdicts=task.values,
        split=rows[0],
        samples=samples,
        max_tokens=max_tokens or task.max_tokens,
        seed=seed,
    )


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method by name, or a user's own as `file.py:Class`, from its fields.

    Raises:
        ConfigError: There is no such method, or an option is not its own.
    """
    from posttrain.methods import method

    if ".py:" in name:
        from posttrain.rewards.reference import load_file

        file, _, attribute = name.rpartition(":")
        if not Path(file).is_file():
            raise ConfigError(f"there is no file {file} that could hold the method '{attribute}'")
        try:
            cls = getattr(load_file(file), attribute, None)
        except Exception as cause:
            place = getattr(cause, "lineno", None) or traceback.extract_tb(cause.__traceback__)[-1].lineno
            raise ConfigError(f"{file} could not be run ({type(cause).__name__} at line {place}): {cause}") from cause
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise ConfigError(f"{file} has no Method called '{attribute}'; expected a class that derives from posttrain.Method")
        return build(cls, options, what=attribute)
    return build(method(name), options, what=name)


__all__ = ["Plan", "build_method", "validation"]
