"""What this library holds, read from the code: methods, makers, recipes, evaluations, with their sources."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, nearest


def methods() -> list[dict[str, Any]]:
    """Every method: name, kind, family, title, arXiv id, file."""
    from posttrain.methods import METHODS, info

    return [{"kind": "method", **asdict(info(name))} for name in METHODS]


def recipes() -> list[dict[str, Any]]:
    """Every recipe that ships: name, what it shows, minutes."""
    import yaml

    from posttrain.recipe import shipped

    found = []
    for name, path in shipped().items():
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        found.append(
            {
                "name": name,
                "kind": "recipe",
                "family": "",
                "shows": tree.get("shows", ""),
                "minutes": tree.get("minutes"),
                "title": tree.get("shows", ""),
                "arxiv": tree.get("source", ""),
                "file": f"posttrain/recipes/{path.name}",
            }
        )
    return found


def evaluations() -> list[dict[str, Any]]:
    """Every kind of evaluation."""
    from posttrain.evaluation import EXAMINERS

    title = "accuracy, mean@k and pass@k with intervals"
    file = "posttrain/evaluation/accuracy.py"
    first = {"name": "accuracy", "kind": "evaluation", "family": "", "title": title, "arxiv": "2107.03374", "file": file}
    return [first, *_homes(EXAMINERS, "evaluation", "posttrain/evaluation")]


def makers() -> list[dict[str, Any]]:
    """Everything that a sample stage can write."""
    from posttrain.synthesis import MAKERS

    return _homes(MAKERS, "maker", "posttrain/synthesis")


def _homes(table: Mapping[str, str], kind: str, folder: str) -> list[dict[str, Any]]:
    """The classes of a table of `file:Class`, from their source alone."""
    from posttrain.methods import docstring

    found = []
    for name, home in table.items():
        file, _, cls = home.partition(":")
        text = docstring(Path(__file__).parent.parent / folder / f"{file}.py", cls)
        source = re.search(r"arXiv:(\d{4}\.\d{4,5})", text)
        row = {"name": name, "kind": kind, "family": "", "title": text.partition("\n")[0], "file": f"{folder}/{file}.py"}
        found.append({**row, "arxiv": source[1] if source else ""})
    return found


def catalogue() -> list[dict[str, Any]]:
    """Everything, each with name, kind, family, title, arXiv id and file."""
    keys = ("name", "kind", "family", "title", "arxiv", "file")
    return [{key: row.get(key) for key in keys} for row in (*methods(), *makers(), *recipes(), *evaluations())]


def described(name: str) -> str:
    """A method's docstring, its options, and those of every run; or a maker's, or an evaluation's; with defaults and help.

    Raises:
        ConfigError: There is no such method.
    """
    import inspect

    from posttrain.evaluation import EXAMINERS
    from posttrain.method import Optimizer
    from posttrain.methods import METHODS, method
    from posttrain.models.lora import Lora
    from posttrain.quick import GIVEN
    from posttrain.recipe import shipped
    from posttrain.run import Run
    from posttrain.synthesis import MAKERS
    from posttrain.types import Sampling

    if name not in METHODS and name in shipped():
        raise ConfigError(f"'{name}' is a recipe, not a method: posttrain run {name}")
    if name in MAKERS or name in EXAMINERS:
        return _part_of_a_recipe(name)
    if name not in METHODS:
        raise ConfigError(f"there is no method '{name}'{nearest(name, [*METHODS, *MAKERS, *EXAMINERS])}")
    cls = method(name)
    text = [
        f"{name}  ({cls.__module__})",
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        f"Options, as key=value behind `posttrain train {name}`:",
        *_options(cls),
        "",
        "Run:",
        *_options(Run, without=GIVEN),
        "",
        "Sampling (of methods that sample):",
        *_options(Sampling),
        "",
        "Optimizer (optimizer.lr=1e-4, or lr=1e-4):",
        *_options(Optimizer),
        "",
        "Lora (with --lora; lora.r=8):",
        *_options(Lora, prefix="lora."),
    ]
    return "\n".join(text)


def _part_of_a_recipe(name: str) -> str:
    """A maker, an examiner, or both where they share a name."""
    import inspect

    from posttrain.evaluation import EXAMINERS, examiner_named
    from posttrain.synthesis import MAKERS, maker_named

    parts: list[tuple[type, str]] = []
    if name in MAKERS:
        parts.append((maker_named(name), f"Options, under `method` of a stage with `sample: {name}`:"))
    if name in EXAMINERS:
        parts.append((examiner_named(name), f"Options, under `options` of an evaluation with `kind: {name}`:"))
    text = []
    for cls, where in parts:
        text += [f"{name}  ({cls.__module__})", "", inspect.cleandoc(cls.__doc__ or ""), "", where, *_options(cls), ""]
    return "\n".join(text).rstrip()


def _options(cls: type, *, without: Sequence[str] = (), prefix: str = "") -> list[str]:
    """The fields of a class as lines: name, default, help."""
    from posttrain.options import field_help

    helps, lines = field_help(cls), []
    for field in fields(cls):
        if field.name in without or not field.init:
            continue
        value: Any = "" if field.default is MISSING else field.default
        if field.default_factory is not MISSING:
            value = field.default_factory()
        lines.append(f"  {prefix}{field.name}={getattr(value, '__name__', value)}    {helps.get(field.name, '')}".rstrip())
    return lines or ["  none"]


def markdown() -> str:
    """The table of methods for the README and the docs."""
    lines = ["| method | family | title | source | file |", "|---|---|---|---|---|"]
    for row in methods():
        source = f"arXiv {row['arxiv']}" if row.get("arxiv") else ""
        lines.append(f"| `{row['name']}` | {row['family']} | {row['title']} | {source} | `{row['file']}` |")
    return "\n".join(lines)


def parts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Makers, or kinds of evaluation, as a table for the docs."""
    lines = ["| name | what | source | file |", "|---|---|---|---|"]
    for row in rows:
        source = f"arXiv {row['arxiv']}" if row["arxiv"] else ""
        lines.append(f"| `{row['name']}` | {row['title']} | {source} | `{row['file'].removeprefix('posttrain/')}` |")
    return "\n".join(lines)
