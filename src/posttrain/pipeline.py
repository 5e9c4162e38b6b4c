"""Stages turn artifacts into artifacts; running a pipeline again skips what is done and whole.

out/
  recipe.yaml                what was run
  <stage>/                   a train stage's run folder: run.json, metrics.jsonl, samples.jsonl, state/, model/
  <stage>/stage.json         the stage's inputs and its artifact's hash, written last
  evaluations/<model>.json   numbers; <model>.jsonl: one question a line
  summary.json, report.html
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.distributed.world import World
from posttrain.errors import CheckpointError, ConfigError, DataError
from posttrain.evaluation.accuracy import Evaluation
from posttrain.files import atomic_folder, atomic_write, make_folders
from posttrain.manifest import hash_folder, write_manifest
from posttrain.method import Method, Optimizer
from posttrain.options import build
from posttrain.recipe import DataSpec, EvaluateSpec, Recipe, StageSpec
from posttrain.records import sample_to_json
from posttrain.report.live import counted
from posttrain.report.page import write_report
from posttrain.report.summary import write_summary
from posttrain.resolve import digest, versions
from posttrain.rewards.reward import Reward
from posttrain.run import Run, train
from posttrain.types import Row, Sampling


@dataclass
class Pipeline:
    """A recipe being run into a folder."""

    recipe: Recipe
    out: Path
    quiet: bool = False
    world: World = field(default_factory=World)
    stages: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    _hashes: dict[str, str] = field(default_factory=dict)

    def run(self) -> Path:
        """Run what is not done yet, then write the summary and the report.

        Returns:
            The report.
        """
        make_folders(self.out)
        if self.world.rank == 0:
            atomic_write(
                self.out / "recipe.yaml", yaml.safe_dump(self.recipe.model_dump(), sort_keys=False, allow_unicode=True)
            )
        for stage in self.recipe.stages:
            self.stages.append(self._stage(stage))
        if self.world.rank != 0:
            return self.out / "report.html"
        for spec in self.recipe.evaluate:
            for name in spec.of:
                self.evaluations += self._evaluation(spec, name)
                self._summarise()
        self._summarise()
        return write_report(self.out)

    def _summarise(self) -> None:
        recipe = self.recipe
        write_summary(
            self.out,
            name=recipe.name,
            seed=recipe.seed,
            versions=versions(),
            stages=self.stages,
            evaluations=self.evaluations,
        )

    # ------------------------------------------------------------------------------------------ artifacts

    def folder_of(self, name: str) -> str | Path:
        """What a stage's name means as a model: its output, or the base."""
        if name == "base":
            return self.recipe.model
        if any(stage.name == name for stage in self.recipe.stages):
            return self.out / name / "model"
        return name

    def _hash_of(self, name: str) -> str:
        """The content of a model, for the inputs of what is built on it."""
        folder = Path(self.folder_of(name))
        if not folder.is_dir():
            return str(folder)
        if name not in self._hashes:
            self._hashes[name] = hash_folder(folder)
        return self._hashes[name]

    def rows(self, spec: DataSpec, what: str) -> list[Row]:
        """The rows that a data specification names.

        Raises:
            ConfigError: It names nothing, or two things.
        """
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

    # ------------------------------------------------------------------------------------------ stages

    def _inputs(self, stage: StageSpec) -> dict[str, Any]:
        data = stage.data
        specs = {"data": data} if isinstance(data, DataSpec) else dict(data or {})
        read = {name: self._rows_hash(stage, spec) for name, spec in specs.items()}
        sources = {"start": stage.merge or stage.start, **stage.models}
        models = {name: self._hash_of(source) for name, source in sources.items()}
        return {
            "stage": digest(stage.model_dump()),
            "task": digest(self.recipe.task),
            "seed": self.recipe.seed,
            "rows": read,
            "models": models,
        }

    def _rows_hash(self, stage: StageSpec, spec: DataSpec) -> str:
        return digest(self.rows(spec, stage.name))

    def _stage(self, stage: StageSpec) -> dict[str, Any]:
        folder = self.out / stage.name
        record = folder / "stage.json"
        inputs = self._inputs(stage)
        artifact = "rows" if stage.verb == "sample" else "model"
        if record.is_file():
            done = json.loads(record.read_text(encoding="utf-8"))
            changed = [key for key in inputs if done["inputs"].get(key) != inputs[key]]
            if changed:
                raise CheckpointError(
                    f"stage '{stage.name}' in {folder} was made from other inputs ({', '.join(changed)}); "
                    "choose another --out, or remove that folder to make it again"
                )
            if (folder / artifact).is_dir() and hash_folder(folder / artifact) == done["hash"]:
                self._say(f"{stage.name}: done before, unchanged")
                return dict(done["summary"])
            self._say(f"{stage.name}: its artifact is damaged or gone; making it again")
        began = time.perf_counter()
        metrics = {"train": self._train, "sample": self._sample, "merge": self._merge}[stage.verb](stage, folder)
        summary = {
            "name": stage.name,
            "kind": stage.verb,
            "method": stage.train,
            "artifact": f"{stage.name}/{artifact}",
            "seconds": time.perf_counter() - began,
            "metrics": metrics,
        }
        if self.world.rank == 0:
            found = {"inputs": inputs, "hash": hash_folder(folder / artifact), "summary": summary}
            atomic_write(record, json.dumps(found, indent=1, default=str))
        return summary

    def build_run(self, stage: StageSpec, folder: Path) -> Run:
        """The `Run` of a train stage."""
        method = build_method(str(stage.train), stage.method)
        data = stage.data
        if data is None:
            raise ConfigError(f"stage '{stage.name}' has no data")
        rows: Any = self.rows(data, stage.name) if isinstance(data, DataSpec) else None
        if rows is None:
            rows = {name: self.rows(spec, stage.name) for name, spec in data.items()}  # type: ignore[union-attr]
        settings = dict(stage.run)
        samples = any(part.method.rows == "prompts" for part in method.parts().values())
        sampling = dict(settings.pop("sampling", {}))
        if samples and self.recipe.task is not None:
            sampling.setdefault("max_tokens", self.task(stage.name).max_tokens)
        extra: dict[str, Any] = {}
        if settings.get("lora") is not None:
            from posttrain.models.lora import Lora

            extra["lora"] = build(Lora, settings.pop("lora"), what="lora")
        if settings.get("evaluate_every") and self.recipe.task is not None:
            extra["evaluation"] = validation(self.task(stage.name), self.recipe.seed)
        return build(
            Run,
            {
                "seed": self.recipe.seed,
                **settings,
                "method": method,
                "model": str(self.folder_of(stage.start)),
                "models": {name: str(self.folder_of(source)) for name, source in stage.models.items()},
                "data": rows,
                "out": str(folder),
                "rewards": self.rewards(stage) if samples else (),
                "verdicts": {**self._verdicts(stage, samples=samples), **settings.get("verdicts", {})},
                "sampling": build(Sampling, sampling, what="sampling"),
                "optimizer": build(Optimizer, dict(settings.pop("optimizer", {})), what="optimizer"),
                "quiet": self.quiet,
                **self._watched(stage),
                **extra,
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
        return {"evaluation": self._of_task(watch.split, watch.count), "evaluate_every": watch.every}

    def _of_task(
        self, split: str, count: int, *, samples: int = 0, max_tokens: int | None = None, seed: int = 0
    ) -> Evaluation:
        task = self.task("evaluate")
        return Evaluation(
            task=task.name,
            rows=list(task.rows(split, count, seed)),
            rewards=tuple(task.rewards),
            verdicts=task.values,
            split=split,
            samples=samples,
            max_tokens=max_tokens or task.max_tokens,
            seed=self.recipe.seed,
        )

    def _train(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        return train(self.build_run(stage, folder), world=self.world).metrics

    def _sample(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        """Write the start's answers to prompts, judged, as rows to train on."""
        from posttrain.experience import Desk, renderer_of
        from posttrain.models.load import load
        from posttrain.rewards.runner import RewardRunner
        from posttrain.samplers.native import NativeSampler
        from posttrain.scoring import score_everywhere

        if not isinstance(stage.data, DataSpec):
            raise ConfigError(f"stage '{stage.name}' samples answers to one data set; name it under data")
        unread = sorted(set(stage.run) - {"sampling"})
        if unread:
            raise ConfigError(f"stage '{stage.name}' samples and does not read run.{unread[0]}; it reads run.sampling")
        task = self.task(stage.name) if self.recipe.task is not None else None
        judges = self.rewards(stage) if stage.rewards or task is not None else ()
        if stage.keep != "all" and not judges:
            raise ConfigError(f"stage '{stage.name}' keeps '{stage.keep}' and has no rewards; name some, or a task")
        model, tokenizer = load(self.folder_of(stage.start))
        renderer = renderer_of(model, tokenizer)
        sampler = NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
        options = {**({"max_tokens": task.max_tokens} if task else {}), **stage.run.get("sampling", {})}
        sampling = build(Sampling, options, what="sampling")
        desk = Desk(renderer, sampler, sampling, stage.samples, self.recipe.seed, 0, self.world)
        scored = desk.rollout(self.rows(stage.data, stage.name))
        if judges:
            values = task.values if task else None
            with RewardRunner(max_failure_rate=0.5) as runner:
                scored = score_everywhere(judges, scored, renderer, runner=runner, world=self.world, values=values)
        kept = _keep(scored, stage)
        if self.world.rank == 0:
            with atomic_folder(folder / "rows") as partial:
                lines = [json.dumps({"id": f"{s.query}#{s.index}", "sample": sample_to_json(s)}) + "\n" for s in kept]
                (partial / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
                write_manifest(partial, {"stage": stage.name})
        self.world.barrier(f"the rows of {stage.name}")
        right = [s.reward or 0.0 for s in scored if s.reward is not None]
        return {"samples": float(len(scored)), "kept": float(len(kept)), "reward": sum(right) / max(1, len(right))}

    def _merge(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        """Fold a stage's adapter into its weights."""
        from posttrain.models.load import load, save
        from posttrain.models.lora import merge

        if self.world.rank == 0:
            model, tokenizer = load(self.folder_of(str(stage.merge)))
            with atomic_folder(folder / "model") as partial:
                save(merge(model), tokenizer, partial)
                write_manifest(partial, {"stage": stage.name})
        self.world.barrier(f"the model of {stage.name}")
        return {}

    # ------------------------------------------------------------------------------------------ evaluations

    def _evaluation(self, spec: EvaluateSpec, name: str) -> list[dict[str, Any]]:
        from posttrain.experience import renderer_of
        from posttrain.models.load import load

        others = [other for other in self.recipe.evaluate if name in other.of]
        number = next(number for number, other in enumerate(others) if other is spec)
        path = self.out / "evaluations" / (f"{name}.{number}.json" if number else f"{name}.json")
        inputs = {
            "spec": digest(spec.model_dump(exclude={"of"})),
            "model": self._hash_of(name),
            "task": digest(self.recipe.task),
        }
        if path.is_file():
            done = json.loads(path.read_text(encoding="utf-8"))
            if done["inputs"] == inputs:
                return list(done["numbers"])
        evaluation = self._of_task(
            spec.split, spec.count, samples=spec.samples, max_tokens=spec.max_tokens, seed=spec.seed
        )
        model, tokenizer = load(self.folder_of(name))
        with counted(f"evaluate {name}", quiet=self.quiet) as progress:
            outcome = evaluation.of(model, tokenizer, renderer_of(model, tokenizer), model_name=name, progress=progress)
        make_folders(path.parent)
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in outcome.records)
        atomic_write(path.with_name(path.name + "l"), lines + "\n")
        atomic_write(path, json.dumps({"inputs": inputs, "numbers": outcome.numbers}, indent=1))
        headline = outcome.numbers[0]
        self._say(
            f"{name}: accuracy {100 * headline['value']:.1f} % [{100 * headline['low']:.1f}, {100 * headline['high']:.1f}]"
        )
        return outcome.numbers

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)


def validation(task: Any, seed: int, *, count: int = 100) -> Evaluation:
    """What `evaluate_every` watches: greedy answers to questions of the task's validation split, of its last where it has none."""
    split = "validation" if "validation" in task.splits else task.splits[-1]
    return Evaluation(
        task=task.name,
        rows=list(task.rows(split, count, seed)),
        rewards=tuple(task.rewards),
        verdicts=task.values,
        split=split,
        max_tokens=task.max_tokens,
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
        cls = getattr(load_file(file), attribute, None)
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise ConfigError(
                f"{file} has no Method called '{attribute}'; expected a class that derives from posttrain.Method"
            )
        return build(cls, options, what=attribute)
    return build(method(name), options, what=name)


def _keep(samples: Sequence[Any], stage: StageSpec) -> list[Any]:
    """What a sample stage keeps: all, those that passed, or the best of each group."""
    if stage.keep == "all":
        return list(samples)
    if stage.keep == "passed":
        return [s for s in samples if (s.reward or 0.0) >= 1.0]
    if stage.keep == "best":
        best: dict[str, Any] = {}
        for s in samples:
            if s.reward is not None and (s.group not in best or s.reward > best[s.group].reward):
                best[s.group] = s
        return list(best.values())
    raise ConfigError(f"stage '{stage.name}' keeps '{stage.keep}'; expected all, passed or best")


def run_recipe(recipe: Recipe, out: str | Path, *, quiet: bool = False) -> Path:
    """Run a recipe into a folder; see `Pipeline`.  Returns the report."""
    with World.here() as world:
        return Pipeline(recipe, Path(out), quiet=quiet, world=world).run()


__all__ = ["Pipeline", "build_method", "run_recipe"]
