"""What a reward is: a named function of answers, with a scope, a weight, a deadline and a gate.

>>> from posttrain.rewards.format import ThinkAnswer
>>> reward = Reward("format", ThinkAnswer(), weight=0.5, where="inline")
>>> reward.takes_list
False
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from posttrain.errors import ConfigError, nearest
from posttrain.rewards.reference import describe
from posttrain.types import Score, Verdict

__all__ = ["VALUES", "Answer", "Judgement", "Reward", "Scope", "check", "number_of", "reads_list", "values_of"]

Scope = Literal["sample", "group", "query"]
"""What one call sees: single samples, all samples of a group, or all samples of a query."""

Judgement = Verdict | float | bool | None
"""What a reward may return for an answer: `True` is `Score(1.0)`, `False` is `Wrong()`, `None` is nothing to say of it."""

VALUES: Mapping[str, float] = {"Wrong": 0.0, "Unparseable": 0.0, "Overlong": 0.0, "Crashed": 0.0}
"""What each verdict that is not a `Score` is worth; a task may give other numbers."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sample as a reward sees it: text and plain values, no tensors.

    Example:
        >>> Answer(text="<answer>7</answer>", info={"answer": "7"}).info["answer"]
        '7'
    """

    text: str  # what follows the prompt, decoded; a stop token at the end is left out
    prompt: str = ""  # the prompt, decoded, template included
    messages: list[dict[str, Any]] = field(default_factory=list)  # the prompt as messages, where the row has them
    info: Mapping[str, Any] = field(default_factory=dict)  # the row's other values: answer, id, ...
    num_tokens: int = 0  # of the text, stop token included
    finish: str = "stop"  # "stop" | "length"
    group: str = ""
    query: str = ""
    index: int = 0  # global number of the sample in its step
    tokens: list[int] = field(default_factory=list, repr=False)  # prompt and completion; only inline rewards get them
    num_prompt_tokens: int = 0  # of these, the prompt's


@dataclass(frozen=True)
class Reward:
    """A named column of numbers: one function of answers and how it is run, weighed and gated.

    `fn` takes one `Answer` and returns one judgement, or takes a list of them and returns one judgement each, in order.
    It takes a list when its first parameter is called `answers` or annotated `list[...]` or `Sequence[...]`, and one
    answer otherwise.  It is a function of a module or script, a `functools.partial` of one with keywords, or a frozen
    dataclass with `__call__`; keywords and fields are JSON values.  With `where="process"` it runs in a worker that
    is killed at the deadline and cannot see the environment; a lambda or an inner function cannot be found there and
    is refused.

    Raises:
        ConfigError: A field cannot be honoured.
    """

    name: str
    """Column of the report, and what gates refer to."""
    fn: Callable[..., Any]
    """`fn(answer) -> judgement` or `fn(answers) -> list of judgements`."""
    scope: Scope = "sample"
    """What one call sees; with group and query the function takes a list."""
    weight: float = 1.0
    """What the value is multiplied by in the sum; 0 only shows it."""
    deadline: float = 30.0
    """Seconds one call may take (not counting imports); then its worker is killed."""
    where: Literal["process", "inline"] = "process"
    """Inline runs in this process, without deadline or limits: for trusted, bounded functions and for reward models."""
    gate: str | None = None
    """Another reward: this one counts 0 where that one's value is not above 0."""
    answers_per_call: int = 16
    """How many answers one call of a list function of scope sample sees."""

    def __post_init__(self) -> None:
        def refuse(found: str, write: str) -> ConfigError:
            return ConfigError(f"reward '{self.name}': found {found}; {write}")

        if not self.name or not isinstance(self.name, str):
            raise refuse(f"name {self.name!r}", "give it a name")
        if not callable(self.fn):
            raise refuse(f"fn {self.fn!r}", "give a function of one Answer or of a list of them")
        if self.scope not in get_args(Scope):
            raise refuse(f"scope {self.scope!r}", "write sample, group or query")
        if self.where not in ("process", "inline"):
            raise refuse(f"where {self.where!r}", "write process or inline")
        if not math.isfinite(self.weight):
            raise refuse(f"weight {self.weight}", "write a finite number")
        if not (math.isfinite(self.deadline) and self.deadline > 0):
            raise refuse(f"deadline {self.deadline}", "write seconds above 0")
        if self.answers_per_call < 1:
            raise refuse(f"answers_per_call {self.answers_per_call}", "write at least 1")
        if self.scope != "sample" and not self.takes_list:
            raise refuse(
                f"scope {self.scope!r} with a function of one answer",
                "call its parameter `answers` or annotate it `list[Answer]`",
            )
        if self.where == "process":
            describe(self.fn)
        elif getattr(self.fn, "only_in_worker", False):
            raise refuse("where 'inline' with a function of a file", "write where='process': a file is never run here")

    @property
    def takes_list(self) -> bool:
        """Does `fn` take a list of answers?"""
        declared = getattr(self.fn, "takes_list", None)
        if isinstance(declared, bool):
            return declared
        first = next(iter(inspect.signature(self.fn).parameters.values()), None)
        if first is None:
            raise ConfigError(f"reward '{self.name}': found a function without parameters; it takes one Answer or a list")
        note = first.annotation
        text = "" if note is inspect.Parameter.empty else note if isinstance(note, str) else str(note)
        return reads_list(first.name, text)

    @property
    def one_by_one(self) -> bool:
        """Is each answer judged alone, in a worker?  Then it may be judged before others are written."""
        return self.where == "process" and self.scope == "sample" and not self.takes_list


def reads_list(parameter: str, annotation: str) -> bool:
    """Does a first parameter of this name and annotation (its text, or empty) stand for a list of answers?"""
    head = annotation.partition("[")[0].strip("'\" ").rpartition(".")[2]
    return parameter == "answers" or head.lower() in ("list", "sequence", "collection", "iterable", "tuple")


def check(rewards: Sequence[Reward]) -> None:
    """Refuse rewards that share a name, and gates that name no reward or lead back to themselves.

    Raises:
        ConfigError: What is wrong, with the nearest names.
    """
    gates = {reward.name: reward.gate for reward in rewards}
    if len(gates) < len(rewards):
        twice = sorted({reward.name for reward in rewards if [other.name for other in rewards].count(reward.name) > 1})
        raise ConfigError(f"two rewards are called {', '.join(map(repr, twice))}; give each its own name")
    for name, gate in gates.items():
        if gate is not None and gate not in gates:
            raise ConfigError(f"reward '{name}': no reward is called '{gate}', its gate{nearest(gate, gates)}")
        seen, at = [name], gate
        while at is not None:
            if at in seen:
                raise ConfigError(f"the gates {' -> '.join([*seen, at])} lead in a circle; leave one out")
            seen, at = [*seen, at], gates[at]


def values_of(values: Mapping[str, float] | None) -> dict[str, float]:
    """The table of verdict numbers: the defaults with `values` in their place.

    Raises:
        ConfigError: A key that is no verdict, or a number that is not finite.
    """
    table = dict(VALUES)
    for kind, value in (values or {}).items():
        if kind not in VALUES:
            raise ConfigError(f"'{kind}' is not a verdict with a number{nearest(kind, VALUES)}")
        if not math.isfinite(value):
            raise ConfigError(f"the number of '{kind}' is {value}; write a finite one")
        table[kind] = float(value)
    return table


def number_of(verdict: Verdict, values: Mapping[str, float]) -> float:
    """What a verdict on the policy is worth: its own value, or its kind's."""
    return verdict.value if isinstance(verdict, Score) else values[type(verdict).__name__]
