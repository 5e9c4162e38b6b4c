"""What a recipe means: its task, rows, rewards, methods and settings, all of which are looked at before anything runs."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, DataError, extra, nearest
from posttrain.evaluation.accuracy import Evaluation
from posttrain.method import Method, Optimizer
from posttrain.options import build
from posttrain.recipe import DataSpec, EvaluateSpec, Recipe, StageSpec
from posttrain.rewards.reward import Reward
from posttrain.run import Run
from posttrain.types import Row, Sampling


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
            if spec.stage:  # made while the recipe runs
                return found
            self._read[key] = found
        return self._read[key]

    def _rows(self, spec: DataSpec, what: str) -> list[Row]:
        given = [key for key in ("split", "file", "stage") if getattr(spec, key)]
        if len(given) != 1:
            raise ConfigError(f"{what}: data names {given or 'nothing'}; expected exactly one of split, file, stage")
        if spec.split:
            found = list(self.task(what).rows(spec.split, spec.count, spec.seed))
        elif spec.file:
            from posttrain.data.rows import load_rows

            found = load_rows(spec.file, rename=spec.rename, split=spec.hub_split, limit=spec.count)
        else:
            lines = (self.out / str(spec.stage) / "rows" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines if line][: spec.count]
        if not found:
            raise DataError(
                f"{what}: the data is empty" + (f"; stage '{spec.stage}' kept no sample" if spec.stage else "")
            )
        return found

    def task(self, what: str) -> Any:
        """The recipe's task.

        Raises:
            ConfigError: The recipe has none.
        """
        from posttrain.tasks import task

        given = self.recipe.task
        if given is None:
            raise ConfigError(f"{what}: this needs a task; write 'task: word-problems' into the recipe")
        options = {"name": given} if isinstance(given, str) else dict(given)
        return task(options.pop("name"), **options)

    def rewards(self, stage: StageSpec) -> tuple[Reward, ...]:
        """The rewards of a stage: the task's own unless it names some."""
        if not stage.rewards:
            return tuple(self.task(stage.name).rewards)
        from posttrain.rewards.named import named_rewards

        return named_rewards(stage.rewards, task=self.task(stage.name) if self.recipe.task else None)

    def sets(self, stage: StageSpec) -> dict[str, DataSpec]:
        """What a stage reads, by name; a plain specification is called 'data'."""
        return {"data": stage.data} if isinstance(stage.data, DataSpec) else dict(stage.data or {})

    def build_run(self, stage: StageSpec, *, rows: Mapping[str, Sequence[Row]] | None = None) -> Run:
        """The `Run` of a train stage; `rows` stand in place of its data."""
        method = build_method(str(stage.train), stage.method)
        if stage.data is None:
            raise ConfigError(f"stage '{stage.name}' has no data")
        if rows is None:
            rows = {name: self.rows(spec, stage.name) for name, spec in self.sets(stage).items()}
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
        """What an evaluation of the recipe asks, of any model."""
        rows = (spec.split, spec.count, spec.seed)
        return _of_task(
            self.task("evaluate"), rows, samples=spec.samples, max_tokens=spec.max_tokens, seed=self.recipe.seed
        )

    # ------------------------------------------------------------------------------------------ before anything runs

    def check(self) -> None:
        """Refuse what a later stage would refuse, before the first one works.

        Raises:
            PosttrainError: The first thing that cannot be honoured, by its stage.
        """
        if self.recipe.task is not None:
            self.task(self.recipe.name)
        for stage in self.recipe.stages:
            for source in (stage.merge or stage.start, *stage.models.values()):
                self._check_model(source)
            if stage.verb == "train":
                self._check_train(stage)
            elif stage.verb == "sample":
                self.sampled(stage)
        for spec in self.recipe.evaluate:
            self.evaluation(spec)
            for name in spec.of:
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

        later = {name for name, spec in self.sets(stage).items() if spec.stage}
        read = {name: [] if name in later else self.rows(spec, stage.name) for name, spec in self.sets(stage).items()}
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

    def sampled(self, stage: StageSpec) -> tuple[DataSpec, tuple[Reward, ...], Sampling]:
        """What a sample stage answers, who judges the answers, and how they are drawn.

        Raises:
            ConfigError: Its settings do not fit together.
        """
        if not isinstance(stage.data, DataSpec):
            raise ConfigError(f"stage '{stage.name}' samples answers to one data set; name it under data")
        unread = sorted(set(stage.run) - {"sampling"})
        if unread:
            raise ConfigError(f"stage '{stage.name}' samples and does not read run.{unread[0]}; it reads run.sampling")
        task = self.task(stage.name) if self.recipe.task is not None else None
        judges = self.rewards(stage) if stage.rewards or task is not None else ()
        if stage.keep != "all" and not judges:
            raise ConfigError(f"stage '{stage.name}' keeps '{stage.keep}' and has no rewards; name some, or a task")
        options = {**({"max_tokens": task.max_tokens} if task else {}), **stage.run.get("sampling", {})}
        sampling = build(Sampling, options, what=f"stage '{stage.name}': sampling")
        if not stage.data.stage:
            self.rows(stage.data, stage.name)
        return stage.data, judges, sampling


def validation(task: Any, seed: int, *, count: int = 100) -> Evaluation:
    """What `evaluate_every` watches: greedy answers to questions of the task's validation split, of its last where it has none."""
    split = "validation" if "validation" in task.splits else task.splits[-1]
    return _of_task(task, (split, count, seed), seed=seed)


def _of_task(
    task: Any, rows: tuple[str, int, int], *, seed: int, samples: int = 0, max_tokens: int | None = None
) -> Evaluation:
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
            raise ConfigError(
                f"{file} has no Method called '{attribute}'; expected a class that derives from posttrain.Method"
            )
        return build(cls, options, what=attribute)
    return build(method(name), options, what=name)


__all__ = ["Plan", "build_method", "validation"]
