"""A run folder, read for the page: whatever is there, with a note for whatever is torn or missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.report.curves import curves_in
from posttrain.report.lines import read_lines
from posttrain.report.summary import EvaluationSummary, StageSummary, Summary, read_summary

RECIPES = ("recipe.yaml", "recipe.yml", "resolved.json")
"""Names under which the resolved recipe may lie, the preferred one first."""


@dataclass(frozen=True)
class Stage:
    """What one stage left."""

    name: str
    summary: StageSummary
    metrics: list[dict[str, Any]]  # one a step: its lines of metrics.jsonl, later ones over earlier ones
    samples: list[dict[str, Any]]  # lines of samples.jsonl that training wrote


@dataclass(frozen=True)
class RunFolder:
    """Everything the page is made of."""

    name: str
    seed: int | None
    versions: dict[str, str]
    stages: list[Stage]
    evaluations: list[EvaluationSummary]
    answers: dict[str, dict[str, dict[str, Any]]]  # model -> question id -> its evaluation entry; models in order of making
    recipe: str | None
    recipe_name: str
    notes: list[str] = field(default_factory=list)  # what could not be read, in words
    curves: list[dict[str, Any]] = field(default_factory=list)  # what evaluations left to draw: see `evaluation.examiner.curve`
    starts: dict[str, str] = field(default_factory=dict)  # stage -> the model it started from; {} where no recipe says so


def read_folder(folder: str | Path) -> RunFolder:
    """Read what a run left in `folder`; nothing outside of it is opened.

    Raises:
        DataError: `folder` is no folder, or holds neither a summary nor the metrics of any stage.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"'{folder}' is not a folder: expected the folder of a run")
    notes: list[str] = []
    alone = _is_stage(root)
    summary = _summary(root, notes)
    stages = []
    evaluated: list[dict[str, Any]] = []
    for entry in summary["stages"]:
        place = root if alone else _inside(root, entry["name"], notes)
        metrics = [] if place is None else _lines(place / "metrics.jsonl", notes)
        samples = [] if place is None else _lines(place / "samples.jsonl", notes)
        evaluated += [row for row in samples if row.get("kind") == "evaluation"]
        training = [row for row in samples if row.get("kind") != "evaluation"]
        stages.append(Stage(entry["name"], entry, _by_step(metrics), training))
    if (root / "evaluations").is_dir():
        for path in sorted((root / "evaluations").glob("*.jsonl")):
            evaluated += [{"model": path.stem, **row} for row in _lines(path, notes)]
    recipe, recipe_name = _recipe(root, notes)
    versions = {str(name): str(version) for name, version in summary["versions"].items()}
    answers = _answers(evaluated, summary)
    seed = summary["seed"] if isinstance(summary["seed"], int) and (root / "summary.json").exists() else None
    return RunFolder(
        name=str(summary["name"]),
        seed=seed,
        versions=versions,
        stages=stages,
        evaluations=summary["evaluations"],
        answers=answers,
        recipe=recipe,
        recipe_name=recipe_name,
        notes=notes,
        curves=curves_in(root / "evaluations", notes),
        starts=starts_of(recipe or ""),
    )


def _summary(root: Path, notes: list[str]) -> Summary:
    """The summary, or one put together from the folders of stages when there is none yet."""
    try:
        return read_summary(root)
    except DataError as error:
        stages = sorted((path.parent for path in root.glob("*/metrics.jsonl")), key=lambda path: path.stat().st_mtime)
        stages = [root.resolve()] if _is_stage(root) else stages
        if not stages:
            raise
        missing = not (root / "summary.json").exists()
        notes.append("There is no summary.json yet: results and versions are left out." if missing else f"{error}.")
        found = [
            StageSummary(name=stage.name, kind="train", method=None, artifact=None, seconds=None, metrics={}) for stage in stages
        ]
        return Summary(name=root.resolve().name, seed=0, versions={}, stages=found, evaluations=[])


def _is_stage(root: Path) -> bool:
    """Is this the folder of one training stage by itself, rather than that of a pipeline?"""
    return (root / "metrics.jsonl").is_file() and not (root / "summary.json").exists()


def _inside(root: Path, name: str, notes: list[str]) -> Path | None:
    """The folder of a stage, or None when its name leads out of the run folder."""
    place = (root / name).resolve()
    if place != root.resolve() and place.is_relative_to(root.resolve()):
        return place
    notes.append(f"The stage '{name}' is not a folder of this run and is left out.")
    return None


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return read_lines(path, note=notes.append)
    except OSError as error:
        notes.append(f"{path.name} of '{path.parent.name}' cannot be read: {error.strerror or error}")
        return []


def _by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if isinstance(row.get("step"), int):
            found[row["step"]] = {**found.get(row["step"], {}), **row}
    return [found[step] for step in sorted(found)]


def _answers(rows: list[dict[str, Any]], summary: Summary) -> dict[str, dict[str, dict[str, Any]]]:
    """Entries by model and question, the first of each; models in the order in which they were made."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "id" in row and "completion" in row:
            question = f"{row['task']}/{row['id']}" if "task" in row else str(row["id"])
            found.setdefault(str(row.get("model", "")), {}).setdefault(question, row)
    order = model_order(summary["evaluations"], [stage["name"] for stage in summary["stages"]])
    return {model: found[model] for model in [*order, *sorted(set(found) - set(order))] if model in found}


def model_order(evaluations: list[EvaluationSummary], stages: list[str]) -> list[str]:
    """Models in the order in which they were made: those of no stage (the base) first, then by stage."""
    named = list(dict.fromkeys(entry["model"] for entry in evaluations))
    given = [model for model in named if model not in stages]
    return [*given, *stages] if given else ["base", *stages]


def starts_of(recipe: str) -> dict[str, str]:
    """Stage -> the model that it started from, as a recipe's text says; {} when it is of another form.

    Example:
        >>> starts_of("stages: [{name: cold-start, train: sft}, {name: rl, train: grpo, start: cold-start}]")
        {'cold-start': 'base', 'rl': 'cold-start'}
    """
    import yaml

    try:
        tree = yaml.safe_load(recipe)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    stages = tree.get("stages") if isinstance(tree, dict) else None
    named = [s for s in stages if isinstance(s, dict) and "name" in s] if isinstance(stages, list) else []
    return {str(stage["name"]): str(stage.get("start", "base")) for stage in named}


def _recipe(root: Path, notes: list[str]) -> tuple[str | None, str]:
    for name in RECIPES:
        path = root / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            if path.suffix == ".json":
                text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
        except (OSError, ValueError) as error:
            notes.append(f"{name} cannot be read: {error}")
            continue
        return text, name
    return None, RECIPES[0]
