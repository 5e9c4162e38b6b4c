'''A function of the user's own file as a reward: `--reward file.py:function`.

The file is read here but run only in the worker:

    # my_reward.py
    def short(answer):
        """One answer: a number, a bool, a verdict or None."""
        return -answer.num_tokens / 100

    def ranked(answers):
        """Several answers, because the parameter is called `answers` (or annotated `list[Answer]`)."""
        longest = max(answer.num_tokens for answer in answers)
        return [answer.num_tokens / longest for answer in answers]
'''

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import ConfigError, nearest
from posttrain.rewards.reference import load_file
from posttrain.rewards.reward import Reward, reads_list

__all__ = ["FileFunction", "load_reward"]


@dataclass(frozen=True)
class FileFunction:
    """The function `function` of the file `file`, found without running the file.

    Raises:
        ConfigError: No such file or function, a file that is not Python, or a function without parameters.
    """

    file: str
    """Path of a Python file."""
    function: str
    """Name of a function at its top level."""
    takes_list: bool = field(init=False)
    """Does its first parameter stand for a list of answers?"""

    only_in_worker: ClassVar[bool] = True

    def __post_init__(self) -> None:
        path = Path(self.file).expanduser().resolve()
        object.__setattr__(self, "file", str(path))
        object.__setattr__(self, "takes_list", _takes_list(path, self.function))

    def prepare(self) -> None:
        """Run the file."""
        getattr(load_file(self.file), self.function)

    def __call__(self, answers: Any) -> Any:
        return getattr(load_file(self.file), self.function)(answers)


def load_reward(spec: str, **fields: Any) -> Reward:
    """A reward from `file.py:function`, called after the function unless `fields` names it.

    Args:
        spec: Path of a Python file, a colon, the name of a function in it.
        fields: Other fields of `Reward`: weight, scope, deadline, gate, ...

    Raises:
        ConfigError: What is missing, with the nearest names.
    """
    file, colon, function = spec.rpartition(":")
    if not colon or not file or not function:
        raise ConfigError(f"found reward {spec!r}; write file.py:function")
    return Reward(**{"name": function, "fn": FileFunction(file, function), **fields})


def _takes_list(path: Path, name: str) -> bool:
    """Does the function take a list?  Found in the file's syntax tree."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except FileNotFoundError:
        beside = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no file {path}{nearest(path.name, beside)}") from None
    except (OSError, SyntaxError, ValueError) as cause:
        raise ConfigError(f"{path} cannot be read as Python: {cause}") from cause
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        raise ConfigError(f"{path} has no function '{name}' at its top level{nearest(name, functions)}")
    taken = [*functions[name].args.posonlyargs, *functions[name].args.args]
    if not taken:
        raise ConfigError(f"'{name}' in {path} takes no parameter; a reward takes one Answer or a list of them")
    return reads_list(taken[0].arg, ast.unparse(taken[0].annotation) if taken[0].annotation else "")
