"""Which training rows overlap an evaluation: n-grams that a user turn shares with an evaluation's question.

Every user turn of a training row is a document of its own.  An evaluation's row overlaps a document when more than a share
of its tokens lie in n-grams that stand in that same document; a row that asks in several turns has the mean of their shares.  A
training row is removed when any of its documents overlaps any evaluation row; the whole source is called contaminated
when more than a share of an evaluation's rows overlap.

Source: "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", arXiv:2411.15124, section 3.2 (its
number is from memory), and `decontamination/` of allenai/open-instruct, whose way of splitting text is used here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, DataError

__all__ = ["Overlap", "Result", "clean_name", "decontaminate", "questions", "rows_of", "tokens_of", "write_clean"]

_SPLIT = re.compile(r'[\s,.?!:;()"\-\\]+')

Rows = Sequence[Mapping[str, Any]]
Found = dict[int, int]
"""Of one document: question (its number) -> its tokens that are covered, as a set of bits."""


def tokens_of(text: str) -> list[str]:
    """Lower-case words, split at white space, `, . ? ! : ; ( ) " -` and the backslash.

    Example:
        >>> tokens_of('Hello, World (twice)') == tokens_of("hello world\\ntwice")
        True
    """
    return [word for word in _SPLIT.split(text.lower()) if word]


def _text(content: Any) -> str:
    """A message's text; of a list of parts, that of its parts."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    return "" if content is None else str(content)


def questions(row: Mapping[str, Any]) -> list[str]:
    """The texts of a normalised row's user turns, or its raw text."""
    if "text" in row and "prompt" not in row and "messages" not in row:
        return [str(row["text"])]
    prompt = row.get("prompt", row.get("messages")) or []
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [_text(turn.get("content")) for turn in turns if turn.get("role") == "user"]


@dataclass(frozen=True)
class Overlap:
    """Why a training row goes: the evaluation row that it overlaps most."""

    row: int
    """Number of the training row, from 0."""
    source: str
    """Its file and line."""
    turn: int
    """Number of the user turn, from 0."""
    evaluation: str
    """Name of the evaluation."""
    evaluation_row: int
    """Number of the row there, from 0."""
    evaluation_source: str
    """Its file and line, or its id."""
    coverage: float
    """Share of the evaluation row's tokens that lie in shared n-grams, in (0, 1]."""
    shared: str
    """The longest run of words that both have."""


@dataclass(frozen=True)
class Result:
    """What was looked at and found."""

    rows: int
    removed: list[Overlap]
    """One a training row that is removed, in the order of the rows."""
    evaluations: dict[str, dict[str, Any]]
    """By name: `rows`, `too_short` (no n-gram, so never found), `overlapping`, `share`, `contaminated`."""

    @property
    def contaminated(self) -> list[str]:
        """Evaluations of which more rows overlap than the source rule allows."""
        return [name for name, found in self.evaluations.items() if found["contaminated"]]


@dataclass(frozen=True)
class _Question:
    """One user turn of one evaluation row."""

    evaluation: str
    row: int
    words: tuple[str, ...]
    parts: int
    """User turns of its row: shares are averaged over them."""


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


class _Index:
    """The n-grams of all evaluations; a lookup costs nothing where a text shares none."""

    def __init__(self, against: Mapping[str, Rows], n: int) -> None:
        self.n = n
        self.questions: list[_Question] = []
        self.posts: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        """n-gram -> question, and the tokens that the n-gram covers there as bits."""
        for name, rows in against.items():
            for number, row in enumerate(rows):
                texts = [tuple(tokens_of(text)) for text in questions(row)]
                for words in texts:
                    self._add(_Question(name, number, words, len(texts)))

    def _add(self, question: _Question) -> None:
        number = len(self.questions)
        self.questions.append(question)
        here: dict[tuple[str, ...], int] = {}
        for place, gram in enumerate(_grams(question.words, self.n)):
            here[gram] = here.get(gram, 0) | (((1 << self.n) - 1) << place)
        for gram, bits in here.items():
            self.posts.setdefault(gram, []).append((number, bits))

    def covered(self, words: Sequence[str]) -> Found:
        """What a document covers of each question that shares an n-gram with it."""
        found: Found = {}
        for gram in self.posts.keys() & set(_grams(words, self.n)):
            for number, bits in self.posts[gram]:
                found[number] = found.get(number, 0) | bits
        return found

    def shares(self, found: Found) -> dict[tuple[str, int], tuple[float, int]]:
        """Of each evaluation row that a document touches: the mean share over its turns, and the turn that is covered most."""
        rows: dict[tuple[str, int], tuple[float, int]] = {}
        for number, bits in found.items():
            question = self.questions[number]
            key = (question.evaluation, question.row)
            share = bits.bit_count() / len(question.words) / question.parts
            total, most = rows.get(key, (0.0, number))
            rows[key] = (total + share, number if bits.bit_count() > found[most].bit_count() else most)
        return rows

    def longest(self, number: int, bits: int) -> str:
        """The longest run of covered words of a question."""
        words = self.questions[number].words
        best, start = (0, 0), 0
        for place in range(len(words) + 1):
            if place == len(words) or not bits >> place & 1:
                best, start = max(best, (place - start, -start)), place + 1
        length, begin = best[0], -best[1]
        return " ".join(words[begin : begin + length])


def decontaminate(
    train: Rows, against: Mapping[str, Rows], *, ngram: int = 8, share: float = 0.5, source_limit: float = 0.02
) -> Result:
    """Find the training rows that overlap evaluations.

    Args:
        train: Normalised rows.
        against: Normalised rows of each evaluation, by its name.
        ngram: Words of an n-gram.
        share: An evaluation row overlaps when more than this share of its tokens is covered, in [0, 1).
        source_limit: The rows are a contaminated source when more than this share of an evaluation's rows overlap.

    Raises:
        ConfigError: A number is out of range, or there is no evaluation.
    """
    if ngram < 1 or not 0 <= share < 1 or not 0 <= source_limit <= 1:
        raise ConfigError(
            f"ngram is {ngram}, share {share} and source_limit {source_limit}; "
            "expected ngram >= 1, share in [0, 1), source_limit in [0, 1]"
        )
    if not against:
        raise ConfigError("there is no evaluation to compare with; give at least one with --against FILE or task:NAME:SPLIT")
    index = _Index(against, ngram)
    removed: list[Overlap] = []
    hit: dict[str, set[int]] = {name: set() for name in against}
    memory: dict[str, list[tuple[float, str, int, int, int]]] = {}
    for number, row in enumerate(train):
        best: Overlap | None = None
        for turn, text in enumerate(questions(row)):
            if text not in memory:
                memory[text] = _over(index, text, share)
            for coverage, name, other, question, bits in memory[text]:
                hit[name].add(other)
                if best is None or coverage > best.coverage:
                    places = (_place(row, number), _place(against[name][other], other))
                    best = Overlap(number, places[0], turn, name, other, places[1], coverage, index.longest(question, bits))
        if best is not None:
            removed.append(best)
    return Result(len(train), removed, _counted(index, against, hit, ngram, source_limit))


def _over(index: _Index, text: str, share: float) -> list[tuple[float, str, int, int, int]]:
    """Coverage, evaluation, row, question and bits of every evaluation row that a document overlaps."""
    found = index.covered(tokens_of(text))
    return [
        (coverage, name, row, most, found[most])
        for (name, row), (coverage, most) in index.shares(found).items()
        if coverage > share + 1e-9  # a mean of shares has float noise, and exactly half is no overlap
    ]


def _counted(
    index: _Index, against: Mapping[str, Rows], hit: Mapping[str, set[int]], n: int, limit: float
) -> dict[str, dict[str, Any]]:
    """The numbers of each evaluation."""
    long_enough = {(q.evaluation, q.row) for q in index.questions if len(q.words) >= n}
    numbers = {}
    for name, rows in against.items():
        too_short = sum((name, number) not in long_enough for number in range(len(rows)))
        found = len(hit[name]) / max(1, len(rows))
        numbers[name] = {
            "rows": len(rows),
            "too_short": too_short,
            "overlapping": len(hit[name]),
            "share": found,
            "contaminated": found > limit + 1e-12,
        }
    return numbers


def _place(row: Mapping[str, Any], number: int) -> str:
    return str(row.get("_source") or row.get("id") or f"row {number}")


def rows_of(source: str, *, count: int = 1000) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a file, folder or hub name as they stand and normalised, or those of `task:NAME:SPLIT`.

    Args:
        source: As `load_rows` reads it, or a task's split; a task that needs options cannot be named here.
        count: How many rows of a task's split.

    Raises:
        ConfigError: There is no such source.
        DataError: A row cannot be used.
    """
    if source.startswith("task:"):
        from posttrain.tasks import task

        name, colon, split = source.removeprefix("task:").rpartition(":")
        if not colon or not name or not split:
            raise ConfigError(f"{source!r} names no split of a task; write task:NAME:SPLIT, for instance task:word-problems:test")
        rows = task(name).rows(split, count)
        return list(rows), list(rows)
    from posttrain.data.formats import normalise
    from posttrain.data.rows import read_rows

    raw = read_rows(source)
    if not raw:
        raise DataError(f"{source} holds no rows; expected at least one")
    return raw, normalise(raw)[0]


def clean_name(source: str) -> Path:
    """Where the clean rows of a source go when nothing is said: beside it, or here where it is no file."""
    path = Path(source) if Path(source).exists() else Path(source.replace("/", "-").rpartition(":")[2])
    return path.with_name(f"{re.sub(r'(?i)[.](jsonl|ndjson|json|csv|tsv|parquet)([.]gz)?$', '', path.name)}.clean.jsonl")


def write_clean(raw: Rows, result: Result, out: Path, *, drop_source: bool = False) -> Path:
    """Write the rows that stay to `out`, and those that go with their reasons to `<out>.removed.jsonl` beside it.

    Args:
        raw: Training rows as they stand in their file; `_source` is left out again.
        result: Of `decontaminate` on them.
        out: A `.jsonl` file.
        drop_source: Keep nothing where the source is contaminated.

    Returns:
        The file of removed rows.

    Raises:
        ConfigError: `out` is no `.jsonl` file.
    """
    from posttrain.files import atomic_write

    if out.suffix != ".jsonl":
        raise ConfigError(
            f"the clean rows are written as JSON lines, and out is {str(out)!r}; expected a name that ends with .jsonl"
        )
    reasons = {overlap.row: overlap for overlap in result.removed}
    whole = result.contaminated if drop_source else []
    kept, gone = [], []
    for number, row in enumerate(raw):
        plain = {key: value for key, value in row.items() if key != "_source"}
        overlap = reasons.get(number)
        if overlap is None and not whole:
            kept.append(plain)
            continue
        why = asdict(overlap) if overlap else {"row": number, "source": _place(row, number)}
        reason = "overlap" if overlap else f"contaminated source: {', '.join(whole)}"
        gone.append({"reason": reason, **why, "removed": plain})
    removed = out.with_name(f"{out.name.removesuffix('.jsonl')}.removed.jsonl")
    for path, rows in ((out, kept), (removed, gone)):
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    return removed
