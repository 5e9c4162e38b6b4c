"""What a task is, and the tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import ConfigError, nearest
from posttrain.rewards.exact import Exact
from posttrain.rewards.parse import answer_in
from posttrain.rewards.reward import Answer, Reward, check, values_of
from posttrain.types import Overlong, Unparseable, Verdict

__all__ = ["TASKS", "Rows", "Task", "task", "word_problem_right"]

Rows = Callable[..., list[dict[str, Any]]]
"""`rows(split, n=None, seed=0)`: rows of `id`, `prompt` (messages), `answer`, and `completion` where one is known."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, what verifies the answers to them, and how the result is called.

    Example:
        >>> easy = task("word-problems", level="easy")
        >>> [row["prompt"][0]["role"] for row in easy.rows("test", 2)], [reward.name for reward in easy.rewards]
        (['user', 'user'], ['right'])

    Raises:
        ConfigError: The rewards do not fit together, or a number is impossible.
    """

    name: str
    """How it is called, with its options in brackets where they matter."""
    rows: Rows
    """`rows(split, n, seed)`: n rows of a split, the same for the same arguments; `None` is all, where there is an end."""
    splits: tuple[str, ...]
    """The splits it has; no row is in two of them, unless the task's documentation says so."""
    rewards: tuple[Reward, ...]
    """What verifies an answer; the first gives the metric."""
    parse: Callable[[str], str | None] = answer_in
    """The answer that stands in a text, or None."""
    metric: str = "accuracy"
    """How the mean of the first reward is called."""
    max_tokens: int = 64
    """Tokens an answer may have, unless the run says otherwise."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Numbers of verdicts other than `Score`, where they are not 0: `{"Wrong": -1.0}`."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError(f"task '{self.name}' has no reward; it needs one that verifies the answers")
        if self.max_tokens < 1:
            raise ConfigError(f"task '{self.name}': found max_tokens {self.max_tokens}; write at least 1")
        check(self.rewards)
        values_of(self.values)


def task(name: str, **options: Any) -> Task:
    """A task by name.

    Args:
        name: `word-problems`, `chats`, `gsm8k`, or `gym:<data set>` for any data set of reasoning-gym.
        options: The task's own, `max_tokens` for each: `level` (word-problems); `path`, `calculator`, `system` (gsm8k);
            `full_marks`, `system` and the fields of the data set's configuration (gym).

    Raises:
        ConfigError: There is no such task, or it has no such option; with the nearest names.
        MissingExtraError: The task needs a package that is not installed.
    """
    head, colon, rest = name.partition(":")
    if name not in TASKS and not (head == "gym" and colon):
        raise ConfigError(f"there is no task '{name}'{nearest(name, [*TASKS, 'gym:<data set>'])}")
    if head == "gym":
        from posttrain.tasks.gym import gym

        return gym(rest, **options)
    make = TASKS[name]
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            raise ConfigError(f"task '{name}' has no option '{option}'{nearest(option, known)}")
    missing = [
        key for key, p in inspect.signature(make).parameters.items() if p.default is p.empty and key not in options
    ]
    if missing:
        raise ConfigError(f"task '{name}' needs {', '.join(missing)}; its options are {', '.join(known)}")
    return make(**options)


def word_problem_right(answer: Answer) -> Verdict:
    """The verdict of the word problems' own verifier; an answer cut off before it could be read is `Overlong`."""
    from posttrain.tasks.word_problems import verify

    verdict = verify(answer.text, answer.info)
    if isinstance(verdict, Unparseable) and answer.finish == "length":
        return Overlong(reason=verdict.reason)
    return verdict


def _problems(name: str, own: str, limits: Mapping[str, int], level: str, max_tokens: int | None) -> Task:
    """A task of word problems, written without end by the module of its name.

    Args:
        name: The task's.
        own: The level that is not said with the name.
        limits: Longest answer, by level.
        level: Which problems.
        max_tokens: Another longest answer.
    """
    from posttrain.tasks import forbidden_words, word_problems

    module = {"word-problems": word_problems, "forbidden-words": forbidden_words}[name]
    if level not in word_problems.LEVELS:
        raise ConfigError(f"task '{name}' has no level '{level}'{nearest(level, word_problems.LEVELS)}")

    def rows(split: str, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        known_split(split, tuple(module.SPLITS), task=name)
        return module.rows(split, count_of(n, task=name), level=level, seed=seed)

    return Task(
        name=name if level == own else f"{name}({level})",
        rows=rows,
        splits=tuple(module.SPLITS),
        rewards=(Reward("right", word_problem_right, where="inline"),),
        max_tokens=max_tokens or limits[level],
    )


def _word_problems(level: str = "demo", max_tokens: int | None = None) -> Task:
    """The embedded task: procedural word problems with worked solutions."""
    return _problems("word-problems", "demo", {"easy": 48, "medium": 64, "demo": 64, "hard": 96}, level, max_tokens)


def _gsm8k(path: str, calculator: bool = False, system: str = "", max_tokens: int = 320) -> Task:
    """GSM8K from the user's files."""
    from posttrain.tasks.gsm8k import gsm8k

    return gsm8k(path, calculator=calculator, system=system, max_tokens=max_tokens)


def _chats(max_tokens: int = 48) -> Task:
    """What the embedded base model can do beside worked solutions: greet, look up, calculate, in its own form."""
    from posttrain.tasks import chats

    def rows(split: str, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        known_split(split, tuple(chats.SPLITS), task="chats")
        return chats.rows(split, count_of(n, task="chats"), seed=seed)

    return Task(
        name="chats",
        rows=rows,
        splits=tuple(chats.SPLITS),
        rewards=(Reward("said", Exact(key="expected", whole=True), where="inline"),),
        parse=str,
        max_tokens=max_tokens,
    )


def _forbidden_words(level: str = "easy", max_tokens: int | None = None) -> Task:
    """Word problems that ask for a word besides, some of which a constitution forbids."""
    return _problems("forbidden-words", "easy", {"easy": 56, "medium": 72, "demo": 72, "hard": 104}, level, max_tokens)


def _word_problem_judging(
    kind: str = "check", level: str = "demo", reasoned: bool = True, max_tokens: int | None = None
) -> Task:
    """Judging answers to word problems."""
    from posttrain.tasks.word_problem_judging import word_problem_judging

    return word_problem_judging(kind, level, reasoned, max_tokens)


TASKS: Mapping[str, Callable[..., Task]] = {
    "chats": _chats,
    "forbidden-words": _forbidden_words,
    "gsm8k": _gsm8k,
    "word-problem-judging": _word_problem_judging,
    "word-problems": _word_problems,
}
"""Name -> what makes the task from its options; `gym:<data set>` comes besides."""


def known_split(split: str, splits: tuple[str, ...], *, task: str) -> None:
    """Refuse a split the task does not have.

    Raises:
        ConfigError: With the nearest names.
    """
    if split not in splits:
        raise ConfigError(f"task '{task}' has no split '{split}'{nearest(split, splits)}")


def count_of(n: int | None, *, task: str) -> int:
    """The number of rows asked for, where rows have no end.

    Raises:
        ConfigError: None was given, or a negative number.
    """
    if n is None or n < 0:
        raise ConfigError(f"task '{task}' writes rows without end; found n {n}, write how many")
    return n
