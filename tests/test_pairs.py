"""Pairs that sample stages write: what is chosen and rejected, that the tokens stay those that were written, and whole rounds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from small import PARITY, demonstrations, lines, small_run, user

from posttrain.data.chat import renderer_of
from posttrain.data.comparisons import labelled
from posttrain.errors import ConfigError, DataError
from posttrain.experience import Desk
from posttrain.methods import DPO, KTO
from posttrain.models.load import load
from posttrain.pipeline import run_recipe
from posttrain.recipe import parse_recipe
from posttrain.records import sample_from_json
from posttrain.report.summary import read_summary
from posttrain.run import train
from posttrain.synthesis.maker import Workshop
from posttrain.synthesis.opponents import Opponents, as_prompt
from posttrain.synthesis.pairs import Pairs
from posttrain.types import Origin, Sample, Sampling


def shop(model: Path, tmp_path: Path, **changes: Any) -> Workshop:
    """Four answers of at most six tokens to each of eight prompts, scored by the parity of their length."""
    settings: dict[str, Any] = {
        "sets": {"data": demonstrations()},
        "sources": {"start": model},
        "folder": tmp_path / "stage",
        "samples": 4,
        "sampling": Sampling(max_tokens=6),
        "rewards": (PARITY,),
        "quiet": True,
    }
    return Workshop(**{**settings, **changes})


def written(answer: list[int], *, reward: float | None, index: int = 0, finish: str = "stop") -> Sample:
    return Sample(
        tokens=[1, *answer],
        origin=[int(Origin.USER)] + [int(Origin.POLICY)] * len(answer),
        trained=[False] + [True] * len(answer),
        reward=reward,
        index=index,
        finish=finish,
    )


# --------------------------------------------------------------------------------------------------------------
# The rule.


def test_the_best_against_the_worst() -> None:
    answers = [written([i], reward=r, index=i) for i, r in enumerate([0.25, 0.5, 0.5, 0.0])]
    found = Pairs().pair(answers, seed=0, number=0)
    assert found is not None
    assert [sample.index for sample in found] == [1, 3]
    assert Pairs().pair(answers[1:3], seed=0, number=0) is None
    assert Pairs().pair([], seed=0, number=0) is None
    same = [written([7, 8], reward=1.0), written([7, 8], reward=0.0)]
    assert Pairs().pair(same, seed=0, number=0) is None  # one text, scored twice


def test_the_best_against_a_random_lower_one() -> None:
    answers = [written([i], reward=r, index=i) for i, r in enumerate([1.0, 0.0, 0.5, 1.0, 0.2])]
    maker = Pairs(rejected="random")
    drawn = [maker.pair(answers, seed=3, number=number) for number in range(300)]
    assert {pair[0].index for pair in drawn if pair} == {0}
    counts = {index: sum(pair is not None and pair[1].index == index for pair in drawn) for index in (1, 2, 4)}
    assert sum(counts.values()) == 300
    assert all(70 < count < 130 for count in counts.values())
    assert drawn == [maker.pair(answers, seed=3, number=number) for number in range(300)]


# --------------------------------------------------------------------------------------------------------------
# The makers.


def test_pairs_of_a_model(small_model: Path, tmp_path: Path) -> None:
    made = Pairs().make(shop(small_model, tmp_path))
    assert made.metrics["prompts"] == 8
    assert 0 < made.metrics["pairs"] == len(made.rows)
    assert made.metrics["kept"] == len(made.rows) / 8
    assert made.metrics["gap"] == pytest.approx(sum(a - b for a, b in (row["scores"] for row in made.rows)) / len(made.rows))
    for row in made.rows:
        chosen, rejected = sample_from_json(row["chosen_sample"]), sample_from_json(row["rejected_sample"])
        assert row["scores"] == [chosen.reward, rejected.reward]
        assert row["scores"][0] > row["scores"][1]
        assert chosen.tokens[: chosen.prompt_length] == rejected.tokens[: rejected.prompt_length]
        assert row["prompt"][0]["role"] == "user"
        json.dumps(row)
    longer = [len(row["chosen_sample"]["tokens"]) > len(row["rejected_sample"]["tokens"]) for row in made.rows]
    assert made.metrics["chosen_longer"] == pytest.approx(sum(longer) / len(longer))


def test_answers_that_were_cut_can_be_left_out(small_model: Path, tmp_path: Path) -> None:
    every, whole = (Pairs(truncated=used).make(shop(small_model, tmp_path)) for used in (True, False))
    assert any(row[f"{side}_sample"]["finish"] == "length" for row in every.rows for side in ("chosen", "rejected"))
    assert len(whole.rows) < len(every.rows)
    assert all(row[f"{side}_sample"]["finish"] == "stop" for row in whole.rows for side in ("chosen", "rejected"))


def test_what_pairs_refuse(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        Pairs().make(shop(small_model, tmp_path, samples=1))
    assert Pairs().needs() == ("rewards",)
    assert Opponents().needs() == ()
    assert Opponents(drop_right=True).needs() == ("rewards",)


def test_stages_draw_anew(small_model: Path, tmp_path: Path) -> None:
    one, other = (shop(small_model, tmp_path, folder=tmp_path / name) for name in ("pairs-1", "pairs-2"))
    assert one.draw != other.draw
    assert Pairs().make(one).rows == Pairs().make(shop(small_model, tmp_path, folder=tmp_path / "pairs-1")).rows
    assert Pairs().make(one).rows != Pairs().make(other).rows


def test_the_tokens_that_were_written_are_trained_on(small_model: Path, tmp_path: Path) -> None:
    made = Pairs().make(shop(small_model, tmp_path))
    model, tokenizer = load(small_model)
    desk = Desk(renderer_of(model, tokenizer))
    samples = desk.pairs(made.rows)
    for number, row in enumerate(made.rows):
        records = (row["chosen_sample"], row["rejected_sample"])
        for sample, record in zip(samples[2 * number : 2 * number + 2], records, strict=True):
            assert sample.tokens == record["tokens"]
            assert sample.trained == [bool(flag) for flag in record["trained"]]
            assert Origin.POLICY not in sample.origin
            assert (sample.group, sample.query) == (f"0/{number}", row["id"])
            assert not {"chosen_sample", "rejected_sample"} & sample.info.keys()
    assert [sample.index for sample in samples] == list(range(len(samples)))
    assert desk.replay_or_prompts(made.rows) == [s.with_(index=s.index + len(samples)) for s in samples]


def test_dpo_trains_on_them(small_model: Path, tmp_path: Path) -> None:
    rows = Pairs().make(shop(small_model, tmp_path)).rows
    train(small_run(DPO(), small_model, tmp_path / "run", data=rows, steps=2))
    found = lines(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found[1]["loss"] != found[0]["loss"]


def test_a_pair_is_two_labelled_answers(small_model: Path, tmp_path: Path) -> None:
    made = Pairs().make(shop(small_model, tmp_path)).rows
    rows = labelled(made)
    assert [row["label"] for row in rows] == [True, False] * len(made)
    assert [row["sample"] for row in rows[:2]] == [made[0]["chosen_sample"], made[0]["rejected_sample"]]
    assert not {"chosen", "rejected", "chosen_sample", "rejected_sample"} & rows[0].keys()
    train(small_run(KTO(), small_model, tmp_path / "run", data=rows, steps=1))
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(0.5, abs=1e-3)  # policy = reference: 0.5 each
    (good, bad) = labelled([{"id": 1, "prompt": user("a"), "chosen": "b", "rejected": "c"}])
    assert (good, bad) == (
        {"id": 1, "prompt": user("a"), "completion": "b", "label": True},
        {"id": 1, "prompt": user("a"), "completion": "c", "label": False},
    )


# --------------------------------------------------------------------------------------------------------------
# Self-play.


def test_opponents_of_demonstrations(small_model: Path, tmp_path: Path) -> None:
    made = Opponents(truncated=True).make(shop(small_model, tmp_path, samples=1))
    assert len(made.rows) == made.metrics["pairs"] == 8
    for row, demonstration in zip(made.rows, demonstrations(), strict=True):
        assert row["prompt"] == demonstration["prompt"]
        assert row["chosen"] == demonstration["completion"]
        assert "chosen_sample" not in row
        answer = sample_from_json(row["rejected_sample"])
        assert row["rejected"] == [{"role": "assistant", "content": shop(small_model, tmp_path).text(answer)}]
    model, tokenizer = load(small_model)
    renderer = renderer_of(model, tokenizer)
    chosen, rejected = Desk(renderer).pair(made.rows[0])
    assert chosen == renderer.completion(made.rows[0]["prompt"], made.rows[0]["chosen"], row=made.rows[0])
    assert chosen.tokens[: chosen.prompt_length] == rejected.tokens[: rejected.prompt_length]


def test_what_opponents_leave_out(small_model: Path, tmp_path: Path) -> None:
    cut = Opponents().make(shop(small_model, tmp_path, samples=2))
    assert cut.metrics["cut"] == 1 - len(cut.rows) / 16
    right = Opponents(truncated=True, drop_right=True).make(shop(small_model, tmp_path, samples=2))
    assert 0 < right.metrics["right"] < 1
    assert all(row["rejected_sample"]["reward"] < 1 for row in right.rows)


def test_an_answer_that_is_the_demonstration_is_left_out(small_model: Path, tmp_path: Path) -> None:
    class Parrot(Workshop):
        def answers(self, rows: Any, **_: Any) -> list[Sample]:
            renderer = self.model().renderer
            texts = (row["completion"] for row in demonstrations())
            return [renderer.completion(row["prompt"], text) for row, text in zip(rows, texts, strict=True)]

    parrot = Parrot(**vars(shop(small_model, tmp_path, samples=1)))
    made = Opponents().make(parrot)
    assert (made.rows, made.metrics["same"]) == ([], 1.0)


def test_conversations_are_demonstrations_too() -> None:
    talk = [*user("a"), {"role": "assistant", "content": "b"}, *user("c"), {"role": "assistant", "content": "d"}]
    assert as_prompt({"messages": talk, "id": 1}, 0) == {"id": 1, "prompt": talk[:3], "completion": talk[3:]}
    for wrong in ({"prompt": user("a")}, {"messages": talk[:3]}, {"messages": talk[1:2]}):
        with pytest.raises(DataError, match="expected prompt"):
            as_prompt(wrong, 0)


# --------------------------------------------------------------------------------------------------------------
# Whole rounds, as recipes.


def rounds(model: Path, reward: str, stages: list[dict[str, Any]]) -> dict[str, Any]:
    judged = [{**stage, "rewards": [reward]} if "sample" in stage else stage for stage in stages]
    return {
        "name": "rounds",
        "model": str(model),
        "task": {"name": "word-problems", "level": "easy", "max_tokens": 6},
        "stages": [{"repeat": 2, "stages": judged}],
    }


@pytest.fixture
def reward(tmp_path: Path) -> str:
    """A reward that differs between answers, as a file."""
    path = tmp_path / "score.py"
    path.write_text("def score(answer):\n    return float(sum(map(ord, answer.text)) % 2)\n", encoding="utf-8")
    return f"{path}:score"


START = {"first": "base", "then": "round-{previous}"}
SHORT = {"steps": 2, "prompts_per_step": 2, "optimizer": {"lr": 1e-2}}


def test_iterative_dpo(small_model: Path, tmp_path: Path, reward: str) -> None:
    stages = [
        {"name": "pairs-{round}", "sample": "pairs", "start": START, "data": {"split": "train", "count": 6}, "samples": 4},
        {"name": "round-{round}", "train": "dpo", "start": START, "data": {"stage": "pairs-{round}"}, "run": SHORT},
    ]
    out = tmp_path / "out"
    run_recipe(parse_recipe(rounds(small_model, reward, stages)), out, quiet=True)
    summary = read_summary(out)
    assert [stage["name"] for stage in summary["stages"]] == ["pairs-1", "round-1", "pairs-2", "round-2"]
    for name in ("pairs-1", "pairs-2"):
        assert (out / name / "rows" / "rows.jsonl").read_text().count("chosen_sample") > 0
    for name in ("round-1", "round-2"):  # the reference is the start of the round
        assert lines(out / name)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_spin(small_model: Path, tmp_path: Path, reward: str) -> None:
    old = {"first": {"stage": "opponents-1"}, "then": {"mix": [{"stage": "opponents-{previous}"}, {"stage": "opponents-{round}"}]}}
    stages = [
        {
            "name": "opponents-{round}",
            "sample": "opponents",
            "start": START,
            "data": {"split": "demonstrations", "count": 5},
            "method": {"truncated": True},
        },
        {"name": "round-{round}", "train": "spin", "start": START, "data": old, "run": SHORT},
    ]
    out = tmp_path / "out"
    run_recipe(parse_recipe(rounds(small_model, reward, stages)), out, quiet=True)
    texts = [lines(out / f"opponents-{number}" / "rows", "rows.jsonl") for number in (1, 2)]
    assert [len(rows) for rows in texts] == [5, 5]
    assert [row["rejected"] for row in texts[0]] != [row["rejected"] for row in texts[1]]
    assert json.loads((out / "round-2" / "run.json").read_text())["rows"]["data"]["count"] == 10
    assert lines(out / "round-2")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
