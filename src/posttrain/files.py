"""Files and folders that are there whole or not at all, whatever happens in between.

Everything is written beside its destination under a hidden name, `.<name>.partial-<pid>`, made durable (fsync of every
file and of the folder), renamed, and the rename made durable (fsync of the parent).  A killed writer leaves only hidden
names, which the next writer of the same name removes.

Every operation that changes the disk is announced to watchers before it happens.  Tests fail, record or kill there.
A person can kill from outside with the environment variable `POSTTRAIN_KILL_AT` (a testing aid, ignored when unset):
`save:3:7` ends the process with SIGKILL before the 7th operation of its 3rd save; `save:3:rename` before the first
rename of it; `folder:` and `file:` count artifacts and single files in place of saves.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from posttrain.errors import CheckpointError, ConfigError
from posttrain.lock import run_lock

__all__ = [
    "KILL_VARIABLE",
    "NewFile",
    "Operation",
    "atomic_folder",
    "atomic_write",
    "discard",
    "is_full",
    "make_folders",
    "partial_name",
    "publish",
    "remove_quietly",
    "remove_tree",
    "run_lock",
    "scope",
    "sweep",
    "sync_folder",
    "sync_tree",
    "trouble",
    "watched",
]

log = logging.getLogger("posttrain")

KILL_VARIABLE = "POSTTRAIN_KILL_AT"
Kind = Literal["make_folder", "create", "write", "sync", "sync_folder", "rename", "remove", "remove_folder"]
HIDDEN = re.compile(r"\.(?P<name>.+)\.(?:partial-(?P<pid>\d+)|(?P<mark>replaced|removed))")


# --------------------------------------------------------------------------------------------------------------
# Operations, and who watches them.


@dataclass(frozen=True)
class Operation:
    """One change of the disk that is about to happen."""

    kind: Kind
    path: Path
    target: Path | None = None  # of a rename
    data: memoryview | None = None  # of a write: the bytes that are appended


Watcher = Callable[[Operation], None]
_watchers: list[Watcher] = []
_entered: dict[str, int] = {}


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` before every operation inside; what it raises takes the place of the operation."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _announce(kind: Kind, path: Path, *, target: Path | None = None, data: memoryview | None = None) -> None:
    if _watchers:
        operation = Operation(kind, path, target, data)
        for watcher in tuple(_watchers):
            watcher(operation)


@contextmanager
def scope(name: Literal["save", "folder", "file"]) -> Iterator[None]:
    """Say what the operations inside belong to, so that `POSTTRAIN_KILL_AT` can name one of them."""
    _entered[name] = _entered.get(name, 0) + 1
    plan = os.environ.get(KILL_VARIABLE)
    killer = _killer(plan, name, _entered[name]) if plan else None
    if killer is None:
        yield
        return
    with watched(killer):
        yield


def _killer(plan: str, name: str, number: int) -> Watcher | None:
    """The watcher that ends this process, if `plan` means this scope."""
    matched = re.fullmatch(r"(save|folder|file):([1-9]\d*):([1-9]\d*|[a-z_]+)", plan)
    if matched is None or not (matched[3].isdigit() or matched[3] in get_args(Kind)):
        kinds = ", ".join(get_args(Kind))
        raise ConfigError(
            f"{KILL_VARIABLE} is '{plan}'; expected for instance 'save:3:7' or 'save:3:rename' (kinds: {kinds})"
        )
    if (matched[1], int(matched[2])) != (name, number):
        return None
    seen = 0

    def kill(operation: Operation) -> None:
        nonlocal seen
        seen += 1
        if matched[3] in (str(seen), operation.kind):
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


# --------------------------------------------------------------------------------------------------------------
# The operations.


class NewFile:
    """A file being written from its beginning; leaving the `with` block makes its bytes durable.

    Raises:
        FileExistsError: There is a file of that name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _announce("create", path)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; a short write is continued."""
        rest = memoryview(data).cast("B")
        _announce("write", self.path, data=rest)
        try:
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except OSError as cause:
            cause.filename = str(self.path)
            raise

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                _announce("sync", self.path)
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: what was made, renamed or removed there."""
    _announce("sync_folder", folder)
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as cause:
        if cause.errno != errno.EINVAL:  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(handle)


def _rename(path: Path, target: Path) -> None:
    _announce("rename", path, target=target)
    os.replace(path, target)


def make_folders(path: Path) -> None:
    """Make a folder and its missing parents, durably.

    Raises:
        CheckpointError: A file stands in the way, or the disk refuses.
    """
    try:
        missing: list[Path] = []
        above = path
        while not above.is_dir():
            missing.append(above)
            above = above.parent
        for folder in reversed(missing):
            _announce("make_folder", folder)
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
    except OSError as cause:
        raise CheckpointError(trouble(cause, f"the folder {path} could not be made")) from cause


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a whole folder, links not followed; nothing happens when it is not there."""
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            remove_tree(child)
        _announce("remove_folder", path)
        path.rmdir()
    elif path.exists() or path.is_symlink():
        _announce("remove", path)
        path.unlink()


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and itself, durable."""
    for child in sorted(folder.iterdir()):
        mode = child.lstat().st_mode
        if stat.S_ISDIR(mode):
            sync_tree(child)
        elif stat.S_ISREG(mode):
            _announce("sync", child)
            _fsync(child, os.O_RDONLY)
    sync_folder(folder)


# --------------------------------------------------------------------------------------------------------------
# Putting things in place, and taking them away.


def _beside(path: Path, mark: str) -> Path:
    return path.parent / f".{path.name}.{mark}"


def partial_name(path: Path) -> Path:
    """Where this process builds `path`."""
    return _beside(path, f"partial-{os.getpid()}")


def publish(partial: Path, path: Path) -> None:
    """Put a finished, durable file or folder in its place, durably; what stood there is replaced.

    A folder cannot be renamed over another: an old one is first set aside as `.<name>.replaced`, and removed last.
    """
    aside = _beside(path, "replaced")
    folder = path.is_dir() and not path.is_symlink()
    if folder:
        remove_tree(aside)
        _rename(path, aside)
    try:
        _rename(partial, path)
    except OSError:
        if folder:
            _rename(aside, path)
        raise
    sync_folder(path.parent)
    if folder:
        remove_quietly(aside)


def discard(path: Path) -> None:
    """Take a folder away in one step, then remove what it held; a failure is only reported."""
    aside = _beside(path, "removed")

    def remove(path: Path) -> None:
        remove_tree(aside)
        _rename(path, aside)
        remove_tree(aside)

    _attempt(remove, path)


def remove_quietly(path: Path) -> None:
    """Remove a file or folder; a failure is only reported, and the next `sweep` tries again."""
    _attempt(remove_tree, path)


def _attempt(action: Callable[[Path], None], path: Path) -> None:
    try:
        action(path)
    except OSError as cause:
        log.warning("%s could not be removed and will be tried again at the next write: %s", path, cause)


def _alive(pid: int) -> bool:
    """Does another process of this number run?  Our own number on a leftover is that of an earlier life."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep(parent: Path, *, name: str | None = None) -> None:
    """Remove what dead writers left in `parent`, and put back what was set aside and never replaced.

    Args:
        name: Only leftovers of this name; all of them without it.
    """
    with suppress(FileNotFoundError):
        for entry in sorted(os.listdir(parent)):
            matched = HIDDEN.fullmatch(entry)
            if matched is None or name not in (None, matched["name"]):
                continue
            leftover, path = parent / entry, parent / matched["name"]
            if matched["pid"] and _alive(int(matched["pid"])):
                continue
            if matched["mark"] == "replaced" and not path.exists():
                _rename(leftover, path)
                continue
            remove_quietly(leftover)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write a file (text as UTF-8) so that a reader sees the old content or the new, durably.

    Raises:
        CheckpointError: It could not be written; the old content stands.
    """
    path = Path(path)
    with scope("file"):
        make_folders(path.parent)
        partial = partial_name(path)
        try:
            sweep(path.parent, name=path.name)
            with NewFile(partial) as file:
                file.write(content.encode() if isinstance(content, str) else content)
            publish(partial, path)
        except BaseException as cause:
            remove_quietly(partial)
            if isinstance(cause, OSError):
                raise CheckpointError(trouble(cause, f"{path} could not be written")) from cause
            raise


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Build a folder that appears whole, durably, when the block ends; if the block raises, nothing appears.

    Raises:
        CheckpointError: The disk is full or refused; what stood at `path` stands as it was.

    Example:
        >>> import tempfile
        >>> home = Path(tempfile.mkdtemp())
        >>> with atomic_folder(home / "data") as folder:
        ...     _ = (folder / "rows.jsonl").write_text("{}")
        ...     (home / "data").exists()
        False
        >>> (home / "data" / "rows.jsonl").read_text()
        '{}'
    """
    path = Path(path)
    with scope("folder"):
        make_folders(path.parent)
        partial = partial_name(path)
        try:
            sweep(path.parent, name=path.name)
            _announce("make_folder", partial)
            partial.mkdir()
            yield partial
            sync_tree(partial)
            publish(partial, path)
        except BaseException as cause:
            remove_quietly(partial)
            if isinstance(cause, OSError) and not isinstance(cause, CheckpointError):
                raise CheckpointError(trouble(cause, f"{path} could not be written")) from cause
            raise


# --------------------------------------------------------------------------------------------------------------
# Saying what went wrong.


def is_full(cause: OSError) -> bool:
    """Did the disk, or the user's share of it, have no room?"""
    return cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def trouble(cause: OSError, what: str) -> str:
    """`what`, why, and what to do about it."""
    if not is_full(cause):
        return f"{what}: {cause}"
    free = ""
    with suppress(OSError, TypeError):
        free = f", {shutil.disk_usage(_nearest_folder(Path(str(cause.filename or '.')))).free / 1e6:.1f} MB are free"
    return f"{what}: the disk is full ({os.strerror(cause.errno or 0)}{free}); make room and run again"


def _nearest_folder(path: Path) -> Path:
    return path if path.is_dir() else _nearest_folder(path.parent) if path != path.parent else path
