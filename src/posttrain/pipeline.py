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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.blame import own_code
from posttrain.distributed.world import ALONE_SECONDS, World
from posttrain.errors import CheckpointError
from posttrain.files import atomic_folder, atomic_write, make_folders
from posttrain.manifest import hash_folder, write_manifest
from posttrain.plan import Plan, build_method
from posttrain.recipe import EvaluateSpec, Recipe, StageSpec
from posttrain.records import sample_to_json
from posttrain.report.live import counted
from posttrain.report.page import write_report
from posttrain.report.summary import write_summary
from posttrain.resolve import digest, versions
from posttrain.run import train


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
            atomic_write(
                self.out / "recipe.yaml", yaml.safe_dump(self.recipe.model_dump(), sort_keys=False, allow_unicode=True)
            )
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
        read = {name: digest(self.plan.rows(spec, stage.name)) for name, spec in self.plan.sets(stage).items()}
        sources = {"start": stage.merge or stage.start, **stage.models}
        models = {name: self._hash_of(source) for name, source in sources.items()}
        return {
            "stage": digest(stage.model_dump()),
            "task": digest(self.recipe.task),
            "seed": self.recipe.seed,
            "rows": read,
            "models": models,
        }

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

    def _train(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        run = self.plan.build_run(stage)
        with own_code(folder):
            return train(run, world=self.world).metrics

    def _sample(self, stage: StageSpec, folder: Path) -> dict[str, float]:
        """Write the start's answers to prompts, judged, as rows to train on."""
        from posttrain.experience import Desk, renderer_of
        from posttrain.models.load import load
        from posttrain.rewards.runner import RewardRunner
        from posttrain.samplers.native import NativeSampler
        from posttrain.scoring import score_everywhere

        data, judges, sampling = self.plan.sampled(stage)
        model, tokenizer = load(self.plan.folder_of(stage.start))
        renderer = renderer_of(model, tokenizer)
        sampler = NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
        desk = Desk(renderer, sampler, sampling, stage.samples, self.recipe.seed, 0, self.world)
        scored = desk.rollout(self.plan.rows(data, stage.name))
        if judges:
            values = self.plan.task(stage.name).values if self.recipe.task is not None else None
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
            model, tokenizer = load(self.plan.folder_of(str(stage.merge)))
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
        evaluation = self.plan.evaluation(spec)
        model, tokenizer = load(self.plan.folder_of(name))
        model.use_quickest()
        with counted(f"evaluate {name}", quiet=self.quiet or self.world.rank != 0) as progress:
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


def _keep(samples: Sequence[Any], stage: StageSpec) -> list[Any]:
    """What a sample stage keeps: all, those that passed, or the best of each group."""
    if stage.keep == "all":
        return list(samples)
    if stage.keep == "passed":
        return [s for s in samples if (s.reward or 0.0) >= 1.0]
    best: dict[str, Any] = {}
    for s in samples:
        if s.reward is not None and (s.group not in best or s.reward > best[s.group].reward):
            best[s.group] = s
    return list(best.values())


def run_recipe(recipe: Recipe, out: str | Path, *, quiet: bool = False) -> Path:
    """Run a recipe into a folder; see `Pipeline`.  Returns the report."""
    with World.here() as world:
        return Pipeline(recipe, Path(out), quiet=quiet, world=world).run()


__all__ = ["Pipeline", "build_method", "run_recipe"]
