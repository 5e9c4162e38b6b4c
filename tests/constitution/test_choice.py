"""Choices among K responses: every rotation is asked, probabilities are averaged."""

from __future__ import annotations

import math

import pytest

from posttrain.constitution import Principle
from posttrain.constitution.choice import Case, choice_prompt, choose, ranked, transcript
from posttrain.errors import ConfigError
from posttrain.judges.judge import ScriptedJudge
from posttrain.judges.templates import template_named

ASK = [{"role": "user", "content": "Say something."}]
RULE = Principle(name="r", critique="c", revision="r", choice="Which of these is best?")
LETTERS = template_named("multiple-choice")


def by_content(scores: dict[str, float]) -> ScriptedJudge:
    """A judge whose log-probability of a letter is that of the response that stands there."""

    def told(text: str, options: tuple[str, ...]) -> list[float]:
        shown = [text.partition(f"({letter})\n```\n")[2].partition("\n```")[0] for letter in options]
        return [scores[response] for response in shown]

    return ScriptedJudge(told)


def test_four_letters_by_hand() -> None:
    """The softmax of [-2, -1, -1.5, -4], in every rotation; computed from the definition."""
    scores = {"one": -2.0, "two": -1.0, "three": -1.5, "four": -4.0}
    (found,) = choose(by_content(scores), [Case(ASK, tuple(scores), RULE)], LETTERS)
    assert [round(p, 6) for p in found.p] == [0.181741, 0.494023, 0.299640, 0.024596]
    assert ranked(found.p) == [1, 2, 0, 3]
    assert all([round(p, 6) for p in rotation] == [round(p, 6) for p in found.p] for rotation in found.rotations)
    assert len(found.asked) == 4
    assert found.p[1] / (found.p[1] + found.p[2]) == pytest.approx(0.622459, abs=5e-7)
    assert found.neither == pytest.approx(1 - sum(map(math.exp, scores.values())))


def test_a_judge_that_looks_at_the_letter_alone_prefers_nothing() -> None:
    judge = ScriptedJudge(lambda text, options: [-0.1, -3.0, -4.0][: len(options)])
    cases = [Case(ASK, ("x", "y", "z"), RULE), Case(ASK, ("x", "y"), RULE)]
    three, two = choose(judge, cases, LETTERS)
    assert three.p == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert two.p == pytest.approx((0.5, 0.5))
    assert two.rotations[0][0] == pytest.approx(1 / (1 + math.exp(-2.9)))
    assert two.rotations[1][1] == two.rotations[0][0]  # the second response stood at A


def test_two_orders_are_averaged_as_probabilities() -> None:
    """sigma(1.5) and, swapped, slot-1 log-odds 0.4: 0.609443."""
    slots = {"x": (-0.5, -2.0), "y": (-0.8, -1.2)}  # by the response at A

    def told(text: str, options: tuple[str, ...]) -> tuple[float, ...]:
        return slots["x" if "(A)\n```\nx" in text else "y"]

    (found,) = choose(ScriptedJudge(told), [Case(ASK, ("x", "y"), RULE)], LETTERS)
    assert found.p[0] == pytest.approx(0.609443, abs=5e-7)


def test_a_failure_is_no_choice() -> None:
    silent = ScriptedJudge(lambda text, options: [-math.inf] * len(options))
    (found,) = choose(silent, [Case(ASK, ("x", "y"), RULE)], LETTERS)
    assert found.p == ()
    assert "none of the letters" in found.error
    (found,) = choose(ScriptedJudge(lambda text, options: None), [Case(ASK, ("x", "y"), RULE)], LETTERS)
    assert found.p == ()
    assert found.error == "the script gave no answer"


def test_the_question_shows_the_conversation_the_principle_and_fenced_options() -> None:
    prompt = [{"role": "system", "content": "S"}, *ASK, {"role": "assistant", "content": "What?"}, *ASK]
    text = choice_prompt(prompt, ["x", "```y"], RULE, LETTERS)[0]["content"]
    assert transcript(prompt) == "System: S\n\nHuman: Say something.\n\nAssistant: What?\n\nHuman: Say something."
    assert transcript(prompt) in text
    assert text.index(RULE.choice) < text.index("Options:\n(A)\n```\nx\n```\n(B)\n````\n```y\n````") < text.index("The answer is")
    assert text.count("Options:") == 1


def test_only_templates_with_letters_choose() -> None:
    with pytest.raises(ConfigError, match="does not choose among letters at once"):
        choose(by_content({}), [Case(ASK, ("x", "y"), RULE)], template_named("pairwise"))
