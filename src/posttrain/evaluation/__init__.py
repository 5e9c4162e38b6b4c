"""How good a model is: accuracy, mean@k and pass@k with 95 % intervals, and what reward models, judges and verifiers are worth.

`EXAMINERS` names the kinds of evaluation beside accuracy: each is one file, imported when it is asked for.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

from posttrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from posttrain.evaluation.examiner import Examiner

EXAMINERS: dict[str, str] = {
    "best_of": "best_of:BestOf",
    "choices": "choices:Choices",
    "critiques": "critiques:Critiques",
    "reward_means": "reward_means:RewardMeans",
    "reward_pairs": "reward_pairs:RewardPairs",
    "step_labels": "step_labels:StepLabelled",
    "violations": "violations:Violations",
}
"""Name to `file:Class`, sorted by name."""


def examiner_named(kind: str) -> type[Examiner]:
    """The class of a kind of evaluation.

    Raises:
        ConfigError: There is no such kind; the message names the nearest ones.
    """
    if kind not in EXAMINERS:
        known = ["accuracy", *EXAMINERS]
        raise ConfigError(f"evaluate: kind is one of {', '.join(known)}; there is no '{kind}'{nearest(kind, known)}")
    found: type[Examiner] = pkgutil.resolve_name(f"posttrain.evaluation.{EXAMINERS[kind]}")
    return found


__all__ = ["EXAMINERS", "examiner_named"]
