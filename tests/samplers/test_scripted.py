"""The scripted sampler says what it is told."""

from __future__ import annotations

import pytest

from posttrain.errors import ConfigError
from posttrain.samplers import Answer, ScriptedSampler
from posttrain.types import Origin, Sample, Sampling


def prompt(index: int) -> Sample:
    return Sample(tokens=[1, 3], origin=[Origin.USER] * 2, trained=[False] * 2, index=index, group="g")


def test_answers_go_by_index_whatever_the_order_of_calls() -> None:
    sampler = ScriptedSampler([[7, 2], [8, 2], [9, 2]], policy_version=6)
    answers = sampler.sample([prompt(4), prompt(0)], sampling=Sampling(temperature=0.5), seed=0, step=0)
    assert [answer.completion for answer in answers] == [[8, 2], [7, 2]]
    assert sampler.sample([prompt(0)], sampling=Sampling(), seed=9, step=9)[0].completion == [7, 2]
    assert answers[0].trained == [False, False, True, True]
    assert answers[0].origin[2:] == [Origin.POLICY] * 2
    assert (answers[0].policy_version, answers[0].temperature, answers[0].group) == (6, 0.5, "g")
    assert answers[0].logprobs == [0.0, 0.0, -1.0, -1.0]


def test_every_answer_is_told_before_the_next_is_written() -> None:
    events: list[object] = []

    def script(sample: Sample, index: int) -> list[int]:
        events.append(index)
        return [7, 2]

    answers = ScriptedSampler(script).sample([prompt(0), prompt(1)], sampling=Sampling(), seed=0, step=0, done=events.append)
    assert events == [0, answers[0], 1, answers[1]]


def test_a_function_writes_answers_with_logprobs() -> None:
    def script(sample: Sample, index: int) -> Answer:
        return Answer([sample.tokens[-1], index], [-0.1, -0.2], [-0.05, -0.1], "length")

    sampler = ScriptedSampler(script)
    (answer,) = sampler.sample([prompt(5)], sampling=Sampling(), seed=0, step=0)
    assert answer.completion == [3, 5]
    assert answer.logprobs == [0.0, 0.0, -0.1, -0.2]
    assert answer.sampled_logprobs == [0.0, 0.0, -0.05, -0.1]
    assert answer.finish == "length"


def test_long_answers_are_cut() -> None:
    (answer,) = ScriptedSampler([[5, 6, 7]]).sample([prompt(0)], sampling=Sampling(max_tokens=2), seed=0, step=0)
    assert (answer.completion, answer.finish) == ([5, 6], "length")


def test_a_script_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="no answer"):
        ScriptedSampler([])
    with pytest.raises(ConfigError, match="2 tokens"):
        ScriptedSampler([Answer([5, 6], [-1.0])]).sample([prompt(0)], sampling=Sampling(), seed=0, step=0)
