"""Rewards: functions that judge samples, and the workers that run them.

>>> from posttrain.rewards import MathsExact, Reward, SoftOverlong, ThinkAnswer
>>> rewards = (
...     Reward("right", MathsExact(), where="inline"),
...     Reward("format", ThinkAnswer(), weight=0.1, where="inline"),
...     Reward("length", SoftOverlong(max_tokens=64, cushion=16), where="inline", gate="format"),
... )
"""

from posttrain.rewards.exact import Exact
from posttrain.rewards.format import Pattern, ThinkAnswer
from posttrain.rewards.judging import ScoreReport, answer_of, combine, score
from posttrain.rewards.length import SoftOverlong
from posttrain.rewards.maths import Maths, MathsExact
from posttrain.rewards.named import NAMED, named_rewards
from posttrain.rewards.process import Limits
from posttrain.rewards.reward import VALUES, Answer, Reward, check
from posttrain.rewards.runner import RewardRunner
from posttrain.rewards.user import FileFunction, load_reward

__all__ = [
    "NAMED",
    "VALUES",
    "Answer",
    "Exact",
    "FileFunction",
    "Limits",
    "Maths",
    "MathsExact",
    "Pattern",
    "Reward",
    "RewardRunner",
    "ScoreReport",
    "SoftOverlong",
    "ThinkAnswer",
    "answer_of",
    "check",
    "combine",
    "load_reward",
    "named_rewards",
    "score",
]
