"""Stop strings across token boundaries, and how an answer joins its prompt."""

from __future__ import annotations

import pytest

from posttrain.errors import ConfigError
from posttrain.samplers.answer import StopStrings, answer_turn, extended
from posttrain.types import Origin, Sample


class Pieces:
    """Tokens are indices into a list of pieces of bytes; a leading space of the text may be lost."""

    def __init__(self, *pieces: bytes, strips: bool = False) -> None:
        self.pieces, self.strips = pieces, strips

    def decode(self, tokens: list[int], **_: object) -> str:
        text = b"".join(self.pieces[token] for token in tokens).decode(errors="replace")
        return text.removeprefix(" ") if self.strips else text


@pytest.mark.parametrize(
    ("stop", "answer", "ends"),
    [
        ("END", [0, 1, 2], True),  # E N D: one letter a token
        ("END", [3, 2], True),  # EN D
        ("END", [0, 4], True),  # E ND!: more behind it
        ("END", [0, 1], False),
        ("END", [3, 5, 2], False),
        ("é", [6, 7], True),  # two bytes of one letter
        ("é!", [6, 8], True),
        ("D\nE", [2, 9], True),
    ],
)
def test_a_string_is_found_across_tokens(stop: str, answer: list[int], ends: bool) -> None:
    tokenizer = Pieces(b"E", b"N", b"D", b"EN", b"ND!", b" ", b"\xc3", b"\xa9", b"\xa9!", b"\nE")
    watch = StopStrings(tokenizer, ("nothing", stop))
    prompt = [5, 5]
    assert not any(watch.ended(prompt, answer[:count]) for count in range(1, len(answer)))
    assert watch.ended(prompt, answer) == ends
    assert watch.ended(prompt, [5] * 40 + answer) == ends  # far behind the start, where only the tail is decoded


def test_a_string_must_lie_wholly_in_the_answer() -> None:
    watch = StopStrings(Pieces(b"a", b"b", b"c"), ("ab",))
    assert not watch.ended([0], [1])
    assert not watch.ended([0, 1], [2])
    assert watch.ended([0], [1, 0, 1])


def test_a_leading_space_that_the_tokenizer_drops_still_counts() -> None:
    watch = StopStrings(Pieces(b"x", b" stop", strips=True), (" stop",))
    assert watch.ended([0], [1])
    assert watch.ended([0], [0] * 30 + [1])


def test_no_strings_need_no_tokenizer() -> None:
    watch = StopStrings(None, ())
    assert not watch
    assert not watch.ended([1], [2])
    with pytest.raises(ConfigError, match="tokenizer"):
        StopStrings(None, ("x",))


@pytest.mark.parametrize(
    ("origin", "turn", "expected"),
    [
        ([Origin.USER], [0], 1),
        ([Origin.TEMPLATE, Origin.USER, Origin.TEMPLATE], [0, 0, 0], 1),  # the closing tag of the user's message
        ([Origin.TEMPLATE, Origin.USER, Origin.TEMPLATE], [0, 0, 1], 1),  # the header of the answer
        ([Origin.USER, Origin.POLICY], [0, 1], 1),  # an answer that goes on
        ([Origin.USER, Origin.PREFIX], [0, 1], 1),
        ([Origin.USER, Origin.POLICY, Origin.TOOL], [0, 1, 2], 3),
        ([Origin.TEMPLATE], [0], 0),
        ([Origin.USER], [], 0),
    ],
)
def test_the_turn_of_an_answer(origin: list[int], turn: list[int], expected: int) -> None:
    prompt = Sample(tokens=[1] * len(origin), origin=origin, trained=[False] * len(origin), turn=turn)
    assert answer_turn(prompt) == expected


def test_an_answer_is_appended_and_nothing_is_lost() -> None:
    prompt = Sample(
        tokens=[1, 5, 6],
        origin=[Origin.TEMPLATE, Origin.USER, Origin.POLICY],
        trained=[False, False, True],
        turn=[0, 0, 1],
        logprobs=[0.0, 0.0, -0.5],
        group="g",
        query="q",
        index=4,
        info={"answer": "7"},
        columns={"weight": 2.0, "marks": [1.0, 2.0, 3.0]},
    )
    sample = extended(
        prompt,
        [7, 2],
        logprobs=[-1.0, -2.0],
        sampled_logprobs=[-0.9, -1.9],
        finish="stop",
        temperature=0.8,
        policy_version=3,
    )
    assert sample == Sample(
        tokens=[1, 5, 6, 7, 2],
        origin=[Origin.TEMPLATE, Origin.USER, Origin.POLICY, Origin.POLICY, Origin.POLICY],
        trained=[False, False, True, True, True],
        turn=[0, 0, 1, 1, 1],
        logprobs=[0.0, 0.0, -0.5, -1.0, -2.0],
        sampled_logprobs=[0.0, 0.0, -0.5, -0.9, -1.9],
        group="g",
        query="q",
        index=4,
        info={"answer": "7"},
        columns={"weight": 2.0, "marks": [1.0, 2.0, 3.0, 0.0, 0.0]},
        temperature=0.8,
        policy_version=3,
    )
    assert prompt.tokens == [1, 5, 6]
