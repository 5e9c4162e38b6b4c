"""Functions by name, as JSON: how a worker finds the function it is to run, without pickle.

>>> from posttrain.rewards.length import SoftOverlong
>>> describe(SoftOverlong(max_tokens=64, cushion=16))["fields"]
{'max_tokens': 64, 'cushion': 16}
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.errors import ConfigError, nearest

__all__ = ["describe", "is_own", "load_file", "resolve", "trace"]

_OWN = "posttrain_reward_"  # how modules that are files of the user begin


def describe(fn: Callable[..., Any]) -> dict[str, Any]:
    """The JSON by which `resolve` finds `fn` in another process.

    Raises:
        ConfigError: It has no name of its own (a lambda, an inner function), or values that are not JSON.
    """
    if isinstance(fn, functools.partial):
        if fn.args:
            raise ConfigError(f"{fn} holds positional arguments; give them by keyword")
        return {"kind": "partial", "of": describe(fn.func), "keywords": _plain(fn, dict(fn.keywords))}
    if dataclasses.is_dataclass(fn) and not isinstance(fn, type):
        fields = {f.name: getattr(fn, f.name) for f in dataclasses.fields(fn) if f.init}
        return {"kind": "value", **_named(type(fn)), "fields": _plain(fn, fields)}
    return {"kind": "function", **_named(fn)}


def resolve(reference: dict[str, Any]) -> Callable[..., Any]:
    """The function that `describe` described."""
    if reference["kind"] == "partial":
        return functools.partial(resolve(reference["of"]), **reference["keywords"])
    found: Any = _module(reference["module"], reference["file"])
    for part in reference["name"].split("."):
        found = getattr(found, part)
    made: Callable[..., Any] = found(**reference["fields"]) if reference["kind"] == "value" else found
    return made


def load_file(path: str | Path) -> ModuleType:
    """Run a Python file as a module, with its folder importable.  A file of rewards is run only in workers."""
    file = Path(path).resolve()
    name = f"{_OWN}{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def is_own(file: str) -> bool:
    """Was a file run by `load_file`?"""
    return any(name.startswith(_OWN) and getattr(module, "__file__", None) == file for name, module in list(sys.modules.items()))


def trace(error: BaseException) -> str:
    """A traceback of the function that `resolve` found: the files of this package that call it are left out."""
    told = traceback.TracebackException.from_exception(error)
    link: traceback.TracebackException | None = told
    while link is not None:
        frames = [frame for frame in link.stack if frame.filename not in _PLUMBING and "importlib" not in frame.filename]
        link.stack = traceback.StackSummary.from_list(frames)
        link = link.__cause__ or link.__context__
    return "".join(told.format() if told.stack else told.format_exception_only()).rstrip()


_PLUMBING = {str(Path(__file__).with_name(name)) for name in ("reference.py", "runner.py", "user.py", "wire.py", "worker.py")}


def _named(thing: Any) -> dict[str, str]:
    """Module, name and file of a function or class that can be imported."""
    name, module = getattr(thing, "__qualname__", ""), sys.modules.get(getattr(thing, "__module__", ""))
    if not name or "<" in name or module is None:
        raise ConfigError(
            f"{thing!r} has no name another process could find it by; define it at the top level of a file, or write where='inline'"
        )
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not thing:
        known = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigError(f"'{name}' is not what {module.__name__} holds under that name{nearest(name, known)}")
    file = getattr(module, "__file__", None)
    if module.__name__ == "__main__" and file is None:
        raise ConfigError(f"'{name}' was typed in, so another process cannot find it; put it in a file")
    return {"module": module.__name__, "name": name, "file": str(Path(file).resolve()) if file else ""}


def _module(name: str, file: str) -> ModuleType:
    """The module called `name` when it is that file, else the file itself (a script, or a file outside `sys.path`)."""
    if name != "__main__":
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            if not file:
                raise
        else:
            if not file or Path(getattr(module, "__file__", None) or "").resolve() == Path(file):
                return module
    return load_file(file)


def _plain(owner: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values, if JSON keeps them."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as cause:
        raise ConfigError(f"{owner!r} holds a value that is not JSON ({cause}); write where='inline'") from cause
    return values
