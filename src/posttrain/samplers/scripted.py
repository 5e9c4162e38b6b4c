"""The sampler that writes what it is told: the fake for tests of everything behind a sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from posttrain.errors import ConfigError
from posttrain.samplers.answer import extended
from posttrain.types import Sample, Sampling


@dataclass(frozen=True)
class Answer:
    """One scripted answer of `A` tokens."""

    tokens: Sequence[int]  # [A]
    logprobs: Sequence[float] | None = None  # [A] in nats; None: -1 each
    sampled_logprobs: Sequence[float] | None = None  # [A]; None: the same as `logprobs`
    finish: str = "stop"


Script = Sequence["Answer | Sequence[int]"] | Callable[[Sample, int], "Answer | Sequence[int]"]
"""Answers by `prompt.index` (modulo their number), or a function of the prompt and its index; a plain list is tokens."""


@dataclass
class ScriptedSampler:
    """Answers from a list, or from a function of the prompt and its index.

    It keeps nothing between calls, so that a run that starts again hears the same answers.  An answer longer than
    `sampling.max_tokens` is cut and ends with finish "length".

    Example:
        >>> sampler = ScriptedSampler([[7, 2], Answer([8], logprobs=[-0.5], finish="length")])
        >>> prompt = Sample(tokens=[1], origin=[3], trained=[False], index=1)
        >>> answer, = sampler.sample([prompt], sampling=Sampling(), seed=0, step=0)
        >>> answer.tokens, answer.logprobs, answer.finish
        ([1, 8], [0.0, -0.5], 'length')
    """

    script: Script
    policy_version: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.script) and not self.script:
            raise ConfigError("the script holds no answer")

    def sample(
        self,
        prompts: Sequence[Sample],
        *,
        sampling: Sampling,
        seed: int,
        step: int,
        done: Callable[[Sample], None] | None = None,
    ) -> list[Sample]:
        """Continue every prompt once, in order; see `types.Sampler`."""
        answers = []
        for prompt in prompts:
            answers.append(self._continued(prompt, sampling))
            if done is not None:
                done(answers[-1])
        return answers

    def _continued(self, prompt: Sample, sampling: Sampling) -> Sample:
        script = self.script
        found = script(prompt, prompt.index) if callable(script) else script[prompt.index % len(script)]
        answer = found if isinstance(found, Answer) else Answer(found)
        count, limit = len(answer.tokens), sampling.max_tokens
        logprobs = [-1.0] * count if answer.logprobs is None else list(answer.logprobs)
        sampled = logprobs if answer.sampled_logprobs is None else list(answer.sampled_logprobs)
        if len(logprobs) != count or len(sampled) != count:
            given = f"{len(logprobs)} and {len(sampled)} log-probabilities"
            raise ConfigError(f"a scripted answer has {count} tokens, but {given}")
        return extended(
            prompt,
            list(answer.tokens)[:limit],
            logprobs=logprobs[:limit],
            sampled_logprobs=sampled[:limit],
            finish="length" if count > limit else answer.finish,
            temperature=1.0 if sampling.greedy else sampling.temperature,
            policy_version=self.policy_version,
        )


__all__ = ["Answer", "Script", "ScriptedSampler"]
