"""Rewards by name, as recipes and the command line write them.

>>> [(reward.name, reward.weight) for reward in named_rewards(["maths-exact", "format*0.1", "length:64,16"])]
[('maths-exact', 1.0), ('format', 0.1), ('length', 1.0)]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from posttrain.errors import ConfigError, nearest
from posttrain.rewards.exact import Exact
from posttrain.rewards.format import ThinkAnswer
from posttrain.rewards.last_number import LastNumber
from posttrain.rewards.length import SoftOverlong
from posttrain.rewards.maths import Maths, MathsExact
from posttrain.rewards.readable import Consistent, Readable
from posttrain.rewards.reward import Reward, check
from posttrain.rewards.user import load_reward

__all__ = ["NAMED", "named_rewards"]


class HasRewards(Protocol):
    """A task, as far as this module looks at it."""

    @property
    def name(self) -> str:
        """How it is called."""
        ...

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """Its own rewards."""
        ...


NAMED: Mapping[str, Callable[[], Reward]] = {
    "exact": lambda: Reward("exact", Exact(), where="inline"),
    "maths": lambda: Reward("maths", Maths()),
    "maths-exact": lambda: Reward("maths-exact", MathsExact(), where="inline"),
    "last-number": lambda: Reward("last-number", LastNumber(), where="inline"),
    "format": lambda: Reward("format", ThinkAnswer(), where="inline"),
    "consistent": lambda: Reward("consistent", Consistent(), where="inline"),
    "readable": lambda: Reward("readable", Readable(), where="inline"),
}
"""Name -> the reward; `length:MAX_TOKENS,CUSHION` comes with two numbers."""


def named_rewards(specs: Sequence[str], *, task: HasRewards | None = None) -> tuple[Reward, ...]:
    """The rewards that are called so.

    Args:
        specs: Each is a name of `NAMED`, `length:MAX_TOKENS,CUSHION`, a name of one of the task's own rewards, `task` for all of
            them, `model:FOLDER` for a reward model, `judge:MODEL` for a judge, or `file.py:function`; may go on with
            `@SECONDSs`, its deadline, and end with `*WEIGHT`, which multiplies its weight: `judge.py:polite@5s*0.5`.
        task: Whose own rewards may be named.

    Raises:
        ConfigError: A name that is none of these, with the nearest; or rewards that do not fit together.
    """
    own = {reward.name: reward for reward in task.rewards} if task is not None else {}
    found: list[Reward] = []
    for spec in specs:
        name, star, factor = spec.rpartition("*")
        name, weight = (name.strip(), _number(factor, spec)) if star else (spec.strip(), 1.0)
        name, deadline = _deadline(name)
        named = list(own.values()) if name == "task" and own else [_named(name, own)]
        found += [replace(r, weight=r.weight * weight, deadline=deadline or r.deadline) for r in named]
    check(found)
    return tuple(found)


def _named(name: str, own: Mapping[str, Reward]) -> Reward:
    """One reward."""
    if name in own:
        return own[name]
    if name in NAMED:
        return NAMED[name]()
    head, colon, rest = name.partition(":")
    if head == "length" and colon:
        sizes = rest.split(",")
        if len(sizes) == 2 and all(size.strip().isdigit() for size in sizes):
            return Reward("length", SoftOverlong(int(sizes[0]), int(sizes[1])), where="inline")
        raise ConfigError(f"found reward {name!r}; write length:MAX_TOKENS,CUSHION, for instance length:64,16")
    if head == "model" and rest:
        from posttrain.rewards.model import RewardModel

        return Reward("model", RewardModel(rest), where="inline", answers_per_call=256)
    if head == "judge" and colon:
        from posttrain.rewards.judge import judge_reward

        return judge_reward(rest)
    if ":" in name:
        return load_reward(name)
    raise ConfigError(f"there is no reward '{name}'{nearest(name, [*NAMED, *own, 'length:64,16', 'file.py:function'])}")


def _deadline(name: str) -> tuple[str, float]:
    """A name without its deadline, and the deadline in seconds; 0 where it has none."""
    found = re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)s", name)
    if found is None:
        return name, 0.0
    if not float(found[2]):
        raise ConfigError(f"found reward {name!r}; what follows @ is its deadline in seconds, above 0: for instance @5s")
    return found[1], float(found[2])


def _number(text: str, spec: str) -> float:
    """The weight in a name."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"found reward {spec!r}; what follows * is its weight, a number") from None
