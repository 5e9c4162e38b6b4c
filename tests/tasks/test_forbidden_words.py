"""The synthetic harm: sets of words and splits are disjoint, and every row is what it says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from posttrain import tasks, tiny
from posttrain.tasks.forbidden_words import FORBIDDEN, HELD_OUT, KINDS, PERMITTED, SPLITS, TEACHING, forbids, rows, says
from posttrain.tasks.word_problems import rows as word_problems
from posttrain.tasks.word_problems import verify
from posttrain.types import Score

EXPERIMENT = (*FORBIDDEN, *PERMITTED)
TAUGHT = tuple(word for words in TEACHING.values() for word in words)


def text_of(messages: Any) -> str:
    return " ".join(message["content"] for message in messages)


def test_the_sets_of_words_are_disjoint_and_of_the_same_kinds() -> None:
    words = [word.lower() for word in (*EXPERIMENT, *TAUGHT)]
    assert len(set(words)) == len(words)
    assert list(TEACHING) == list(HELD_OUT)
    assert sorted(EXPERIMENT) == sorted(word for words in HELD_OUT.values() for word in words)
    assert {word for kind in KINDS for word in HELD_OUT[kind]} == set(FORBIDDEN)


def test_every_word_is_one_token_and_in_no_word_problem() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny.path()))
    assert [word for word in (*EXPERIMENT, *TAUGHT) if len(tokenizer.encode(f" {word}")) != 1] == []
    for split in ("pretrain", "test", "train"):
        for row in word_problems(split, 400, level="easy"):
            assert not says(text_of(row["prompt"]) + text_of(row["completion"]), (*EXPERIMENT, *TAUGHT)), row["id"]


@pytest.mark.parametrize("split", ["critiques", "choices"])
def test_the_critic_never_meets_a_word_of_the_experiment(split: str) -> None:
    assert not [row["id"] for row in rows(split, 600) if says(json.dumps([row["prompt"], row["completion"]]), EXPERIMENT)]


@pytest.mark.parametrize("split", ["train", "validation", "test", "demonstrations"])
def test_prompts_ask_for_a_word_and_the_demonstration_obeys(split: str) -> None:
    made = rows(split, 300)
    for row in made:
        prompt, answer = text_of(row["prompt"]), text_of(row["completion"])
        assert says(prompt, EXPERIMENT) == says(answer, EXPERIMENT) == ([row["word"]] if row["word"] else [])
        assert isinstance(verify(answer, row), Score)
    kinds = [("forbidden" if row["word"] in FORBIDDEN else "permitted" if row["word"] else "none") for row in made]
    assert [kinds.count(kind) for kind in ("forbidden", "permitted", "none")] == [180, 90, 30]


def test_permitted_prompts_ask_for_nothing_forbidden() -> None:
    made = rows("permitted", 100)
    for row in made:
        text = text_of(row["prompt"]) + text_of(row["completion"])
        assert says(text, EXPERIMENT) == ([row["word"]] if row["word"] else [])
        assert not says(text, FORBIDDEN)
        assert isinstance(verify(text_of(row["completion"]), row), Score)
    assert {row["word"] for row in made} == {*PERMITTED, ""}


def test_no_prompt_is_in_two_splits() -> None:
    def problems(split: str) -> set[str]:
        return {re.sub(r" (Say|Use|End with) the word \w+\.$", "", text_of(row["prompt"])) for row in rows(split, 300)}

    train, test, taught = problems("train"), problems("test"), problems("demonstrations")
    assert not train & test
    assert not taught & (train | test)


def test_comparisons_prefer_help() -> None:
    for row in rows("comparisons", 60):
        chosen, rejected = text_of(row["chosen"]), text_of(row["rejected"])
        (word,) = says(text_of(row["prompt"]), PERMITTED)
        assert not says(text_of(row["prompt"]), FORBIDDEN)
        assert chosen == f"{rejected} The word is {word}."
        assert not says(rejected, EXPERIMENT)
        assert row["columns"] == {"preference": 1.0}


def forbidden_in(text: str) -> str:
    return text.partition("Forbidden: ")[2].partition(".")[0]


def test_teaching_conversations_are_right() -> None:
    """The critique says of which kind the word is and if that is forbidden; the revision is the answer without its sentence."""
    faults, kinds = 0, set()
    for row in rows("critiques", 300):
        assert [turn["role"] for turn in [*row["prompt"], *row["completion"]]] == ["user", "assistant"] * 3
        answer, request = row["prompt"][1]["content"], row["prompt"][2]["content"]
        assert request == forbids(forbidden_in(request)).critique
        critique, _, revision = (turn["content"] for turn in row["completion"])
        found = says(answer, TEACHING[forbidden_in(request)])
        (word,) = says(answer, TAUGHT) or [""]
        kind = next((kind for kind, words in TEACHING.items() if word in words), "")
        allowed = f"It says one of the {kind}, which is allowed." if word else "It says no such word."
        assert critique == (f"It says one of the {kind}, which is forbidden." if found else allowed)
        assert revision == (answer.removesuffix(f" The word is {found[0]}.") if found else answer)
        faults += bool(found)
        kinds.add(forbidden_in(request))
    assert 100 < faults < 170
    assert kinds == set(TEACHING)


def test_teaching_choices_are_right_or_even() -> None:
    ties = 0
    for row in rows("choices", 300):
        text = row["prompt"][0]["content"]
        options = [text.partition(f"({letter})\n```\n")[2].partition("\n```")[0] for letter in "AB"]
        bad = [bool(says(option, TEACHING[forbidden_in(text)])) for option in options]
        if sum(bad) == 1:
            assert text_of(row["completion"]) == "AB"[bad.index(False)]
        else:
            assert not any(bad)
            ties += 1
    assert 30 < ties < 95


@pytest.mark.parametrize("split", ["test-critiques", "test-choices"])
def test_the_test_is_on_kinds_and_words_of_the_experiment(split: str) -> None:
    for row in rows(split, 100):
        kind = forbidden_in(row.get("critique_request") or row["choice_question"])
        assert kind in KINDS
        assert not says(json.dumps(row), TAUGHT)
        if "best" in row:
            good, bad = row["responses"][row["best"]], row["responses"][1 - row["best"]]
            assert says(bad, HELD_OUT[kind])
            assert not says(good, HELD_OUT[kind])
        else:
            assert row["fault"] == bool(says(row["response"], HELD_OUT[kind]))
            assert not says(row["revision"], HELD_OUT[kind])


def test_as_a_task() -> None:
    made = tasks.task("forbidden-words")
    assert (made.name, made.splits, made.max_tokens) == ("forbidden-words", tuple(SPLITS), 56)
    assert made.rows("test", 3) == rows("test", 5)[:3]
    assert made.rows("test", 3, 1) != made.rows("test", 3, 0)
