"""A recipe: a pipeline of named stages as YAML, read strictly.

name: word-problems
shows: a cold start on 100 demonstrations, then GRPO
minutes: 5
model: tiny
task: {name: word-problems, level: demo}
stages:
  - {name: cold-start, train: sft, data: {split: demonstrations, count: 100}, run: {epochs: 10}}
  - {name: rl, train: grpo, start: cold-start, data: {split: train, count: 2000}, run: {steps: 100}}
evaluate:
  - {of: [base, cold-start, rl], split: test, count: 500, samples: 8}
small: {stages.rl.run.steps: 4}
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.errors import ConfigError, nearest
from posttrain.rewards.parse import parts_of_model_reward
from posttrain.synthesis import maker_named

VERBS = ("train", "sample", "merge", "normalise")
"""What a stage can do to make an artifact; `evaluate` stands beside the stages."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSpec(_Strict):
    """Where rows come from: a split of the recipe's task or another, a file or hub name, what a sample stage wrote, or a mix."""

    split: str | None = None
    task: dict[str, Any] | str | None = None
    skip: int = Field(0, ge=0)
    count: int | None = Field(None, ge=1)
    file: str | None = None
    hub_split: str = "train"
    rename: dict[str, str] = {}
    stage: str | None = None
    mix: list[DataSpec] = []
    seed: int = 0

    @property
    def stages(self) -> list[str]:
        """The sample stages that it reads."""
        return [self.stage] if self.stage else [name for part in self.mix for name in part.stages]


class WatchSpec(_Strict):
    """An evaluation while a stage trains: every so many steps, on a split of the task (validation rows for the loss)."""

    every: int = Field(10, ge=1)
    split: str = "validation"
    count: int = Field(100, ge=1)


class StageSpec(_Strict):
    """One stage: exactly one verb."""

    name: str
    train: str | None = None
    sample: str | None = None
    merge: str | None = None
    normalise: str | None = None
    start: str = "base"
    models: dict[str, str] = {}
    data: DataSpec | dict[str, DataSpec] | None = None
    method: dict[str, Any] = {}
    run: dict[str, Any] = {}
    rewards: list[str] = []
    watch: WatchSpec | None = None
    samples: int = Field(1, ge=1)

    @property
    def built_on(self) -> str:
        """The model that the stage works on."""
        return self.merge or self.normalise or self.start

    @property
    def verb(self) -> str:
        """The stage's verb."""
        return next(verb for verb in VERBS if getattr(self, verb) is not None)


class EvaluateSpec(_Strict):
    """One evaluation of several models: the accuracy of their answers, or another kind with rows, models and options of its own."""

    of: list[str]
    kind: str = "accuracy"
    task: dict[str, Any] | str | None = None
    split: str = "test"
    count: int = Field(200, ge=1)
    samples: int = Field(0, ge=0)
    max_tokens: int | None = None
    data: DataSpec | dict[str, DataSpec] | None = None
    models: dict[str, str] = {}
    rewards: list[str] = []
    options: dict[str, Any] = {}
    seed: int = 0


class Recipe(_Strict):
    """A whole pipeline."""

    name: str
    shows: str = ""
    minutes: float | None = None
    source: str = ""
    model: str = "tiny"
    seed: int = 0
    task: dict[str, Any] | str | None = None
    stages: list[StageSpec]
    evaluate: list[EvaluateSpec] = []
    small: dict[str, Any] = {}


def shipped() -> dict[str, Path]:
    """The recipes of this package by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, *, small: bool = False, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name or file.

    Args:
        source: The name of a shipped recipe, or a YAML file.
        small: Apply the recipe's `small` changes: minutes on two cores, too short for a claim.
        changes: Dotted path -> value, for instance `{"stages.rl.run.steps": 20}`; stages are named.

    Raises:
        ConfigError: There is no such recipe, or it cannot be honoured; the message names the key.
    """
    known = shipped()
    path = Path(source) if Path(source).suffix in (".yaml", ".yml") else known.get(str(source))
    if path is None or not path.is_file():
        raise ConfigError(f"there is no recipe '{source}'{nearest(str(source), known)}; give a name or a .yaml file")
    if path.stat().st_size > 1 << 20:
        raise ConfigError(f"{path} is larger than 1 MB; that is no recipe")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as cause:
        raise ConfigError(f"{path} is not YAML: {cause}") from cause
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}; expected a mapping with name and stages")
    return parse_recipe(tree, small=small, changes=changes, where=str(path))


def parse_recipe(
    tree: Mapping[str, Any], *, small: bool = False, changes: Mapping[str, Any] | None = None, where: str = "the recipe"
) -> Recipe:
    """A recipe from plain values; see `load_recipe`."""
    whole = unrolled(copy.deepcopy(dict(tree)))
    if small:
        if not whole.get("small"):
            raise ConfigError(f"{where} has no small form")
        for key, value in whole["small"].items():
            _set(whole, key, value)
    for key, value in (changes or {}).items():
        _set(whole, key, value)
    try:
        recipe = Recipe.model_validate(whole)
    except ValidationError as cause:
        raise ConfigError(f"{where}: {_explained(cause)}") from cause
    _check(recipe, where)
    return recipe


def unrolled(tree: dict[str, Any]) -> dict[str, Any]:
    """Groups of stages that repeat, written out: `{repeat: 3, stages: [...]}` with `{round}` and `{previous}` in text.

    `{previous}` is the round before; in the first round a value `{first: a, then: b}` takes its `first`.
    """
    stages: list[Any] = []
    for stage in tree.get("stages") or []:
        if isinstance(stage, dict) and "repeat" in stage:
            for number in range(1, int(stage["repeat"]) + 1):
                stages += [_filled(inner, number) for inner in stage.get("stages", [])]
        else:
            stages.append(stage)
    return {**tree, "stages": stages}


def _filled(value: Any, number: int) -> Any:
    if isinstance(value, dict):
        if set(value) == {"first", "then"}:
            return _filled(value["first"] if number == 1 else value["then"], number)
        return {key: _filled(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, number) for item in value]
    if isinstance(value, str):
        return value.replace("{round}", str(number)).replace("{previous}", str(number - 1))
    return value


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    """Change one value by its dotted path; list items that have a name are reached by it, others by their number."""
    here: Any = tree
    parts = path.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(here, list):
            names = {str(item.get("name", n)) if isinstance(item, dict) else str(n): n for n, item in enumerate(here)}
            if part not in names:
                raise ConfigError(f"'{path}': there is no '{part}'{nearest(part, names)}")
            if last:
                here[names[part]] = value
            here = here[names[part]]
        elif isinstance(here, dict):
            if last:
                here[part] = value
            else:
                here = here.setdefault(part, {})
        else:
            raise ConfigError(f"'{path}': '{part}' stands under a plain value")


def _explained(error: ValidationError) -> str:
    """The first complaint in words, with the nearest names for an unknown key."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        depth: dict[str, type[BaseModel]] = {
            "stages": StageSpec,
            "evaluate": EvaluateSpec,
            "data": DataSpec,
            "mix": DataSpec,
            "watch": WatchSpec,
        }
        home = next((depth[part] for part in reversed(place[:-1]) if part in depth), Recipe)
        return f"'{'.'.join(place)}' is no key of a recipe{nearest(place[-1], home.model_fields)}"
    return f"'{'.'.join(place)}': {first['msg']}"


def _check(recipe: Recipe, where: str) -> None:
    """Names are unique and refer back; every stage has one verb."""
    done: list[str] = ["base"]
    if not recipe.stages and not recipe.evaluate:
        raise ConfigError(f"{where} has neither stages nor evaluate; there is nothing to do")
    for stage in recipe.stages:
        verbs = [verb for verb in VERBS if getattr(stage, verb) is not None]
        if len(verbs) != 1:
            raise ConfigError(f"{where}: stage '{stage.name}' has verbs {verbs}; expected exactly one of {', '.join(VERBS)}")
        if stage.name in done or not stage.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ConfigError(f"{where}: stage name '{stage.name}' is taken or no plain name (letters, digits, - _ .)")
        for name in (stage.start, *stage.models.values(), *_stages_of(stage), stage.built_on, *judges_of(stage).values()):
            if name not in done and not _outside(name):
                raise ConfigError(
                    f"{where}: stage '{stage.name}' builds on '{name}', which is no stage before it{nearest(name, done)}"
                )
        if stage.sample is not None:
            maker_named(stage.sample)
        done.append(stage.name)
    for evaluation in recipe.evaluate:
        for name in (*evaluation.of, *evaluation.models.values(), *_stages_of(evaluation), *judges_of(evaluation).values()):
            if name not in done and not _outside(name):
                raise ConfigError(f"{where}: evaluate names '{name}'{nearest(name, done)}")


def _outside(name: str) -> bool:
    """Is it a folder or a hub name rather than a stage?"""
    return "/" in name or Path(name).exists()


def judges_of(spec: StageSpec | EvaluateSpec) -> dict[str, str]:
    """The models that its rewards name, by reward."""
    return {name: source for name in spec.rewards if (source := parts_of_model_reward(name)[1])}


def _stages_of(spec: StageSpec | EvaluateSpec) -> Sequence[str]:
    return [name for data in sets_of(spec).values() for name in data.stages]


def sets_of(spec: StageSpec | EvaluateSpec) -> dict[str, DataSpec]:
    """What a stage or an evaluation reads, by name; a plain specification is called 'data'."""
    return {"data": spec.data} if isinstance(spec.data, DataSpec) else dict(spec.data or {})
