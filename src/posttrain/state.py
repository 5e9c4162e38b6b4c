"""What must survive a kill: saves that appear whole or not at all, and are checked byte by byte before they are used.

    folder/
      step-00000042/
        state.safetensors   the tensors
        state.json          the values
        manifest.json       format, step, identity, size and SHA-256 of both; written last
      step-00000041/        the save before, removed only when the new one has been read back from the disk

A save is built under a hidden name, made durable, read back, and renamed.  A save that is torn, truncated, altered,
incomplete or of a foreign format is never loaded: it is named in a warning and the next older one is tried.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from posttrain import files
from posttrain.errors import CheckpointError
from posttrain.exact_json import JSON, dumps, loads
from posttrain.files import atomic_folder, atomic_write, run_lock
from posttrain.manifest import (
    NAME,
    Manifest,
    hash_bytes,
    hash_file,
    hash_files,
    hash_folder,
    read_manifest,
    whole,
    why_not_whole,
    write_manifest,
)
from posttrain.tensor_file import read_tensors, write_file, write_tensors

__all__ = [
    "JSON",
    "Saved",
    "atomic_folder",
    "atomic_write",
    "hash_files",
    "hash_folder",
    "load_state",
    "read_manifest",
    "run_lock",
    "save_state",
    "whole",
    "why_not_whole",
    "write_manifest",
]

log = logging.getLogger("posttrain")

TENSORS = "state.safetensors"
VALUES = "state.json"
STEP = re.compile(r"(?:step-(\d{8,})|\.step-(\d{8,})\.replaced)")


@dataclass(frozen=True)
class Saved:
    """A save that was whole when it was read."""

    step: int
    tensors: dict[str, Tensor]  # on the CPU
    values: dict[str, JSON]
    identity: JSON  # what the saver said the run is
    path: Path


def _saves(folder: Path) -> list[tuple[int, Path]]:
    """All that looks like a save, newest first; one that was set aside stands after the one that replaced it."""
    if not folder.is_dir():
        return []
    found = [(matched, folder / name) for name in os.listdir(folder) if (matched := STEP.fullmatch(name))]
    return sorted(
        ((int(m[1] or m[2]), path) for m, path in found), key=lambda save: (-save[0], save[1].name.startswith("."))
    )


def save_state(
    folder: Path | str,
    step: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, JSON],
    *,
    keep: int = 2,
    identity: JSON = None,
) -> Path:
    """Save a run's state as `folder/step-<step>/`; when this returns, it is on the disk and was read back from it.

    Args:
        step: At least that of every whole save in the folder.
        tensors: Any shape, strides and device; bool, integers, float8 to float64, complex64.
        values: JSON values; floats come back exactly, infinities and NaN included.
        keep: How many saves to keep, this one included.
        identity: What the run is (model, recipe), to be compared by `load_state`.

    Returns:
        The folder of the save.

    Raises:
        CheckpointError: Nothing was saved (full disk, failing disk, a value that is not JSON); the older saves stand.
    """
    folder = Path(folder)
    path = folder / f"step-{step:08d}"
    if step < 0 or keep < 1:
        raise CheckpointError(f"step is {step} and keep is {keep}; expected step >= 0 and keep >= 1")
    try:
        text = dumps(dict(values)).encode()
        dumps(identity)
    except TypeError as cause:
        raise CheckpointError(f"step {step} cannot be saved to {folder}: {cause}") from cause
    with files.scope("save"):
        files.make_folders(folder)
        _refuse_older(folder, step)
        partial = files.partial_name(path)
        try:
            files.sweep(folder)
            files.make_folders(partial)
            held = {TENSORS: write_tensors(partial / TENSORS, tensors), VALUES: write_file(partial / VALUES, [text])}
            manifest = Manifest("state", held, {"step": step, "identity": identity})
            content = manifest.encoded()
            write_file(partial / NAME, [content])
            files.sync_folder(partial)
            _read_back(partial, manifest, content)
            files.publish(partial, path)
        except BaseException as cause:
            files.remove_quietly(partial)
            if isinstance(cause, OSError | TypeError | UnicodeEncodeError):
                raise CheckpointError(_failed(cause, folder, step)) from cause
            raise
        _prune(folder, step, keep)
    return path


def _failed(cause: Exception, folder: Path, step: int) -> str:
    older = ", ".join(path.name for _, path in _saves(folder)) or "none"
    what = f"step {step} could not be saved to {folder} (older saves, untouched: {older})"
    return files.trouble(cause, what) if isinstance(cause, OSError) else f"{what}: {cause}"


def _refuse_older(folder: Path, step: int) -> None:
    """Whoever saves an earlier step than a whole save holds has not loaded it: later work is never removed."""
    for later, path in _saves(folder):
        if later > step and not _damage(path, later):
            message = f"{path} is a whole save of a later step than {step}; load it, or save to another folder"
            raise CheckpointError(message)


def _read_back(partial: Path, manifest: Manifest, content: bytes) -> None:
    """Compare what the disk holds with what was meant; cached pages are dropped first, where the system can."""
    for name in (*manifest.files, NAME):
        handle = os.open(partial / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    altered = [name for name, expected in manifest.files.items() if hash_file(partial / name) != expected]
    if (partial / NAME).read_bytes() != content:
        altered.append(NAME)
    if altered:
        raise OSError(
            f"{', '.join(altered)} read back differently from what was written; the disk or the memory is failing"
        )


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove saves beyond `keep`; those that cannot be whole do not count, and go too.  Failures are only reported."""
    kept = 0
    for found, path in _saves(folder):
        if path.name.startswith("."):  # set aside: the next sweep removes it
            continue
        torn = found > step or (found != step and bool(_damage(path, found, sizes_only=True)))
        if torn:
            log.warning("%s is not whole and is removed", path)
        kept += not torn
        if torn or kept > keep:
            files.discard(path)


def _manifest(path: Path, step: int) -> Manifest:
    """The manifest of a save, itself verified, with the files present and of the right size."""
    manifest = read_manifest(path)
    if manifest.kind != "state" or set(manifest.files) != {TENSORS, VALUES} or manifest.fields.get("step") != step:
        found = f"{manifest.kind!r}, step {manifest.fields.get('step')!r}, files {sorted(manifest.files)}"
        raise ValueError(f"its manifest is that of {found}; expected 'state', step {step}, files {[VALUES, TENSORS]}")
    for name, expected in manifest.files.items():
        size = (path / name).stat().st_size
        if size != expected.bytes:
            raise ValueError(f"{name} has {size} bytes; expected {expected.bytes}")
    return manifest


def _damage(path: Path, step: int, *, sizes_only: bool = False) -> str:
    """What is wrong with a save, or ""."""
    try:
        manifest = _manifest(path, step)
        altered = (
            [] if sizes_only else [name for name, file in manifest.files.items() if hash_file(path / name) != file]
        )
    except (OSError, ValueError) as cause:
        return str(cause)
    return f"damaged: {', '.join(altered)}" if altered else ""


def _read(path: Path, manifest: Manifest, step: int) -> Saved:
    """The save, from the very bytes that were hashed."""
    tensors = read_tensors(path / TENSORS, manifest.files[TENSORS])
    text = (path / VALUES).read_bytes()
    if hash_bytes(text) != manifest.files[VALUES]:
        raise ValueError(f"{VALUES} is damaged: its hash is not the one in the manifest")
    return Saved(step, tensors, loads(text), manifest.fields.get("identity"), path)


def load_state(folder: Path | str, *, identity: JSON = None) -> Saved | None:
    """The newest whole save of a folder; nothing on the disk is changed, so all ranks may call it.

    Args:
        identity: What the run is now; not compared when None.

    Returns:
        The save, or None when the folder holds none at all.

    Raises:
        CheckpointError: There are saves but none is whole, or the newest whole one is of another run.
    """
    folder = Path(folder)
    reasons: list[str] = []
    for step, path in _saves(folder):
        try:
            manifest = _manifest(path, step)
            saved_identity = manifest.fields.get("identity")
            if identity is not None and dumps(identity, sort_keys=True) != dumps(saved_identity, sort_keys=True):
                raise _Foreign(saved_identity)
            return _read(path, manifest, step)
        except _Foreign as foreign:
            message = (
                f"{path} was saved by another run: its identity is {foreign.identity!r}; this run's is {identity!r}; "
                "choose another folder, or go back to the settings that made it"
            )
            raise CheckpointError(message) from None
        except (OSError, ValueError) as cause:
            reasons.append(f"{path.name}: {cause}")
            log.warning("%s is not whole and is not used (%s); trying the next older save", path, cause)
    if reasons:
        listed = "; ".join(reasons)
        raise CheckpointError(
            f"{folder} holds {len(reasons)} saves and none is whole ({listed}); remove the folder to start over"
        )
    return None


class _Foreign(Exception):
    """A whole save of another run."""

    def __init__(self, identity: JSON) -> None:
        super().__init__()
        self.identity = identity
