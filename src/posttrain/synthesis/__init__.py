"""What sample stages write, by name: one maker a file, imported when it is asked for."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

from posttrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from posttrain.synthesis.maker import Maker

MAKERS: dict[str, str] = {
    "answers": "answers:Answers",
    "choices": "choices:Choices",
    "judgements": "judgements:Judgements",
    "opponents": "opponents:Opponents",
    "pairs": "pairs:Pairs",
    "preferences": "preferences:Preferences",
    "prompts": "prompts:Prompts",
    "rankings": "rankings:Rankings",
    "revisions": "revisions:Revisions",
    "step_labels": "step_labels:StepLabels",
}
"""Name to `file:Class`, sorted by name."""


def maker_named(name: str) -> type[Maker]:
    """The class of a maker.

    Raises:
        ConfigError: There is no such maker; the message names the nearest ones.
    """
    if name not in MAKERS:
        raise ConfigError(f"a sample stage can write {', '.join(sorted(MAKERS))}; there is no '{name}'{nearest(name, MAKERS)}")
    found: type[Maker] = pkgutil.resolve_name(f"posttrain.synthesis.{MAKERS[name]}")
    return found


__all__ = ["MAKERS", "maker_named"]
