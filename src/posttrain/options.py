"""Options are read once, from fields: `key=value` and YAML become frozen values; an unknown key is refused with the nearest."""

from __future__ import annotations

import importlib
import itertools
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from types import SimpleNamespace, UnionType
from typing import Any, TypeVar

import pydantic
import yaml

from posttrain.errors import ConfigError, nearest

T = TypeVar("T")

FORMULAS = ("reductions", "advantages", "ratios", "surrogates", "divergences", "preferences", "sequences", "steps")
"""Modules of `posttrain.formulas` in which a function is looked up by name."""


def parsed(pairs: Iterable[str]) -> dict[str, Any]:
    """`["beta=0.2", "optimizer.lr=1e-4"]` as a dictionary; values are read as YAML.

    Raises:
        ConfigError: An item has no '=', or its value is not YAML.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{pair}' is no option; write key=value, for instance beta=0.2")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as cause:
            raise ConfigError(f"the value of '{key}' cannot be read: {cause}") from cause
        found[key.strip()] = _number(value)
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; a person means a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in "eE.") and any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value


def field_help(cls: type) -> dict[str, str]:
    """The docstring under each field of a class, its bases included: also the command line's help."""
    import ast
    import inspect

    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError, IndentationError):
            continue
        body = typing.cast("ast.ClassDef", tree.body[0]).body
        for before, after in itertools.pairwise(body):
            if not (isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)):
                continue
            if (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[before.target.id] = " ".join(after.value.value.split())
    return found


def function_named(name: str) -> Callable[..., Any]:
    """A formula by its name.

    Raises:
        ConfigError: There is no such function.
    """
    known: dict[str, Callable[..., Any]] = {}
    for home in FORMULAS:
        module = importlib.import_module(f"posttrain.formulas.{home}")
        known |= {k: v for k, v in vars(module).items() if callable(v) and not k.startswith("_")}
    if name not in known:
        raise ConfigError(f"there is no formula '{name}'{nearest(name, known)}")
    return known[name]


def _is_function(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Callable or origin is Callable or origin is typing.get_origin(Callable[..., Any]):
        return True
    return any(_is_function(argument) for argument in typing.get_args(hint)) if origin is typing.Union else False


def build(cls: type[T], values: Mapping[str, Any], *, what: str = "") -> T:
    """A frozen dataclass from plain values, each read as its field's type.

    Args:
        cls: The dataclass.
        values: Field -> value; text is converted, a function is named.
        what: How to call it in errors; by default the class.

    Raises:
        ConfigError: A key is unknown, a value does not fit, or a field without default is missing.
    """
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    name = what or cls.__name__
    hints = _hints(cls)
    ready: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{name} has no option '{key}'{nearest(key, known)}")
        ready[key] = _value(f"{name}.{key}", hints.get(key, Any), value)
    for key, field in known.items():
        if key not in ready and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{name} needs '{key}'")
    return cls(**ready)


def _hints(cls: type) -> dict[str, Any]:
    """The type of each field; `Any` for one whose names are imported for type checking only."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        names = vars(sys.modules[base.__module__])
        for key, note in vars(base).get("__annotations__", {}).items():
            if key not in known:
                continue
            try:
                found |= typing.get_type_hints(SimpleNamespace(__annotations__={key: note}), globalns=names)
            except NameError:
                found[key] = Any
    return found


def _value(name: str, hint: Any, value: Any) -> Any:
    if _is_function(hint) or (isinstance(value, str) and hint is Any):
        return function_named(value) if isinstance(value, str) and _is_function(hint) else value
    if hint is Any:
        return value
    if isinstance(value, str | int | float) and _is_several(hint):
        value = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else [value]
    try:
        adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
        return adapter.validate_python(value)
    except pydantic.ValidationError as cause:
        key = name.rpartition(".")[2]
        raise ConfigError(f"{name} is {value!r}: {_expected(cause, key)}") from cause
    except pydantic.errors.PydanticUserError:
        return value


def _is_several(hint: Any) -> bool:
    """Does a field hold several values and never a single text, so that `a,b` means two of them?"""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    origins = [typing.get_origin(choice) or choice for choice in choices]
    return any(origin in (tuple, list) for origin in origins) and str not in origins


_KINDS = {
    "int": "a whole number, for instance {key}=100",
    "float": "a number, for instance {key}=0.1",
    "bool": "true or false, for instance {key}=true",
    "tuple": "a list, for instance {key}=a,b",
    "list": "a list, for instance {key}=a,b",
    "string": "text, for instance {key}=word",
    "dict": "names and values, for instance {key}='{{name: value}}'",
    "mapping": "names and values, for instance {key}='{{name: value}}'",
}
"""What is expected in place of a value, by the first word of pydantic's kind of error."""


def _expected(error: pydantic.ValidationError, key: str) -> str:
    """The first complaint in words."""
    first = error.errors()[0]
    kind = str(first["type"]).partition("_")[0]
    if kind == "literal":
        return f"expected {first['ctx']['expected']}"
    return f"expected {_KINDS[kind].format(key=key)}" if kind in _KINDS else first["msg"].lower()
