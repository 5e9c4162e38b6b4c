"""Constitutions are read strictly, and principles are drawn by a key."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from posttrain.constitution import (
    Principle,
    critique_prompt,
    drawn,
    elicitation,
    fault_of,
    load_constitution,
    load_examples,
    revision_prompt,
)
from posttrain.errors import ConfigError
from posttrain.tasks.forbidden_words import KINDS, forbids

ONE = Principle(name="brief", critique="Is it long?", revision="Shorten it.", choice="Which is shorter?")
ASK = [{"role": "user", "content": "Hello"}]


def test_the_default_constitution_has_seven_principles() -> None:
    names = [principle.name for principle in load_constitution()]
    assert names == ["helpful", "avoid-harm", "honest", "respect-privacy", "neutral", "say-when-uncertain", "encouraging"]
    assert load_constitution("") == load_constitution(None) == load_constitution("principles")
    texts = [text for p in load_constitution() for text in (p.critique, p.revision, p.choice)]
    assert len(set(texts)) == 21
    assert not any("Options:" in text for text in texts)  # the template says it


def test_the_embedded_task_and_its_constitution_forbid_the_same() -> None:
    assert load_constitution("forbidden-words") == tuple(forbids(kind) for kind in KINDS)


GOOD = "name: a\n  critique: b\n  revision: c\n  choice: d\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"holds nothing; expected a list of principles"),
        ("a: 1", r"holds dict; expected a list"),
        ("- 3", r"principle 1 is int; expected a mapping with name, critique, revision, choice"),
        (f"- {GOOD}  critic: x", r"principle 1 has no 'critic' \(nearest: 'critique'"),
        ("- name: a\n  critique: b\n  revision: c\n", r"principle 1 has no 'choice'; expected text"),
        ("- name: a\n  critique: b\n  revision: c\n  choice: 3\n", r"principle 1 has int as 'choice'; expected text"),
        ("- name: a\n  critique: b\n  revision: ' '\n  choice: d\n", r"principle 'a' has an empty 'revision'"),
        (f"- {GOOD}- {GOOD}", r"two principles called 'a'"),
        ("- [", r"is not YAML"),
    ],
)
def test_what_is_no_constitution_is_refused_in_words(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_constitution(path)


def test_a_constitution_that_is_not_there_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"there is no constitution 'forbiden-words' \(nearest: 'forbidden-words'\)"):
        load_constitution("forbiden-words")


def test_principles_are_drawn_by_key_and_evenly() -> None:
    principles = load_constitution()
    many = drawn(principles, 7000, seed=3, step=5)
    assert drawn(principles, 70, seed=3, step=5) == many[:70]  # more cases change nothing before them
    assert drawn(principles, 70, seed=4, step=5) != many[:70] != drawn(principles, 70, seed=3, step=6)
    counts = Counter(principle.name for principle in many)
    assert len(counts) == 7
    assert all(abs(count - 1000) < 4 * 30 for count in counts.values())  # four standard deviations


def test_prompts_alternate_and_hold_what_was_said() -> None:
    asked = revision_prompt(ASK, "Hi there!", ONE, "It is long.")
    assert [turn["role"] for turn in asked] == ["user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in asked] == ["Hello", "Hi there!", "Is it long?", "It is long.", "Shorten it."]
    assert critique_prompt(ASK, "Hi there!", ONE) == asked[:3]


def test_examples_stand_between_the_system_message_and_the_case(tmp_path: Path) -> None:
    path = tmp_path / "examples.yaml"
    keys = ("prompt", "answer", "critique_request", "critique", "revision_request", "revision")
    path.write_text("- " + "\n  ".join(f"{key}: the {key}" for key in keys))
    examples = load_examples(path)
    asked = critique_prompt([{"role": "system", "content": "S"}, *ASK], "Hi", ONE, examples)
    assert [turn["role"] for turn in asked] == ["system", *["user", "assistant"] * 4, "user"]
    assert [turn["content"] for turn in asked[1:7]] == [f"the {key}" for key in keys]
    path.write_text("- prompt: a")
    with pytest.raises(ConfigError, match="example 1: found no text for 'answer'"):
        load_examples(path)


def test_elicitation_shows_the_check_and_the_request() -> None:
    (asked,) = elicitation([{"role": "system", "content": "S"}, *ASK], ONE)
    assert asked["role"] == "user"
    assert "Check: Is it long?" in asked["content"]
    assert asked["content"].endswith("Request: Hello")


@pytest.mark.parametrize(
    ("revision", "cut", "fault"),
    [
        ("Hi.", False, ""),
        ("  \n", False, "empty"),
        ("Hi", True, "cut"),
        ("Critique: it is long. Hi.", False, "leaked"),
        ("Here is my revised answer: Hi.", False, "leaked"),
        ("It is long. So: Hi.", False, "leaked"),
        ("Shorten it. Hi.", False, "leaked"),
        ("I revised the schedule.", False, ""),
    ],
)
def test_faults_of_form(revision: str, cut: bool, fault: str) -> None:
    assert fault_of(revision, critique="It is long.", principle=ONE, cut=cut) == fault
