"""What this library holds, read from the code: methods, recipes, evaluations, with their sources."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
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
    """Every evaluation."""
    title = "accuracy, mean@k and pass@k with intervals"
    file = "posttrain/evaluation/accuracy.py"
    return [
        {"name": "accuracy", "kind": "evaluation", "family": "", "title": title, "arxiv": "2107.03374", "file": file}
    ]


def catalogue() -> list[dict[str, Any]]:
    """Everything, each with name, kind, family, title, arXiv id and file."""
    keys = ("name", "kind", "family", "title", "arxiv", "file")
    return [{key: row.get(key) for key in keys} for row in (*methods(), *recipes(), *evaluations())]


def described(name: str) -> str:
    """A method's docstring and its options with their defaults and help.

    Raises:
        ConfigError: There is no such method.
    """
    import inspect

    from posttrain.methods import METHODS, method
    from posttrain.options import field_help

    if name not in METHODS:
        raise ConfigError(f"there is no method '{name}'{nearest(name, METHODS)}")
    cls = method(name)
    text = [
        f"{name}  ({cls.__module__})",
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        "Options:",
    ]
    helps = field_help(cls)
    for field in fields(cls):
        value = (
            field.default
            if field.default is not MISSING
            else (field.default_factory() if field.default_factory is not MISSING else "")
        )
        shown = getattr(value, "__name__", value)
        text.append(f"  {field.name}={shown}    {helps.get(field.name, '')}")
    return "\n".join(text)


def markdown() -> str:
    """The table of methods for the README and the docs."""
    lines = ["| method | family | title | source | file |", "|---|---|---|---|---|"]
    for row in methods():
        source = f"arXiv {row['arxiv']}" if row.get("arxiv") else ""
        lines.append(f"| `{row['name']}` | {row['family']} | {row['title']} | {source} | `{row['file']}` |")
    return "\n".join(lines)
