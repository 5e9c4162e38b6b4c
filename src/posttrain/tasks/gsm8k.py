r"""GSM8K from JSONL files of the user: rows of `question` and `answer`, the latter ending in `#### N`.

Source: Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.  The files are the user's own copy; nothing
    is downloaded.

    >>> read_answer("It takes 2/2=<<2/2=1>>1 bolt.\nSo 2+1=<<2+1=3>>3 bolts\n#### 3")
    ('It takes 2/2=1 bolt.\nSo 2+1=3 bolts', '3')
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, DataError
from posttrain.rewards.maths import MathsExact
from posttrain.rewards.parse import number
from posttrain.rewards.reward import Reward
from posttrain.tasks.task import Task, known_split

__all__ = ["SPLITS", "gsm8k", "read_answer", "read_file"]

SPLITS = ("demonstrations", "train", "validation", "test", "train-file")
"""The training file is cut by a hash of the question into demonstrations (10 %), train (80 %) and validation (10 %);
`train-file` is all of it, and so holds those three."""

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def gsm8k(path: str | Path, *, calculator: bool = False, system: str = "", max_tokens: int = 320) -> Task:
    """GSM8K as a task: `<think>worked solution</think><answer>N</answer>`, verified by exact equality of numbers.

    Args:
        path: A folder that holds `train.jsonl` and `test.jsonl`, or one JSONL file that serves both: then its
            questions are cut by hash into all four splits (10 % test, 10 % validation).
        calculator: Keep the `<<16-3-4=9>>` annotations in demonstrations.
        system: A system message before every question; none when empty.
        max_tokens: Tokens an answer may have.

    Raises:
        ConfigError: There is no such file or folder.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(
            f"task 'gsm8k': there is no {place}; give a folder with train.jsonl and test.jsonl, or a JSONL file: "
            "`posttrain run RECIPE task.path=FOLDER`, `posttrain train METHOD -t gsm8k -d FOLDER`"
        )
    loaded: dict[Path, list[dict[str, Any]]] = {}

    def rows(split: str, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        known_split(split, SPLITS, task="gsm8k")
        file = place if place.is_file() else place / ("test.jsonl" if split == "test" else "train.jsonl")
        if file not in loaded:
            loaded[file] = read_file(file, calculator=calculator, system=system)
        return _chosen(_part(loaded[file], split, alone=place.is_file()), n, seed, what=f"split '{split}' of {file}")

    return Task(
        name="gsm8k",
        rows=rows,
        splits=SPLITS,
        rewards=(Reward("right", MathsExact(), where="inline"),),
        max_tokens=max_tokens,
    )


def read_answer(answer: str, *, calculator: bool = False) -> tuple[str, str]:
    """The worked solution and the number of an answer.

    Raises:
        ValueError: It does not end in `#### N`.
    """
    worked, mark, final = answer.rpartition("####")
    final = final.strip().replace(",", "")
    if not mark or number(final) is None:
        raise ValueError("the answer does not end in '#### ' and a number")
    return (worked if calculator else _ANNOTATION.sub("", worked)).strip(), final


def read_file(file: Path, *, calculator: bool = False, system: str = "") -> list[dict[str, Any]]:
    """All rows of a file, in its order.

    Raises:
        DataError: The file cannot be read, or a line is not such a row; names file and line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"{file} cannot be read: {cause}") from cause
    before = [{"role": "system", "content": system}] if system else []
    made = []
    for position, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, (worked, final) = row["question"].strip(), read_answer(row["answer"], calculator=calculator)
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise DataError(
                f"{file}, line {position}: expected {{'question': text, 'answer': text ending in '#### N'}}: {cause!r}"
            ) from cause
        made.append(
            {
                "id": f"gsm8k/{file.stem}/{position}",
                "prompt": [*before, {"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": f"<think>{worked}</think><answer>{final}</answer>"}],
                "answer": final,
                "steps": row["answer"].count("<<"),
            }
        )
    if not made:
        raise DataError(f"{file} holds no rows")
    return made


def _part(rows: Sequence[dict[str, Any]], split: str, *, alone: bool) -> list[dict[str, Any]]:
    """The rows of a split: by buckets of a hash of the question, so that a copy of a question is in the same split."""
    if split == "train-file" or (split == "test" and not alone):
        return list(rows)
    cuts = {"demonstrations": (0, 10), "validation": (10, 20), "test": (90, 100), "train": (20, 90 if alone else 100)}
    low, high = cuts[split]

    def bucket(row: dict[str, Any]) -> int:
        question = " ".join(row["prompt"][-1]["content"].split())
        return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 100

    return [row for row in rows if low <= bucket(row) < high]


def _chosen(rows: list[dict[str, Any]], n: int | None, seed: int, *, what: str) -> list[dict[str, Any]]:
    """The first n rows in the order of the seed; seed 0 is the order of the file."""
    if n is not None and not 0 <= n <= len(rows):
        raise DataError(f"{what} holds {len(rows)} rows; {n} were asked for")
    if seed:
        rows = list(rows)
        random.Random(f"gsm8k/{seed}").shuffle(rows)
    return rows if n is None else rows[:n]
