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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from posttrain.blame import own_code
from posttrain.distributed.world import ALONE_SECONDS, World
from posttrain.errors import CheckpointError
from posttrain.files import atomic_folder, atomic_write, make_folders
from posttrain.manifest import hash_folder, write_manifest
from posttrain.plan import Plan, build_method
from posttrain.recipe import EvaluateSpec, Recipe, StageSpec, judges_of, sets_of
from posttrain.report.live import counted
from posttrain.report.names import evaluation_unit, metric_in_words, number
from posttrain.report.page import write_report
from posttrain.report.summary import write_summary
from posttrain.resolve import digest, versions
from posttrain.run import train

if TYPE_CHECKING:
    from posttrain.evaluation.accuracy import Outcome


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

    def __post_init__(self) -> None:
        self.plan = Plan(self.recipe, self.out, self.quiet)

    def run(self) -> Path:
        """Look every stage's settings over, run what is not done yet, then write the summary and the report.

        Returns:
            The report.
        """
        self.plan.check()
        make_folders(self.out)
        if self.world.rank == 0:
            atomic_write(self.out / "recipe.yaml", yaml.safe_dump(self.recipe.model_dump(), sort_keys=False, allow_unicode=True))
        for stage in self.recipe.stages:
            self.stages.append(self._stage(stage))
        asked = [(spec, name) for spec in self.recipe.evaluate for name in spec.of]
        if self.world.size > 1:  # each rank makes its share, and the first one reads them all
            for spec, name in asked[self.world.rank :: self.world.size]:
                self._evaluation(spec, name)
            self.world.barrier("the evaluations", timeout_seconds=ALONE_SECONDS)
        if self.world.rank != 0:
            return self.out / "report.html"
        for spec, name in asked:
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

    def _hash_of(self, name: str) -> str:
        """The content of a model, for the inputs of what is built on it."""
        folder = Path(self.plan.folder_of(name))
        if not folder.is_dir():
            return str(folder)
        if name not in self._hashes:
            self._hashes[name] = hash_folder(folder)
        return self._hashes[name]

    # ------------------------------------------------------------------------------------------ stages

    def _inputs(self, stage: StageSpec) -> dict[str, Any]:
        read = {name: digest(self.plan.rows(spec, stage.name)) for name, spec in sets_of(stage).items()}
        models = {"start": self._hash_of(stage.built_on), **self._others(stage)}
        return {
            "stage": digest(stage.model_dump()),
            "task": digest(self.recipe.task),
            "seed": self.recipe.seed,
            "rows": read,
            "models": models,
        }

    def _others(self, spec: StageSpec | EvaluateSpec) -> dict[str, str]:
        """The contents of the models that a stage or an evaluation names, and of those that score for it."""
        sources = {**spec.models, **{f"reward {name}": source for name, source in judges_of(spec).items()}}
        return {name: self._hash_of(source) for name, source in sources.items()}

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
        metrics = {
            "train": self._train,
            "sample": self._sample,
            "merge": self._merge,
            "normalise": self._normalise,
        }[stage.verb](stage, folder)
        summary = {
            "name": stage.name,
            "kind": stage.verb,
            "method": stage.train or stage.sample,
            "artifact": f"{stage.name}/{artifact}",
            "seconds": time.perf_counter() - began,
            "metrics": metrics,
        }
        if self.world.rank == 0:
            found = {"inputs": inputs, "hash": hash_folder(folder / artifact), "summary": summary}
            atomic_write(record, json.dumps(found, indent=1, default=str))
        return summary

    def _train(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        run = self.plan.build_run(stage)
        with own_code(folder):
            return train(run, world=self.world).metrics

    def _sample(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        """Rows that a maker writes with the start, its other models and the rewards."""
        made = self.plan.maker(stage).make(self.plan.workshop(stage, start=stage.start, folder=folder, world=self.world))
        if self.world.rank == 0:
            with atomic_folder(folder / "rows") as partial:
                for name, lines in {"rows": made.rows, **made.records}.items():
                    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                    (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
                write_manifest(partial, {"stage": stage.name})
        self.world.barrier(f"the rows of {stage.name}")
        return made.metrics

    def _merge(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        """Fold a stage's adapter into its weights."""
        from posttrain.models.load import load, save
        from posttrain.models.lora import merge

        if self.world.rank == 0:
            model, tokenizer = load(self.plan.folder_of(str(stage.merge)))
            with atomic_folder(folder / "model") as partial:
                save(merge(model), tokenizer, partial)
                write_manifest(partial, {"stage": stage.name})
        self.world.barrier(f"the model of {stage.name}")
        return {}

    def _normalise(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        """A reward model whose scores of some answers have mean 0 and standard deviation 1."""
        from posttrain.data.chat import renderer_of
        from posttrain.experience import Desk
        from posttrain.models.load import load, save
        from posttrain.rewards.model import normalised

        model, tokenizer = load(self.plan.folder_of(str(stage.normalise)))
        rows = self.plan.rows(next(iter(sets_of(stage).values())), stage.name)
        mean, std = normalised(model, Desk(renderer_of(model, tokenizer)).replay_or_prompts(rows))
        if self.world.rank == 0:
            with atomic_folder(folder / "model") as partial:
                save(model, tokenizer, partial)
                write_manifest(partial, {"stage": stage.name})
        self.world.barrier(f"the model of {stage.name}")
        return {"mean_before": mean, "std_before": std}

    # ------------------------------------------------------------------------------------------ evaluations

    def _evaluation(self, spec: EvaluateSpec, name: str) -> list[dict[str, Any]]:
        others = [other for other in self.recipe.evaluate if name in other.of]
        place = next(place for place, other in enumerate(others) if other is spec)
        path = self.out / "evaluations" / (f"{name}.{place}.json" if place else f"{name}.json")
        inputs = {
            "spec": digest(spec.model_dump(exclude={"of"})),
            "model": self._hash_of(name),
            "task": digest(self.recipe.task),
            "rows": {key: digest(self.plan.rows(data, "evaluate")) for key, data in sets_of(spec).items()},
            "models": self._others(spec),
        }
        if path.is_file():
            done = json.loads(path.read_text(encoding="utf-8"))
            if done["inputs"] == inputs:
                return list(done["numbers"])
        outcome = self._examined(spec, name) if spec.kind != "accuracy" else self._accuracy(spec, name)
        make_folders(path.parent)
        more = {"task": outcome.numbers[0]["task"]} if spec.task else {}  # questions of another task have ids of their own
        lines = "".join(json.dumps({**record, **more}, ensure_ascii=False) + "\n" for record in outcome.records)
        atomic_write(path.with_name(path.name + "l"), lines)
        atomic_write(path, json.dumps({"inputs": inputs, "numbers": outcome.numbers, "curves": outcome.curves}, indent=1))
        first = outcome.numbers[0]
        unit = evaluation_unit(first["metric"], [first["value"]])
        low, high = number(first["low"], unit), number(first["high"], unit)
        self._say(f"{name}: {metric_in_words(first['metric'])} {number(first['value'], unit)} [{low}, {high}]")
        return outcome.numbers

    def _accuracy(self, spec: EvaluateSpec, name: str) -> Outcome:
        """Greedy and sampled answers, judged by the task."""
        from posttrain.data.chat import renderer_of
        from posttrain.models.load import load

        evaluation = self.plan.evaluation(spec)
        model, tokenizer = load(self.plan.folder_of(name))
        model.use_quickest()
        with counted(f"evaluate {name}", quiet=self.quiet or self.world.rank != 0) as progress:
            return evaluation.of(model, tokenizer, renderer_of(model, tokenizer), model_name=name, progress=progress)

    def _examined(self, spec: EvaluateSpec, name: str) -> Outcome:
        """Another kind of evaluation; under several ranks one of them makes it whole."""
        shop = self.plan.workshop(spec, start=name, folder=self.out / "evaluations")
        return self.plan.examiner(spec).examine(shop, model_name=name)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)


def run_recipe(recipe: Recipe, out: str | Path, *, quiet: bool = False) -> Path:
    """Run a recipe into a folder; see `Pipeline`.  Returns the report."""
    with World.here() as world:
        return Pipeline(recipe, Path(out), quiet=quiet, world=world).run()


__all__ = ["Pipeline", "build_method", "run_recipe"]
