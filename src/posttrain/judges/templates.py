"""What judges are asked: the texts of templates.yaml, filled in, with everything that a model wrote fenced.

>>> messages = template_named("rating").messages(prompt="1 + 1?", answer="2")
>>> messages[0]["role"], "```\\n2\\n```" in messages[0]["content"]
('user', True)
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import ConfigError, nearest

__all__ = ["LETTERS", "Template", "conversation", "fenced", "lettered", "template_named", "templates"]

LETTERS = string.ascii_uppercase
_SHIPPED = Path(__file__).with_name("templates.yaml")
_FENCED = frozenset({"first", "second", "answer"})


@dataclass(frozen=True, kw_only=True)
class Template:
    """One kind of question to a judge.

    Raises:
        ConfigError: A text without options, or values that do not fit them.
    """

    name: str
    text: str
    """What is asked; `{prompt}`, `{first}`, ... are filled in."""
    options: tuple[str, ...]
    """What the judge chooses among; empty: as many letters as there are answers."""
    values: tuple[float, ...] = ()
    """What each option is worth, where it is a rating."""
    principle: str = ""
    """What `{principle}` is unless the caller says otherwise."""
    system: str = ""
    think: str = ""
    """Asked behind `text` so that the judge reasons first; the options are read afterwards, not what it decides in passing."""
    ending: str = ""
    """The second question, behind the rationale."""
    begun: str = ""
    """How the judge's answer begins, for local models: the options are read behind it."""
    until: str = ""
    """The rationale ends before this text."""

    def __post_init__(self) -> None:
        def refuse(found: str, write: str) -> ConfigError:
            return ConfigError(f"template '{self.name}': found {found}; {write}")

        if len(set(self.options)) != len(self.options) or len(self.options) == 1:
            raise refuse(f"options {list(self.options)}", "write at least two different ones, or 'letters'")
        if self.values and len(self.values) != len(self.options):
            raise refuse(f"{len(self.values)} values for {len(self.options)} options", "write one an option")
        if self.values and max(self.values) <= min(self.values):
            raise refuse(f"values {list(self.values)}", "write numbers of which one is greater than another")
        if self.think and not (self.ending or self.begun):
            raise refuse("think without ending or begun", "say how the verdict is asked for after the rationale")

    def messages(self, **given: str) -> list[dict[str, str]]:
        """The question, with `given` filled in; what a model wrote (`first`, `second`, `answer`) is fenced here.

        Raises:
            ConfigError: The text has a hole that is not given.
        """
        filled = {key: fenced(value) if key in _FENCED else value for key, value in given.items()}
        filled["principle"] = (given.get("principle") or self.principle).strip().removesuffix("Options:").rstrip()
        try:
            text = self.text.format(**filled)
        except (KeyError, IndexError, ValueError) as cause:
            known = ", ".join(sorted(filled))
            raise ConfigError(f"template '{self.name}': {cause} cannot be filled in; its holes may be {known}") from None
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": text}]


def fenced(text: str) -> str:
    """The text between fences that are longer than any in it, so that nothing in it can close them.

    >>> print(fenced("a ``` b"))
    ````
    a ``` b
    ````
    """
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}\n{text}\n{fence}"


def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """What was asked, as a judge reads it: a single message as it stands, several with who spoke.

    >>> conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'User: Hi\\n\\nAssistant: Hello'
    """
    texts = [str(message.get("content") or "") for message in messages]
    if len(messages) == 1:
        return texts[0]
    speakers = [str(message.get("role", "")).capitalize() for message in messages]
    return "\n\n".join(f"{who}: {text}" for who, text in zip(speakers, texts, strict=True))


def lettered(answers: list[str]) -> str:
    """Answers as lettered options, each fenced.

    Raises:
        ConfigError: There are more answers than letters.
    """
    if not 2 <= len(answers) <= len(LETTERS):
        raise ConfigError(f"found {len(answers)} answers to choose among; expected 2 to {len(LETTERS)}")
    return "\n".join(f"({letter})\n{fenced(answer)}" for letter, answer in zip(LETTERS, answers, strict=False))


def template_named(name: str) -> Template:
    """A template by its name in templates.yaml, or `FILE.yaml:NAME` for one of the user's own.

    Raises:
        ConfigError: There is no such file or template, or one that cannot be used; with the nearest names.
    """
    file, colon, inner = name.rpartition(":")
    path = Path(file).expanduser() if colon else _SHIPPED
    known = templates(path)
    if inner not in known:
        raise ConfigError(f"there is no template '{inner}' in {path.name}{nearest(inner, known)}")
    return known[inner]


@lru_cache(maxsize=16)
def templates(path: Path = _SHIPPED) -> dict[str, Template]:
    """All templates of a file by name."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as cause:
        raise ConfigError(f"templates are read from a YAML file, and {path} cannot be: {cause}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; expected templates by name")
    return {str(name): _template(str(name), value) for name, value in found.items()}


def _template(name: str, found: Any) -> Template:
    known = [field.name for field in fields(Template) if field.name != "name"]
    if not isinstance(found, dict) or "text" not in found or "options" not in found:
        raise ConfigError(f"template '{name}' needs 'text' and 'options'; it may have {', '.join(known)}")
    for key in found:
        if key not in known:
            raise ConfigError(f"template '{name}' has no '{key}'{nearest(str(key), known)}")
    options = () if found["options"] == "letters" else tuple(str(option) for option in found["options"])
    values = tuple(float(value) for value in found.get("values", ()))
    texts = {key: str(value) for key, value in found.items() if key not in ("options", "values")}
    return Template(name=name, options=options, values=values, **texts)
