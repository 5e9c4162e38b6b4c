"""Punishment for answers that are too long.

>>> [soft_overlong(length, max_tokens=20480, cushion=4096) for length in (16384, 17408, 18432, 20480, 20481)]
[0.0, -0.25, -0.5, -1.0, -1.0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from posttrain.errors import ConfigError
from posttrain.rewards.reward import Answer

__all__ = ["SoftOverlong", "soft_overlong"]


def soft_overlong(num_tokens: int, *, max_tokens: int, cushion: int) -> float:
    """0 up to `max_tokens - cushion` tokens, then falling linearly to -1 at `max_tokens`, and -1 beyond.

    Source: DAPO (arXiv 2503.14476), eq. 13.
    """
    over = num_tokens - (max_tokens - cushion)
    if over <= 0:
        return 0.0
    return -1.0 if over >= cushion else -over / cushion


@dataclass(frozen=True)
class SoftOverlong:
    """The soft overlong punishment of DAPO, in [-1, 0], added to the reward for correctness.

    Source: DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476, eq. 13.
    """

    max_tokens: int
    """L_max: the longest answer, in tokens; the run's limit on sampling or less."""
    cushion: int
    """L_cache: over how many tokens before it the punishment grows; 0 punishes only beyond it."""

    takes_list: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.cushion <= self.max_tokens or self.max_tokens < 1:
            raise ConfigError(f"found max_tokens {self.max_tokens} and cushion {self.cushion}; write 0 <= cushion <= max_tokens")

    def __call__(self, answer: Answer) -> float:
        return soft_overlong(answer.num_tokens, max_tokens=self.max_tokens, cushion=self.cushion)
