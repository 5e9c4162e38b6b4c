"""Reading and comparing answers: numbers, text, expressions, formats, lengths."""

from __future__ import annotations

from fractions import Fraction

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards import Answer, Exact, Maths, MathsExact, Pattern, Reward, RewardRunner, SoftOverlong, ThinkAnswer
from posttrain.rewards.length import soft_overlong
from posttrain.rewards.maths import same_number
from posttrain.rewards.parse import answer_in, number
from posttrain.types import Crashed, Overlong, Score, Unparseable, Wrong


def tagged(text: str, expected: str = "7", **fields: object) -> Answer:
    return Answer(text=f"<answer>{text}</answer>", info={"answer": expected}, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", ".5"),
        (r"\dfrac{3}{6}", "1/2"),
        ("1 1/2", "1.5"),
        ("1,024", "1024"),
        ("1{,}024", "1024"),
        ("1,234,567.50", "1234567.5"),
        ("$5", "5"),
        (r"\$5.00", "5"),
        ("-$5", "-5"),
        ("€5", "5"),
        ("50%", "0.5"),
        ("50%", "50"),
        ("0.5", r"50\%"),
        ("50%", "50 %"),
        ("$18$", "18"),
        (r"\(18\)", "18"),
        (r"\boxed{18}", "18"),
        (r"\text{18}", "18"),
        ("\u22123", "-3"),
        ("+3", "3"),
        ("1e3", "1000"),
        ("18.", "18"),
        ("90°", "90"),
        (r"90^\circ", "90"),
        ("0.1", "1/10"),
        ("100000000000000000001", "100000000000000000001.0"),
    ],
)
def test_the_same_number(found: str, expected: str) -> None:
    assert same_number(found, expected) is True
    assert same_number(expected, found) is True
    assert MathsExact()(tagged(found, expected)) == Score(1.0)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("0.333", "1/3"),
        ("3", "-3"),
        ("50%", "5000"),
        ("50", "0.5"),
        ("100000000000000000001", "100000000000000000002"),  # equal as floats
    ],
)
def test_another_number(found: str, expected: str) -> None:
    assert same_number(found, expected) is False
    assert MathsExact()(tagged(found, expected)) == Wrong()


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "1,02",
        "2 apples",
        "1 or 2",
        "1/0",
        "1e999999999",
        "9**9**9",
        "nan",
        "inf",
        "--5",
        "٣",
        "0x10",
        "1_000",
        "7" * 200,
        "__import__('os')",
    ],
)
def test_no_number(text: str) -> None:
    assert number(text) is None
    if text:
        assert isinstance(MathsExact()(tagged(text)), Unparseable)


def test_numbers_are_exact() -> None:
    assert number("0.1") == Fraction(1, 10)
    assert number("12.5%") == Fraction(1, 8)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1</think><answer> 7 </answer>", "7"),
        ("<answer>6</answer> no, <answer>7</answer>", "7"),
        ("<answer>6</answer> no, <answer>7", None),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"so \boxed{7", None),
        (r"\boxed{6} <answer>7</answer>", "7"),
        ("worked\n#### 7\nmore", "7"),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_where_the_answer_stands(text: str, answer: str | None) -> None:
    assert answer_in(text) == answer


def test_a_cut_answer_is_overlong_and_a_missing_one_unparseable() -> None:
    for reward in (Exact(), MathsExact(), Maths()):
        cut = Answer(text="<think>3 +", info={"answer": "7"}, finish="length")
        assert reward(cut) == Overlong()
        assert isinstance(reward(Answer(text="seven", info={"answer": "7"})), Unparseable)
        assert reward(tagged("7", finish="length")) == Score(1.0)  # read before the cut


def test_exact_compares_cleaned_text_and_numbers() -> None:
    assert Exact()(tagged(" Paris. ", "paris")) == Score(1.0)
    assert Exact()(tagged("1,024", "1024.0")) == Score(1.0)
    assert Exact()(tagged("Paris, France", "Paris")) == Wrong()
    assert Exact()(Answer(text="<answer>b</answer>", info={"answer": ["a", "b"]})) == Score(1.0)
    assert Exact(key="gold", whole=True)(Answer(text="Yes.", info={"gold": "yes"})) == Score(1.0)
    assert Exact()(tagged("...", "")) == Wrong()


def test_expressions_through_math_verify() -> None:
    pytest.importorskip("math_verify", reason="needs posttrain[maths]")
    cases = [
        (r"\sqrt{4}", "2", Score),
        ("x+1", "1+x", Score),
        (r"\frac{\pi}{2}", r"\pi/2", Score),
        (r"\{1,2\}", r"\{2,1\}", Score),
        ("(1,2)", "(2,1)", Wrong),
        ("x+2", "1+x", Wrong),
        ("1 or 2 or 3", "2", Wrong),  # naming every answer is no answer
        ("1,2,3", "2", Wrong),
        ("x" * 500, "2", Unparseable),
    ]
    with RewardRunner() as runner:
        found, tally = runner.judge(Reward("maths", Maths()), [tagged(mine, gold) for mine, gold, _ in cases])
    assert [type(verdict) for verdict in found] == [kind for _, _, kind in cases]
    assert tally.failed == 0


def test_an_expression_that_explodes_is_the_policys_doing() -> None:
    pytest.importorskip("math_verify", reason="needs posttrain[maths]")
    with RewardRunner() as runner:
        found, tally = runner.judge(Reward("maths", Maths(seconds=1)), [tagged("9^{9^{9^9}}", "2"), tagged("2", "2")])
    assert isinstance(found[0], Crashed)
    assert found[1] == Score(1.0)
    assert tally.failed == 0


def test_without_the_extra_maths_warns_and_compares_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'posttrain\[maths\]'"):
        reward = Maths()
    assert reward(tagged("1/2", "0.5")) == Score(1.0)
    assert isinstance(reward(tagged("x", "2")), Unparseable)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<think>a</think><answer>7</answer>", True),
        ("  <think>a\nb</think>\n\n<answer>7</answer>\n", True),
        ("<think></think><answer>7</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think><answer>7</answer> and more", False),
        ("so <think>a</think><answer>7</answer>", False),
        ("<think>a</think> hm <answer>7</answer>", False),
        ("<think>a<think>b</think><answer>7</answer>", False),
        ("<think>a</think><answer>6</answer><answer>7</answer>", False),
        ("<answer>7</answer><think>a</think>", False),
        ("<think>a <answer>7</answer></think>", False),
        ("", False),
    ],
)
def test_tags(text: str, kept: bool) -> None:
    assert (ThinkAnswer()(Answer(text=text)) == Score(1.0)) is kept


def test_tags_that_the_prompt_opened() -> None:
    assert ThinkAnswer(opened=True)(Answer(text="a</think><answer>7</answer>")) == Score(1.0)
    assert isinstance(ThinkAnswer(opened=True)(Answer(text="<think>a</think><answer>7</answer>")), Wrong)
    assert ThinkAnswer()(Answer(text="<think>a", finish="length")) == Overlong()


def test_pattern() -> None:
    assert Pattern(r"\d+ apples.*")(Answer(text="7 apples\nand more ")) == Score(1.0)
    assert Pattern(r"\d+ apples")(Answer(text="seven apples")) == Wrong()
    with pytest.raises(ConfigError, match="not a regular expression"):
        Pattern("(")


@pytest.mark.filterwarnings("ignore:reward")
def test_a_catastrophic_pattern_is_killed() -> None:
    texts = [Answer(text="a" * 40 + "!"), Answer(text="aaa")]
    with RewardRunner() as runner:
        found, tally = runner.judge(Reward("pattern", Pattern("(a+)+"), deadline=0.7), texts)
    assert tally.timed_out == 1
    assert found[1] == Score(1.0)


def test_soft_overlong_falls_linearly() -> None:
    # DAPO, eq. 13, with L_max 20480 and L_cache 4096: 1024 over is 1024 / 4096
    lengths = [1, 16384, 17408, 18432, 20480, 20481, 99999]
    found = [soft_overlong(length, max_tokens=20480, cushion=4096) for length in lengths]
    assert found == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert SoftOverlong(10, 0)(Answer(text="", num_tokens=10)) == 0.0
    assert SoftOverlong(10, 0)(Answer(text="", num_tokens=11)) == -1.0
    with pytest.raises(ConfigError, match="cushion"):
        SoftOverlong(10, 11)
