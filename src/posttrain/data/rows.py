"""Rows from a file, a folder or the hub, each knowing where it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.formats import need, normalise
from posttrain.errors import ConfigError, DataError, extra, nearest

__all__ = ["load_rows", "need", "read_rows"]

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_rows(
    source: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    skip_invalid: bool = False,
) -> list[dict[str, Any]]:
    """The rows of a data set, normalised: prompts, completions, chosen and rejected are lists of messages.

    All other keys ride along.  Every row has `_source`, its file and line: `"train.jsonl:17"`.

    Args:
        source: A `.jsonl`, `.json` (a list of objects, or an object of columns), `.csv`, `.tsv` or `.parquet` file,
            each also with `.gz` behind it; a folder of such files, or one that `datasets` saved; `owner/name` or
            `owner/name:config` on the hub.
        rename: New column name -> the name in the file (`--map new=old`).
        split: The split of a folder or of a hub data set.
        limit: Read at most so many rows.
        skip_invalid: Leave out rows that are not well formed (an empty answer, say) and warn with their number, in
            place of refusing the file.

    Raises:
        ConfigError: There is no such file or split, or a column to rename does not exist.
        DataError: A row that cannot be used; the message has the file and the line.
        MissingExtraError: Parquet, saved folders and the hub need the extra `hub`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected a number of rows >= 1, or None for all")
    rows = read_rows(source, split=split, limit=limit)
    if not rows:
        raise DataError(f"{source} holds no rows; expected at least one")
    rows = _renamed(_repaired(rows), rename or {})
    made, wrong = normalise(rows, skip_invalid=skip_invalid)
    if wrong:
        shown = "\n".join(wrong[:3])
        warnings.warn(f"{len(wrong)} of {len(rows)} rows of {source} were left out:\n{shown}", stacklevel=2)
    if not made:
        raise DataError(f"no row of {source} can be used; the first: {wrong[0]}")
    return made


def read_rows(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """The rows as they stand, with `_source` added; see `load_rows`."""
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, split, limit)
    if path.is_file():
        return _from_file(path, limit)
    named = isinstance(source, str) and _HUB_NAME.fullmatch(source) and _kind(Path(source.split(":")[0])) is None
    if named and not path.parent.is_dir():
        return _from_hub(str(source), split, limit)
    raise ConfigError(f"there is no file {str(source)!r}{_near_files(path)}")


def _near_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {str(folder)!r} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))[:1000]
    hint = nearest(path.name, names)
    return hint if "nearest" in hint else f"; {str(folder)!r} has {len(names)} other files"


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read, `.gz` aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _SUFFIXES else None


def _from_file(path: Path, limit: int | None) -> list[dict[str, Any]]:
    kind = _kind(path)
    if kind is None:
        raise ConfigError(f"{path} has an unknown suffix; expected one of {', '.join(_SUFFIXES)}, or .gz behind one")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; expected rows")
    if kind == ".parquet":
        return _from_parquet(path, limit)
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; expected rows")
    if kind in (".csv", ".tsv"):
        rows = _from_csv(path, text, "\t" if kind == ".tsv" else ",")
    elif kind == ".json":
        rows = _from_json(path, text)
    else:
        rows = _from_lines(path, text)
    made: list[dict[str, Any]] = []
    for row in rows:
        if limit is not None and len(made) >= limit:
            break
        made.append(row)
    return made


def _text(path: Path) -> str:
    """The text of a file, unpacked, a byte-order mark removed."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError) as cause:
        raise DataError(
            f"{path} cannot be read: {cause}; expected a whole gzip file" if path.suffix == ".gz" else str(cause)
        ) from cause
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = raw[: cause.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: byte {raw[cause.start]:#04x} is not UTF-8; expected UTF-8: convert the file with iconv -t UTF-8"
        ) from cause


def _loaded(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as cause:
        raise DataError(f"{place}: JSON nested too deeply to be read") from cause
    except ValueError as cause:
        start = text.strip()[:60]
        raise DataError(f"{place}: not JSON ({cause}); expected one JSON object a line, found {start!r}") from cause


def _from_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        row = _loaded(line, place)
        if not isinstance(row, dict):
            hint = "; a file that is one JSON list is named .json" if isinstance(row, list) else ""
            raise DataError(f"{place}: {type(row).__name__}; expected one JSON object a line{hint}")
        yield {**row, "_source": place}


def _from_json(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """A list of objects, an object of columns, or JSON lines under a wrong name."""
    try:
        whole = json.loads(text)
    except RecursionError as cause:
        raise DataError(f"{path.name}: JSON nested too deeply to be read") from cause
    except ValueError as cause:
        first = text.lstrip().split("\n", 1)[0]
        if first.startswith("{") and first.rstrip().endswith("}"):
            yield from _from_lines(path, text)
            return
        raise DataError(f"{path.name}: not JSON ({cause}); expected a list of objects or an object of columns") from cause
    if isinstance(whole, dict) and len(whole) == 1 and isinstance(next(iter(whole.values())), list):
        inner = next(iter(whole.values()))
        if inner and all(isinstance(item, dict) for item in inner) and "messages" not in whole:
            whole = inner  # {"data": [...]}
    if isinstance(whole, dict):
        whole = _columns(path, whole)
    if not isinstance(whole, list):
        raise DataError(f"{path.name}: {type(whole).__name__}; expected a list of objects or an object of columns")
    for number, row in enumerate(whole):
        if not isinstance(row, dict):
            raise DataError(f"{path.name}[{number}]: {type(row).__name__}; expected an object")
        yield {**row, "_source": f"{path.name}:{number + 1}"}


def _columns(path: Path, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not whole or not all(isinstance(column, list) for column in whole.values()):
        return [dict(whole)]  # a file of one row
    lengths = {name: len(column) for name, column in whole.items()}
    if len(set(lengths.values())) > 1:
        if isinstance(whole.get("messages"), list) or isinstance(whole.get("conversations"), list):
            return [dict(whole)]
        raise DataError(f"{path.name}: the columns have different lengths ({lengths}); expected equal ones")
    if set(whole) <= {"messages", "tools", "conversations"} and all(isinstance(m, dict) for c in whole.values() for m in c):
        return [dict(whole)]
    return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]


def _from_csv(path: Path, text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                names = reader.fieldnames or []
                raise DataError(f"{place}: not {len(names)} fields as in the header {list(names)}; expected quotes around commas")
            yield {**row, "_source": place}
    except csv.Error as cause:
        raise DataError(f"{path.name}:{reader.line_num}: not CSV ({cause})") from cause


def _from_parquet(path: Path, limit: int | None) -> list[dict[str, Any]]:
    parquet = extra("pyarrow.parquet", "hub")
    try:
        with parquet.ParquetFile(path) as file:
            rows: list[dict[str, Any]] = []
            for batch in file.iter_batches():
                rows += batch.to_pylist()
                if limit is not None and len(rows) >= limit:
                    break
    except (OSError, ValueError) as cause:
        raise DataError(f"{path} is not a whole Parquet file: {cause}") from cause
    return [{**_filled(row), "_source": f"{path.name}:{i + 1}"} for i, row in enumerate(rows[:limit])]


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a row has a value in: tables write None where a row has none."""
    return {key: value for key, value in row.items() if value is not None}


def _from_folder(path: Path, split: str, limit: int | None) -> list[dict[str, Any]]:
    names = {entry.name for entry in path.iterdir()}
    if names & {"dataset_dict.json", "state.json"}:
        datasets = extra("datasets", "hub")
        saved = datasets.load_from_disk(str(path))
        if "dataset_dict.json" in names:
            if split not in saved:
                raise ConfigError(f"{path} has no split {split!r}{nearest(split, saved)}")
            saved = saved[split]
        return _from_table(saved, path.name, limit)
    files = sorted(name for name in names if _kind(Path(name)) and not name.startswith("."))
    chosen = [name for name in files if re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", name)]
    if not chosen and len(files) == 1 and split == "train":
        chosen = files
    if not chosen:
        raise ConfigError(
            f"the folder {path} has no file for the split {split!r}; expected {split}.jsonl or the like, found {files}"
        )
    rows: list[dict[str, Any]] = []
    for name in chosen:
        rows += _from_file(path / name, None if limit is None else limit - len(rows))
        if limit is not None and len(rows) >= limit:
            break
    return rows


def _from_table(table: Any, name: str, limit: int | None) -> list[dict[str, Any]]:
    count = len(table) if limit is None else min(limit, len(table))
    return [{**_filled(table[i]), "_source": f"{name}:{i + 1}"} for i in range(count)]


def _from_hub(source: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    datasets = extra("datasets", "hub")
    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except Exception as cause:  # the network, the hub, a missing split or config: each library has its own errors
        raise ConfigError(
            f"there is no file {source!r}, and the hub's data set of this name cannot be loaded (split {split!r}): "
            f"{type(cause).__name__}: {cause}; expected a file, a folder, or owner/name[:config] on the hub"
        ) from cause
    return _from_table(table, name, limit)


def _renamed(rows: Sequence[dict[str, Any]], rename: Mapping[str, str]) -> list[dict[str, Any]]:
    if not rename:
        return list(rows)
    old_names = {old: new for new, old in rename.items()}
    known = {key for row in rows for key in row}
    for new, old in rename.items():
        if old not in known:
            raise ConfigError(f"{old!r} is to be renamed to {new!r}, and no row has it{nearest(old, known - {'_source'})}")
    return [
        {**{k: v for k, v in row.items() if k not in rename and k not in old_names}}
        | {k: v for k, v in row.items() if k in rename and k not in old_names and rename[k] not in row}
        | {new: row[old] for new, old in rename.items() if old in row}
        for row in rows
    ]


def _repaired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose texts every tokenizer takes: halves of surrogate pairs and NUL become U+FFFD, with one warning."""
    touched: list[str] = []

    def mend(value: Any) -> Any:
        if isinstance(value, str):
            mended = _SURROGATE.sub("\ufffd", value).replace("\x00", "\ufffd")
            if mended != value:
                touched.append(place)
            return mended
        if isinstance(value, dict):
            return {key: mend(item) for key, item in value.items()}
        if isinstance(value, list):
            return [mend(item) for item in value]
        return value

    made = []
    for row in rows:
        place = str(row["_source"])
        made.append(mend(row))
    if touched:
        places = list(dict.fromkeys(touched))
        warnings.warn(
            f"{len(places)} rows hold NUL or half of a surrogate pair (the first: {places[0]}); each was replaced by U+FFFD",
            stacklevel=3,
        )
    return made
