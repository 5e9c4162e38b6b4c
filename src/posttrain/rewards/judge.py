"""Rewards by a judge: a model rates each answer while the policy learns, with no reward model in between.

>>> from posttrain.judges import ScriptedJudge
>>> reward = JudgeReward("script", judge=ScriptedJudge(lambda text, options: [-9.0] * 9 + [-0.01]))
>>> [round(verdict.value, 2) for verdict in reward([Answer(text="2", prompt="1 + 1?")])]
[1.0]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from posttrain.errors import ConfigError
from posttrain.judges.ask import RATIONALE_TOKENS, rate
from posttrain.judges.templates import conversation, template_named
from posttrain.rewards.reward import Answer, Reward
from posttrain.types import InfraError, Score, Verdict

if TYPE_CHECKING:
    from posttrain.judges.judge import Judge

__all__ = ["JudgeReward", "judge_reward"]


@dataclass(frozen=True)
class JudgeReward:
    """Direct RLAIF: a judge's expected rating of an answer, as a number in [-1, 1].

    `s = sum_i v_i P(i) / sum_i P(i)` over the template's options, 1 to 10 by default; the reward is `2 (s - 1) / 9 - 1`.  Where
    the judge fails, or gives no option any probability, the sample is masked: that is no score.

    Source: "RLAIF vs. RLHF: Scaling Reinforcement Learning from Human Feedback with AI Feedback", arXiv:2309.00267, direct RLAIF.
    """

    spec: str
    """`local:FOLDER`, `openai:URL#MODEL` or `file.py:function`; see `judges.judge_named`."""
    template: str = "rating"
    """Whose options have values; `rating-reasoned` reasons first."""
    rationale_tokens: int = RATIONALE_TOKENS
    """Longest rationale, where the template asks for one."""
    judge: Judge | None = field(default=None, compare=False, repr=False)
    """In place of `spec`: a judge that is open already."""

    def __post_init__(self) -> None:
        template = template_named(self.template)
        if not template.values:
            raise ConfigError(f"template '{self.template}' has no values, so it gives no reward; try 'rating'")

    def __call__(self, answers: list[Answer]) -> list[Verdict]:
        judge = self.judge or _opened(self.spec)
        items = [(_asked(answer), answer.text) for answer in answers]
        ratings = rate(judge, items, template_named(self.template), rationale_tokens=self.rationale_tokens)
        return [
            InfraError(reason=f"the judge gave no rating: {rating.error}")
            if rating.reward is None
            else Score(rating.reward, reason=f"score {rating.score:.3f}; mass on no option {rating.neither:.3f}")
            for rating in ratings
        ]


def judge_reward(spec: str) -> Reward:
    """A reward from `judge:SPEC`, or `judge:SPEC?TEMPLATE` for another template than `rating`.

    Args:
        spec: What follows `judge:`: a folder or model name, or anything that `judges.judge_named` takes.
    """
    where, _, template = spec.partition("?")
    named = where if where.startswith(("local:", "openai:")) or ".py:" in where else f"local:{where}"
    if not where:
        raise ConfigError("found reward 'judge:'; write judge:FOLDER, judge:openai:URL#MODEL or judge:file.py:function")
    fn = JudgeReward(named, template or "rating")
    return Reward("judge", fn, where="inline", answers_per_call=64)


@lru_cache(maxsize=4)
def _opened(spec: str) -> Judge:
    """The judge of a name, opened once a process."""
    from posttrain.judges.judge import judge_named

    return judge_named(spec)


def _asked(answer: Answer) -> str:
    """What was asked: the contents of the prompt's messages, else the prompt as it was rendered."""
    return conversation(answer.messages) if answer.messages else answer.prompt
