"""What went wrong in a file of the user's own, said as its line and function; the whole trace goes to a file."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import MethodError, PosttrainError
from posttrain.files import atomic_write
from posttrain.method import Method
from posttrain.rewards.reference import is_own

TRACE = "error.txt"
"""The file in a run folder that holds the whole trace."""


def where(error: BaseException) -> str | None:
    """The innermost place in a user's file that an error passed, or None where it passed none.

    As `method Focal (focal.py:19, in loss)`; without a method, as `focal.py:19, in helper`.
    """
    found: str | None = None
    owner: str | None = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if not is_own(code.co_filename):
            continue
        this = frame.f_locals.get("self")
        owner = type(this).__name__ if isinstance(this, Method) else owner
        found = f"{Path(code.co_filename).name}:{line}, in {code.co_name}"
    return found and (f"method {owner} ({found})" if owner else found)


@contextlib.contextmanager
def own_code(out: str | Path) -> Iterator[None]:
    """Say an error of the user's own method in one line, and write its whole trace to `out`.

    Raises:
        MethodError: In place of an error that passed a line of a user's file.
    """
    try:
        yield
    except PosttrainError:
        raise
    except Exception as cause:
        place = where(cause)
        if place is None:
            raise
        said = f"{place}: {type(cause).__name__}: {str(cause).strip() or 'no message'}"
        file = Path(out) / TRACE
        with contextlib.suppress(OSError):
            atomic_write(file, "".join(traceback.format_exception(cause)))
            said += f"; the whole trace is in {file}"
        raise MethodError(said) from cause


__all__ = ["TRACE", "own_code", "where"]
