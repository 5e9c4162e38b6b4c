"""Everything this library raises on purpose.

    PosttrainError
    ├── ConfigError (ValueError)        an option, a recipe or a combination that cannot be honoured
    ├── DataError (ValueError)          a file or a row: names the file, the line and what was expected
    ├── TemplateError (DataError)       a chat template or rendered sample that must not be trained on
    ├── MissingExtraError (ImportError) an optional dependency: the message is the install line
    ├── CheckpointError (OSError)       a save that could not be made, or a folder that cannot be trusted
    ├── NumericsError (ArithmeticError) too many non-finite updates: names tensor, sample and layer
    ├── WorldError (RuntimeError)       a rank died or did not arrive in time: names the wait and the ranks
    ├── SamplerError (RuntimeError)     a sampler in another process failed, or has other weights than the trainer
    ├── RewardError (RuntimeError)      the rewards' infrastructure failed above the allowed rate
    ├── MethodError (RuntimeError)      a method of the user's own file raised: names file, line and function
    └── NotRead (AttributeError)        a method asked for a reading that its views do not declare

Every message says what was found, what was expected, and what to write instead.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PosttrainError(Exception):
    """The base of every error of this library."""


class ConfigError(PosttrainError, ValueError):
    """An option, a recipe or a combination of them that cannot be honoured."""


class DataError(PosttrainError, ValueError):
    """A file or a row that cannot be used; the message names file, line and what was expected."""


class TemplateError(DataError):
    """A chat template, or a sample rendered with it, that must not be trained on."""


class MissingExtraError(PosttrainError, ImportError):
    """An optional dependency that is not installed; the message holds the line that installs it."""


class CheckpointError(PosttrainError, OSError):
    """A save that could not be made, or a saved folder that cannot be trusted."""


class NumericsError(PosttrainError, ArithmeticError):
    """Non-finite values in too many updates."""


class WorldError(PosttrainError, RuntimeError):
    """Another rank died, or did not arrive before the deadline; the message names the wait and the ranks."""


class SamplerError(PosttrainError, RuntimeError):
    """A sampler in another process that failed, or that writes with other weights than the trainer's."""


class RewardError(PosttrainError, RuntimeError):
    """The rewards' infrastructure (not the policy) failed more often than the run allows."""


class MethodError(PosttrainError, RuntimeError):
    """A method of the user's own raised; the message names its file, line and function."""


class NotRead(PosttrainError, AttributeError):
    """A reading that no view declares."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `" (nearest: 'beta', 'beta_2')"`, or the known names when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return " (nearest: " + ", ".join(repr(name) for name in close) + ")"
    return " (known: " + ", ".join(names) + ")" if names else " (none are known here)"


def extra(module: str, name: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: The module to import, for instance `"peft"`.
        name: The extra of this package that brings it.

    Raises:
        MissingExtraError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        message = f"'{module}' is not installed; this feature needs it: pip install 'posttrain[{name}]'"
        raise MissingExtraError(message) from cause
