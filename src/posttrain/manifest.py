"""Manifests: what a folder holds, with the hash of every file, so that damage is found before anything is used.

A manifest is written last.  It carries a hash of itself and must read back byte for byte as it would be written, so a
flipped bit in the manifest is found as well.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.errors import CheckpointError
from posttrain.exact_json import JSON, dumps, loads
from posttrain.files import atomic_write

__all__ = [
    "FileHash",
    "Manifest",
    "hash_bytes",
    "hash_file",
    "hash_files",
    "hash_folder",
    "read_manifest",
    "whole",
    "why_not_whole",
    "write_manifest",
]

NAME = "manifest.json"
FORMAT = "posttrain"
VERSION = 1


@dataclass(frozen=True)
class FileHash:
    """What a file must be."""

    sha256: str  # hexadecimal
    bytes: int  # size


@dataclass(frozen=True)
class Manifest:
    """What a folder must hold."""

    kind: str  # "state" | "artifact"
    files: Mapping[str, FileHash]  # by path below the folder, with "/"
    fields: Mapping[str, JSON] = field(default_factory=dict)  # of a state: step, identity; of an artifact: inputs, info

    def encoded(self) -> bytes:
        """The text of `manifest.json`, ending in its own hash."""
        body: dict[str, JSON] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "fields": dict(self.fields),
            "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(self.files.items())},
        }
        own = hashlib.sha256(dumps(body, sort_keys=True).encode()).hexdigest()
        return (dumps({**body, "sha256": own}, indent=1) + "\n").encode()

    @classmethod
    def decoded(cls, content: bytes) -> Manifest:
        """The manifest of a text.

        Raises:
            ValueError: It is damaged, or of another format or version.
        """
        try:
            raw = loads(content)
            found = (raw["format"], raw["version"])
            if found != (FORMAT, VERSION):
                raise ValueError(
                    f"{NAME} is of format {found[0]!r} version {found[1]!r}; expected {FORMAT!r} version {VERSION}"
                )
            files = {name: FileHash(str(file["sha256"]), int(file["bytes"])) for name, file in raw["files"].items()}
            manifest = cls(raw["kind"], files, raw["fields"])
            if manifest.encoded() != content:
                raise ValueError(f"{NAME} does not match its own hash")
        except (KeyError, TypeError, AttributeError, RecursionError) as cause:
            raise ValueError(f"{NAME} is not a manifest of this library ({cause!r})") from cause
        return manifest


def hash_file(path: Path) -> FileHash:
    """Size and SHA-256 of a file, read in pieces."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type, unused-ignore]
        return FileHash(digest.hexdigest(), file.tell())


def hash_bytes(content: bytes) -> FileHash:
    """Size and SHA-256 of bytes in memory."""
    return FileHash(hashlib.sha256(content).hexdigest(), len(content))


def _names(folder: Path) -> list[str]:
    """Paths of the files below a folder, sorted; hidden names and its own manifest are not content."""
    names: list[str] = []
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(place).relative_to(folder)
        names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(name for name in names if name != NAME)


def hash_files(folder: Path | str) -> dict[str, FileHash]:
    """Size and SHA-256 of every file below a folder, by path; hidden names and its own `manifest.json` are left out."""
    folder = Path(folder)
    return {name: hash_file(folder / name) for name in _names(folder)}


def hash_folder(folder: Path | str) -> str:
    """One SHA-256 for all content below a folder: names and bytes, not times, owners or the manifest.

    Raises:
        CheckpointError: There is no such folder.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    content = {name: file.sha256 for name, file in hash_files(folder).items()}
    return hashlib.sha256(dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path | str, inputs: Mapping[str, JSON], *, info: Mapping[str, JSON] | None = None
) -> Manifest:
    """Hash an artifact's files and write its `manifest.json`, atomically; call it last, inside `atomic_folder`.

    Args:
        inputs: Everything that decided the content: settings, seeds, hashes of the artifacts read.
        info: What a reader may want to know and `whole` does not compare: counts, versions, times.

    Raises:
        CheckpointError: It could not be written, or `inputs` or `info` hold something that is not JSON.
    """
    try:
        manifest = Manifest("artifact", hash_files(folder), {"inputs": dict(inputs), "info": dict(info or {})})
        content = manifest.encoded()
    except TypeError as cause:
        raise CheckpointError(f"the manifest of {folder} cannot be written: {cause}") from cause
    atomic_write(Path(folder) / NAME, content)
    return manifest


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a folder, itself verified; the files are not looked at.

    Raises:
        CheckpointError: It is missing, damaged or of another format.
    """
    try:
        return Manifest.decoded((Path(folder) / NAME).read_bytes())
    except FileNotFoundError as cause:
        raise CheckpointError(f"{folder} has no {NAME}") from cause
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{folder}: {cause}") from cause


def why_not_whole(folder: Path | str, inputs: Mapping[str, JSON] | None = None) -> str:
    """Why an artifact must be made again, in words; "" when it is done, undamaged and made from the same inputs.

    Args:
        inputs: What it would be made from now; not compared when left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return f"{folder} does not exist"
    try:
        manifest = read_manifest(folder)
    except CheckpointError as cause:
        return str(cause)
    if inputs is not None:
        before = manifest.fields.get("inputs", {})
        changed = [key for key in sorted({*before, *inputs}) if _text(before, key) != _text(inputs, key)]
        if changed:
            return f"{folder} was made from other inputs: {', '.join(changed)}"
    found = set(_names(folder))
    if found != set(manifest.files):
        missing, extra = sorted(set(manifest.files) - found), sorted(found - set(manifest.files))
        return (
            f"{folder} lacks {missing}" if missing else f"{folder} holds files that its manifest does not know: {extra}"
        )
    for name, expected in manifest.files.items():
        try:
            damaged = (folder / name).stat().st_size != expected.bytes or hash_file(folder / name) != expected
        except OSError as cause:
            return f"{folder / name} cannot be read: {cause}"
        if damaged:
            return f"{folder / name} is damaged: its hash is not the one in {NAME}"
    return ""


def whole(folder: Path | str, inputs: Mapping[str, JSON] | None = None) -> bool:
    """Is this artifact done, undamaged, and made from these inputs?"""
    return not why_not_whole(folder, inputs)


def _text(mapping: Mapping[str, JSON], key: str) -> str:
    """A value as text that tells 1 from 1.0 and from True, or nothing where there is none."""
    return dumps(mapping[key], sort_keys=True) if key in mapping else ""
