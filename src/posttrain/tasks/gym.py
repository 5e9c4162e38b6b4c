"""Any data set of reasoning-gym (an extra) as a task: `task("gym:chain_sum", max_terms=3)`.

Rows are written in a process of their own with a fixed hash seed, because some data sets depend on it, and answers
are scored by the data set's own scorer in a reward worker.  Splits take their seeds from ranges that do not overlap;
where a data set has few different questions, the same one may still occur in two splits.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import ConfigError, DataError, extra, nearest
from posttrain.rewards.parse import tag_in
from posttrain.rewards.reward import Answer, Reward
from posttrain.tasks.task import Task, count_of, known_split
from posttrain.types import Overlong, Score, Unparseable, Verdict, Wrong

__all__ = ["SPLITS", "GymScore", "gym", "pack", "unpack", "write_rows"]

SPLITS = ("demonstrations", "train", "validation", "test")
_RANGE = 1 << 30  # seeds of a split; all stay below 2**32, which numpy asks for
_WRITE_SECONDS = 600.0


def gym(dataset: str, /, *, full_marks: bool = False, system: str = "", max_tokens: int = 256, **config: Any) -> Task:
    """A data set of reasoning-gym as a task.

    Args:
        dataset: Its name in reasoning-gym, for instance `"chain_sum"`.
        full_marks: Count only a score of 1; otherwise the scorer's partial marks, in [0, 1], are the reward.
        system: A system message before every question; none when empty.
        max_tokens: Tokens an answer may have.
        config: Fields of the data set's configuration, JSON values; not its seed and size.

    Raises:
        ConfigError: There is no such data set, or it has no such field or refuses its value.
        MissingExtraError: reasoning-gym is not installed.
    """
    _checked(dataset, config)
    name = f"gym:{dataset}"

    def rows(split: str, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        known_split(split, SPLITS, task=name)
        count = count_of(n, task=name)
        first = SPLITS.index(split) * _RANGE + seed * 1_000_003 % _RANGE
        before = [{"role": "system", "content": system}] if system else []
        entries = _written(dataset, config, count, first) if count else []
        return [_row(f"{name}/{split}/{seed}/{index}", entry, before) for index, entry in enumerate(entries)]

    return Task(
        name=name,
        rows=rows,
        splits=SPLITS,
        rewards=(Reward("score", GymScore(dataset, config, full_marks)),),
        parse=_answer_tag,
        metric="accuracy" if full_marks else "score",
        max_tokens=max_tokens,
    )


@dataclass(frozen=True)
class GymScore:
    """What a data set's own scorer says of what stands in the last `<answer>`.

    The scorer may stumble over what a model wrote; if it can score the right answer, the model's is then `Unparseable`.
    """

    dataset: str
    """Name of the data set."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its configuration."""
    full_marks: bool = False
    """Count only a score of 1."""

    takes_list: ClassVar[bool] = False

    def prepare(self) -> None:
        """Import reasoning-gym and make the data set."""
        _dataset(self.dataset, self.config, 1, 0)

    def __call__(self, answer: Answer) -> Verdict:
        found = _answer_tag(answer.text)
        if not found:
            return Overlong() if answer.finish == "length" else Unparseable(reason="no <answer>")
        scorer, entry = _dataset(self.dataset, self.config, 1, 0), unpack(answer.info["entry"])
        try:
            value = float(scorer.score_answer(found, entry))
        except (MemoryError, OSError):
            raise
        except Exception as error:
            scorer.score_answer(entry["answer"], entry)  # raises when the scorer itself is at fault
            return Unparseable(reason=f"the data set's scorer: {type(error).__name__}: {str(error)[:200]}")
        if self.full_marks:
            return Score(1.0) if value >= 1.0 else Wrong()
        return Score(value)


def write_rows() -> None:
    """Write a data set's entries as JSON lines to what was standard output; the request is the argument."""
    asked, out = json.loads(sys.argv[1]), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints is no entry
    made = extra("reasoning_gym", "gym").create_dataset(
        asked["dataset"], size=asked["size"], seed=asked["seed"], **asked["config"]
    )
    with out:
        for index in range(asked["size"]):
            out.write(json.dumps(pack(dict(made[index]))) + "\n")


def pack(value: Any) -> Any:
    """A value as JSON that `unpack` makes whole again: tuples, sets and keys that are not text are kept.

    Raises:
        TypeError: A value of another kind.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, (tuple, set, frozenset)):
        kind = "tuple" if isinstance(value, tuple) else "set"
        return {"__kind__": kind, "items": [pack(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and key != "__kind__" for key in value):
            return {key: pack(item) for key, item in value.items()}
        return {"__kind__": "dict", "items": [[pack(key), pack(item)] for key, item in value.items()]}
    if hasattr(value, "tolist"):  # numpy
        return pack(value.tolist())
    raise TypeError(f"a {type(value).__name__} has no JSON")


def unpack(value: Any) -> Any:
    """What `pack` packed."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("__kind__")
    if kind == "tuple":
        return tuple(unpack(item) for item in value["items"])
    if kind == "set":
        return {unpack(item) for item in value["items"]}
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in value["items"]}
    return {key: unpack(item) for key, item in value.items()}


def _answer_tag(text: str) -> str | None:
    """What stands in the last `<answer>`."""
    return tag_in(text, "answer")


def _checked(dataset: str, config: Mapping[str, Any]) -> None:
    """Refuse a data set or a configuration that reasoning-gym does not have."""
    with _quiet():
        extra("reasoning_gym", "gym")
        known: dict[str, Any] = importlib.import_module("reasoning_gym.factory").DATASETS
    if dataset not in known:
        raise ConfigError(f"reasoning-gym has no data set '{dataset}'{nearest(dataset, known)}")
    fields = [name for name in getattr(known[dataset][1], "__dataclass_fields__", {}) if name not in ("seed", "size")]
    for option in config:
        if option not in fields:
            options = [*fields, "full_marks", "system", "max_tokens"]
            raise ConfigError(f"task 'gym:{dataset}' has no option '{option}'{nearest(option, options)}")
    try:
        _dataset(dataset, config, 1, 0)
    except (AssertionError, TypeError, ValueError) as cause:
        raise ConfigError(f"task 'gym:{dataset}' refuses {dict(config)}: {cause}") from cause


_MADE: dict[str, Any] = {}


def _dataset(dataset: str, config: Mapping[str, Any], size: int, seed: int) -> Any:
    """The data set, made once a process."""
    key = json.dumps([dataset, dict(config), size, seed], sort_keys=True)
    if key not in _MADE:
        with _quiet():
            _MADE[key] = extra("reasoning_gym", "gym").create_dataset(dataset, size=size, seed=seed, **config)
    return _MADE[key]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What importing a data set prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _written(dataset: str, config: Mapping[str, Any], size: int, seed: int) -> list[Any]:
    """The packed entries of a data set, written by a process with a fixed hash seed."""
    import posttrain

    asked = json.dumps({"dataset": dataset, "config": dict(config), "size": size, "seed": seed})
    root = str(Path(posttrain.__path__[0]).resolve().parent)
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from posttrain.tasks.gym import write_rows; write_rows()", asked],
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])},
        capture_output=True,
        timeout=_WRITE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise DataError(f"reasoning-gym could not write '{dataset}':\n{done.stderr.decode(errors='replace')[-2000:]}")
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


def _row(name: str, entry: dict[str, Any], before: list[dict[str, str]]) -> dict[str, Any]:
    """An entry as a row; `entry` keeps it whole for the scorer."""
    row: dict[str, Any] = {
        "id": name,
        "prompt": [*before, {"role": "user", "content": entry["question"]}],
        "answer": entry["answer"],
        "entry": entry,
    }
    if isinstance(entry["answer"], str):
        row["completion"] = [{"role": "assistant", "content": f"<answer>{entry['answer']}</answer>"}]
    return row
