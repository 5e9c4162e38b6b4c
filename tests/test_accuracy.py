"""What an evaluation says of answers that are right, wrong, or not in the asked format, and of a few questions."""

from __future__ import annotations

import json

import pytest
from small import user

from posttrain import tiny
from posttrain.data.chat import Renderer
from posttrain.evaluation.accuracy import Evaluation, Outcome
from posttrain.report.comparison import state
from posttrain.rewards import Exact, Reward
from posttrain.samplers import ScriptedSampler

RIGHT, WRONG, OTHER = "<answer>4</answer>", "<answer>5</answer>", "The answer is 4."


def evaluated(answers: list[str], *, samples: int = 0, max_tokens: int = 64) -> Outcome:
    """Questions whose answer is 4; the greedy answers are these, the drawn ones too, in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny.path()))
    script = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in answers]
    rows = [{"id": str(number), "prompt": user("What is 2 + 2?"), "answer": "4"} for number in range(len(answers))]
    evaluation = Evaluation(
        task="sums", rows=rows, rewards=(Reward("exact", Exact()),), samples=samples, max_tokens=max_tokens
    )
    return evaluation.of(None, tokenizer, Renderer(tokenizer), sampler=ScriptedSampler(script))


def test_a_record_says_whether_its_answer_could_be_read() -> None:
    records = evaluated([RIGHT, WRONG, OTHER]).records
    assert [(record["right"], record["parsed"]) for record in records] == [(True, True), (False, True), (False, False)]
    assert [state(record) for record in records] == ["right", "wrong", "not in the asked format"]
    assert [state(record) for record in evaluated([OTHER], max_tokens=3).records] == ["cut off"]


def test_a_few_questions_have_no_interval_and_json_can_hold_them() -> None:
    """Four questions, k = 2: their shares are 1/2, so neither number has an interval; Wilson's of accuracy stays."""
    found = {entry["metric"]: entry for entry in evaluated([RIGHT, WRONG] * 2, samples=2).numbers}
    assert (found["mean@2"]["value"], found["mean@2"]["low"], found["mean@2"]["high"]) == (0.5, None, None)
    assert found["accuracy"]["low"] == pytest.approx(0.15, abs=0.001)
    json.dumps(list(found.values()), allow_nan=False)


def test_the_interval_of_shares_is_one_of_shares() -> None:
    """Of six questions with k = 2 the shares are 1/2, 0, 0, 1/2, 0, 0: 1/6 +- t(5) 0.2582 / sqrt(6) = 0.167 +- 0.271."""
    found = {entry["metric"]: entry for entry in evaluated([RIGHT, *[WRONG] * 5], samples=2).numbers}
    assert found["mean@2"]["low"] == 0.0
    assert found["mean@2"]["high"] == pytest.approx(1 / 6 + 0.271, abs=1e-3)
