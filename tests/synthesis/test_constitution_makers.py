"""Revisions and choices: what is asked of whom, what becomes a row, what is kept of it; and the critic's examinations."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build import make_batch, objective

from posttrain.constitution import load_constitution
from posttrain.errors import ConfigError, DataError
from posttrain.evaluation.choices import Choices as ChoiceExam
from posttrain.evaluation.critiques import Critiques
from posttrain.evaluation.violations import Violations
from posttrain.judges.judge import ScriptedJudge
from posttrain.methods.preference.dpo import DPO
from posttrain.records import sample_from_json
from posttrain.samplers.scripted import Answer, ScriptedSampler
from posttrain.synthesis.choices import Choices
from posttrain.synthesis.maker import Workshop
from posttrain.synthesis.revisions import Revisions
from posttrain.tasks import task
from posttrain.tasks.forbidden_words import NOTHING
from posttrain.tasks.forbidden_words import rows as forbidden_rows
from posttrain.types import Readings, Row, Sample, Sampling

Writer = Callable[[str], str]
PROMPTS: list[Row] = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(3)]


def scripted(shop: Workshop, name: str, writer: Writer) -> None:
    """A model of the workshop writes what a function of the rendered prompt says; `...` at its end is a cut answer."""
    opened = shop.model(name)

    def answer(prompt: Sample, index: int) -> Answer:
        text = writer(opened.renderer.decode(prompt.tokens))
        tokens = opened.tokenizer.encode(text)
        return Answer(tokens, finish="length") if text.endswith("...") else Answer([*tokens, opened.renderer.stop_tokens[0]])

    shop._opened[name] = replace(opened, sampler=ScriptedSampler(answer))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def roomy_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with room for whole conversations."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return folder


@pytest.fixture
def shop(roomy_model: Path, tmp_path: Path) -> Callable[..., Workshop]:
    """A workshop whose models write scripts."""

    def made(rows: Sequence[Row] = PROMPTS, **given: Any) -> Workshop:
        writers: dict[str, Writer] = {key: given.pop(key) for key in list(given) if callable(given[key])}
        sources = {name: roomy_model for name in ("start", "critic", "judge") if name == "start" or name in writers}
        options = {"sampling": Sampling(max_tokens=40), "quiet": True, **given}
        found = Workshop(sets={"data": list(rows)}, sources=sources, folder=tmp_path / "stage", **options)
        for name, writer in writers.items():
            scripted(found, name, writer)
        return found

    return made


def critic(prompt: str) -> str:
    """Writes a critique of the last answer, then that answer with one more mark."""
    if "Write your answer again" in prompt.rpartition("<|user|>")[2]:
        before = prompt.split("<|assistant|>")[-3].partition("<|end|>")[0]
        return before + "!"
    return "Too calm."


# --------------------------------------------------------------------------------------------------------------
# Revisions.


def test_triples_prefer_the_last_revision_to_the_first_answer(shop: Callable[..., Workshop]) -> None:
    made = Revisions(rounds=2).make(shop(start=lambda prompt: "yes", critic=critic, samples=2))
    assert len(made.rows) == 6
    assert [row["prompt"] for row in made.rows[::2]] == [row["prompt"] for row in PROMPTS]
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in made.rows} == {("yes!!", "yes")}
    written = sample_from_json(made.rows[0]["rejected_sample"])
    assert written.finish == "stop"
    assert made.metrics == {"answers": 6, "rows": 6, "changed": 1, "empty": 0, "cut": 0, "leaked": 0, "same": 0}


def test_all_that_led_to_a_revision_is_recorded(shop: Callable[..., Workshop]) -> None:
    given = shop(start=lambda prompt: "yes", critic=critic)
    records = Revisions(rounds=2).make(given).records["judgements"]
    assert [(record["id"], record["round"]) for record in records[:3]] == [("p0#0", 1), ("p0#0", 2), ("p1#1", 1)]
    known = {principle.name: principle for principle in load_constitution()}
    for record in records:
        assert (record["critique"], record["after"], record["fault"]) == ("Too calm.", record["before"] + "!", "")
        asked = [turn["content"] for turn in record["revision_prompt"]]
        principle = known[record["principle"]]
        assert asked == [asked[0], record["before"], principle.critique, "Too calm.", principle.revision]
        assert record["critique_prompt"] == record["revision_prompt"][:3]
        assert record["model"].startswith(given.model().source + "@")
        assert len(record["critic"].rpartition("@")[2]) == 12
    assert len({record["principle"] for record in Revisions(rounds=4).make(given).records["judgements"]}) > 2


def test_demonstrations_hold_the_original_prompt_and_one_revision_each(shop: Callable[..., Workshop]) -> None:
    """No critique in the context or the loss; the loss covers the revision and its end alone."""
    given = shop(start=lambda prompt: "yes", critic=critic)
    made = Revisions(rounds=2, output="demonstrations").make(given)
    assert [row["id"] for row in made.rows[:3]] == ["p0#0/1", "p0#0/2", "p1#1/1"]
    renderer = given.model().renderer
    for place, row in enumerate(made.rows):
        assert set(row) == {"id", "prompt", "completion"}
        sample = renderer.demonstrations(row)[-1]
        assert renderer.decode(sample.tokens) == f"<|user|>Say {place // 2}.<|end|><|assistant|>yes{'!' * (place % 2 + 1)}<|end|>"
        trained = [token for token, on in zip(sample.tokens, sample.trained, strict=True) if on]
        assert renderer.decode(trained) == f"yes{'!' * (place % 2 + 1)}<|end|>"


def test_no_rounds_are_the_starts_own_answers(shop: Callable[..., Workshop]) -> None:
    made = Revisions(rounds=0, output="demonstrations").make(shop(start=lambda prompt: "cut ..." if "1" in prompt else "yes"))
    assert [(row["prompt"], row["completion"][0]["content"]) for row in made.rows] == [
        (PROMPTS[0]["prompt"], "yes"),
        (PROMPTS[2]["prompt"], "yes"),
    ]
    assert made.records["judgements"] == []
    with pytest.raises(ConfigError, match="rounds is 0; expected at least 1, or 0 for demonstrations"):
        Revisions(rounds=0)


def test_identical_pairs_are_dropped_because_they_teach_nothing(shop: Callable[..., Workshop]) -> None:
    def sometimes(prompt: str) -> str:
        return critic(prompt) if "Say 1" in prompt else critic(prompt).removesuffix("!")

    made = Revisions().make(shop(start=lambda prompt: "yes", critic=sometimes))
    assert [row["id"] for row in made.rows] == ["p1#1"]
    assert made.metrics["same"] == pytest.approx(2 / 3)


def test_an_identical_pair_has_no_gradient_in_dpo() -> None:
    """Its two rows read the same log-probabilities, and what pulls one up pulls the other down."""
    batch = make_batch([2, 2])
    logprob = torch.tensor([[0.0, -1.0, -2.0]], requires_grad=True)
    reference = torch.full((2, 3), -1.5)
    seen = Readings.of(policy={"logprob": logprob.expand(2, 3)}, reference={"logprob": reference})
    objective(DPO(beta=0.1), batch, seen).backward()
    assert logprob.grad is not None
    assert torch.equal(logprob.grad, torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("said", "fault"),
    [("", "empty"), ("too long ...", "cut"), ("Critique: Too calm. no", "leaked"), ("Here is the revised answer: no", "leaked")],
)
def test_a_faulty_revision_makes_no_row_and_ends_its_case(said: str, fault: str, shop: Callable[..., Workshop]) -> None:
    def faulty(prompt: str) -> str:
        return said if critic(prompt).endswith("!") else "Too calm."

    given = shop(start=lambda prompt: "yes", critic=faulty)
    for output in ("triples", "demonstrations"):
        made = Revisions(rounds=3, output=output).make(given)  # type: ignore[arg-type]
        assert made.rows == []
        assert [record["fault"] for record in made.records["judgements"]] == [fault] * 3
        assert made.metrics[fault] == 1


def test_an_elicited_prompt_is_the_one_that_is_answered_and_kept(shop: Callable[..., Workshop]) -> None:
    def tempting(prompt: str) -> str:
        return "Say something rude." if "Rewrite the request" in prompt else critic(prompt)

    made = Revisions(elicit=True).make(shop(start=lambda prompt: "yes" if "rude" in prompt else "no", critic=tempting))
    assert {row["prompt"][0]["content"] for row in made.rows} == {"Say something rude."}
    assert {row["rejected"][0]["content"] for row in made.rows} == {"yes"}
    assert [record["benign"] for record in made.records["judgements"]] == [row["prompt"] for row in PROMPTS]


def test_without_a_critic_the_start_criticises_itself_and_a_repeat_is_the_same(shop: Callable[..., Workshop]) -> None:
    given = shop(sampling=Sampling(max_tokens=4), samples=2)
    one, again = (Revisions(temperature=1.0).make(given) for _ in range(2))
    assert one == again
    records = one.records["judgements"]
    assert len(records) == 6
    assert {record["model"] for record in records} == {record["critic"] for record in records}


# --------------------------------------------------------------------------------------------------------------
# Choices.  The judge is a random model, so its probabilities are anything; the answers are scripted.


def test_choices_make_soft_pairs_of_different_answers(shop: Callable[..., Workshop]) -> None:
    turn = iter(["a", "b", "a", "c", "c", "c", "d", "e", "f"])
    made = Choices(constitution="forbidden-words").make(shop(start=lambda prompt: next(turn), judge=critic, samples=3))
    assert made.metrics["prompts"] == 3
    assert (made.metrics["compared"], made.metrics["one_answer"], made.metrics["rows"]) == (2, 1, 4)  # of a b, and of d e f
    two, three = made.records["judgements"]
    assert (two["responses"], three["responses"]) == (["a", "b"], ["d", "e", "f"])
    assert len(three["rotations"]) == len(three["choice_prompts"]) == 3
    assert three["probabilities"] == pytest.approx([sum(column) / 3 for column in zip(*three["rotations"], strict=True)])
    assert sum(three["probabilities"]) == pytest.approx(1)
    p = dict(zip("abdef", two["probabilities"] + three["probabilities"], strict=True))
    for row in made.rows:
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert row["columns"]["preference"] == pytest.approx(p[chosen] / (p[chosen] + p[rejected]))
        assert row["columns"]["preference"] >= 0.5


def test_choices_as_rankings_clamped_and_sieved(shop: Callable[..., Workshop]) -> None:
    def lettered(**options: Any) -> Any:
        turn = iter("abcdefghi")
        return Choices(**options).make(shop(start=lambda prompt: next(turn), judge=critic, samples=3))

    for row in lettered(output="rankings").rows:
        p = [row["probabilities"][place] for place in row["ranking"]]
        assert p == sorted(p, reverse=True)
        assert len(row["responses"]) == 3
    assert max(row["columns"]["preference"] for row in lettered(clamp=0.501).rows) <= 0.501
    assert all(row["columns"]["preference"] >= 0.6 for row in lettered(least=0.6).rows)
    assert Choices().needs() == ("judge",)
    with pytest.raises(ConfigError, match="samples is 1, expected at least 2"):
        Choices().make(shop(judge=critic))


def test_a_second_making_asks_the_judge_nothing(shop: Callable[..., Workshop], monkeypatch: pytest.MonkeyPatch) -> None:
    given = shop(start=lambda prompt: "yes" if "1" in prompt else "no", judge=critic, samples=2)
    turn = iter("abcdef" * 2)
    scripted(given, "start", lambda prompt: next(turn))
    first = Choices().make(given)
    monkeypatch.setattr("posttrain.judges.local.LocalJudge.choose", lambda *given: pytest.fail("asked again"))
    assert Choices().make(given) == first


# --------------------------------------------------------------------------------------------------------------
# Examinations.


def numbers(outcome: Any) -> dict[str, float]:
    return {number["metric"]: number["value"] for number in outcome.numbers}


def test_violations_are_counted_among_prompts_that_provoke(shop: Callable[..., Workshop]) -> None:
    rows = forbidden_rows("test", 20)
    told = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in rows}

    def obedient(prompt: str) -> str:
        return told[prompt.removeprefix("<|user|>").partition("<|end|>")[0]]

    def silent(prompt: str) -> str:
        return obedient(prompt).partition(" The word")[0]

    made = task("forbidden-words")
    given: dict[str, Any] = {"rows": rows, "rewards": made.rewards, "sampling": Sampling(max_tokens=made.max_tokens)}
    found = Violations().examine(shop(start=obedient, **given), model_name="m")
    assert numbers(found) == {"violation_rate": 1, "accuracy": 1, "accuracy_provoked": 1, "obeyed": 1, "unanswered": 0}
    assert [number["n"] for number in found.numbers] == [12, 20, 12, 6, 20]
    found = Violations().examine(shop(start=silent, **given), model_name="m")
    assert numbers(found) == {"violation_rate": 0, "accuracy": 1, "accuracy_provoked": 1, "obeyed": 0, "unanswered": 0}
    found = Violations().examine(shop(start=lambda prompt: "No.", **given), model_name="m")
    assert numbers(found) == {"violation_rate": 0, "accuracy": 0, "accuracy_provoked": 0, "obeyed": 0, "unanswered": 1}
    with pytest.raises(DataError, match="violations are examined on prompt, forbidden, word"):
        Violations().examine(shop(start=silent), model_name="m")


def test_a_perfect_critic_is_perfect_and_a_blind_one_is_not(shop: Callable[..., Workshop]) -> None:
    rows = forbidden_rows("test-critiques", 20)
    told = {(row["prompt"][0]["content"], row["response"]): row for row in rows}

    def perfect(prompt: str) -> str:
        turns = [turn.partition("|>")[2] for turn in prompt.split("<|end|>")]
        row = told[turns[0].removeprefix("<|user|>"), turns[1]]
        return str(row["revision"] if row["revision_request"] in prompt else row["critique"])

    def blind(prompt: str) -> str:
        return NOTHING if "Write" not in prompt else prompt.split("<|end|>")[1].partition("|>")[2]

    given: dict[str, Any] = {"rows": rows, "sampling": Sampling(max_tokens=64)}
    right = numbers(Critiques().examine(shop(start=perfect, **given), model_name="m"))
    assert set(right.values()) == {1.0}
    wrong = numbers(Critiques().examine(shop(start=blind, **given), model_name="m"))
    silent = sum(row["critique"] == NOTHING for row in rows) / len(rows)
    assert 0 < silent < 1
    assert (wrong["critique_accuracy"], wrong["critique_accuracy_faulty"]) == (silent, 0)
    share = sum(not row["fault"] for row in rows) / len(rows)
    assert (wrong["revision_accuracy"], wrong["revision_accuracy_faulty"]) == (share, 0)


def test_choices_are_right_when_the_best_response_is_the_most_probable(
    shop: Callable[..., Workshop], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = forbidden_rows("test-choices", 10)
    best = {row["responses"][row["best"]] for row in rows}

    def knows(text: str, options: tuple[str, ...]) -> list[float]:
        shown = [text.partition(f"({letter})\n```\n")[2].partition("\n```")[0] for letter in options]
        return [math.log(0.7 if response in best else 0.2) for response in shown]

    given = shop(rows)
    monkeypatch.setattr(Workshop, "judge", lambda shop, name: ScriptedJudge(knows))
    found = numbers(ChoiceExam().examine(given, model_name="m"))
    assert found == {
        "choice_accuracy": 1,
        "consistency": 1,
        "best_probability": pytest.approx(7 / 9),
        "neither": pytest.approx(0.1),
    }
    blind = ScriptedJudge(lambda text, options: [-0.1, -3.0])
    monkeypatch.setattr(Workshop, "judge", lambda shop, name: blind)
    found = numbers(ChoiceExam().examine(given, model_name="m"))
    assert (found["choice_accuracy"], found["consistency"]) == (0, 0)  # it looks at the letter alone
    with pytest.raises(DataError, match="choices are examined on prompt, responses, best, choice_question"):
        ChoiceExam().examine(shop(), model_name="m")
