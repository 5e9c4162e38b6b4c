"""Principles: what a model is asked when it criticises an answer, revises it, or chooses between answers.

Source: "Constitutional AI: Harmlessness from AI Feedback", arXiv:2212.08073, section 3.1 and appendix C; the seven that ship are
worded here after the themes of public simplified recipes, not copied from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from posttrain.errors import ConfigError, nearest
from posttrain.random import uniform

__all__ = ["Principle", "drawn", "load_constitution"]

PRINCIPLE = 43
"""Stream of random numbers that principles are drawn from."""

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Principle:
    """One principle, as the three things that are asked of a model."""

    name: str
    critique: str
    """What is asked about an answer: in which way does it fall short?"""
    revision: str
    """What is asked for after the critique: the answer without that fault."""
    choice: str
    """The question when answers are compared: which one is better?"""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name).strip():
                raise ConfigError(f"principle '{self.name}' has an empty '{field.name}'; write what a model is to be asked")


def load_constitution(source: str | Path | None = None) -> tuple[Principle, ...]:
    """The principles of a constitution.

    Args:
        source: A YAML file, a list of `{name, critique, revision, choice}`; the name of one that ships (`principles`,
            `forbidden-words`); None or "" for the seven default principles.

    Raises:
        ConfigError: There is no such file, or it is not such a list; the message names the entry and the key.
    """
    shipped = {path.stem: path for path in sorted(_HERE.glob("*.yaml"))}
    name = str(source or "principles")
    path = shipped.get(name) or Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"there is no constitution '{name}'{nearest(name, shipped)}; give a name or a .yaml file")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path.name} is not YAML: {cause}") from None
    if not isinstance(found, list) or not found:
        what = "nothing" if not found else type(found).__name__
        raise ConfigError(f"{path.name} holds {what}; expected a list of principles, each with name, critique, revision and choice")
    principles = tuple(_principle(entry, f"{path.name}, principle {number}") for number, entry in enumerate(found, start=1))
    names = [principle.name for principle in principles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path.name} has two principles called '{twice}'; expected names that differ")
    return principles


def _principle(entry: Any, place: str) -> Principle:
    known = [field.name for field in fields(Principle)]
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{place} is {type(entry).__name__}; expected a mapping with {', '.join(known)}")
    for key in entry:
        if key not in known:
            raise ConfigError(f"{place} has no '{key}'{nearest(str(key), known)}")
    for key in known:
        if not isinstance(entry.get(key), str):
            what = "no" if key not in entry else f"{type(entry[key]).__name__} as"
            raise ConfigError(f"{place} has {what} '{key}'; expected text")
    return Principle(**{key: entry[key].strip() for key in known})


def drawn(principles: Sequence[Principle], count: int, *, seed: int, step: int) -> list[Principle]:
    """A principle for each of `count` cases, uniformly; it depends on (seed, step, number of the case) alone."""
    numbers = torch.arange(count)
    places = (uniform(seed, step, numbers, torch.zeros_like(numbers), stream=PRINCIPLE) * len(principles)).long()
    return [principles[place] for place in places.tolist()]
