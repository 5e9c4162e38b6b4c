"""Whole runs of reward models from files: rankings, judged answers, judged steps; each learns what its rows say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import assistant, demonstrations, jsonl, lines, rankings, small_run, stepped, user
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.data.chat import Renderer
from posttrain.data.rows import load_rows
from posttrain.experience import Desk
from posttrain.methods import DPO, AllPairs, BestOfK, BradleyTerry, OutcomeReward, OutcomeRewardLast, PlackettLuce, ProcessReward
from posttrain.models.load import load
from posttrain.pack import pack, units
from posttrain.records import sample_to_json
from posttrain.rewards.model import step_scores
from posttrain.run import train


def judged(count: int = 8) -> list[dict[str, Any]]:
    """Sums with a right or a wrong answer; one has no label."""
    rows = demonstrations(count)
    return [
        {"id": r["id"], "prompt": r["prompt"], "completion": r["completion"] if i % 2 else assistant("No idea."), "label": i % 2}
        for i, r in enumerate(rows)
    ]


FILES = {
    "all_pairs": rankings,
    "best_of_k": rankings,
    "plackett_luce": rankings,
    "bradley_terry": rankings,
    "outcome_reward": judged,
    "outcome_reward_last": judged,
    "process_reward": stepped,
}


@pytest.mark.parametrize("name", FILES)
def test_from_a_file_by_the_command_line(name: str, small_model: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", FILES[name]())
    settings = ["steps=12", "prompts_per_step=8", "lr=3e-3"]
    arguments = ["train", name, "-m", small_model, "-d", data, "-o", tmp_path / "out", "-q", *settings]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = lines(tmp_path / "out")
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert found[-1].get("best_first", found[-1]["accuracy"]) > 0.85
    model, _ = load(tmp_path / "out" / "model")
    assert "reward" in model.heads


@pytest.mark.parametrize("method", [AllPairs(), PlackettLuce(), BestOfK(), OutcomeReward(), OutcomeRewardLast(), ProcessReward()])
def test_in_micro_batches_with_rows_held_out(method, small_model: Path, tmp_path: Path) -> None:
    changes = {"data": judged()} if isinstance(method, OutcomeReward | OutcomeRewardLast) else {}
    run = small_run(method, small_model, tmp_path / "a", prompts_per_step=4, dtype="float64", **changes)
    train(run)
    data = run.data
    again = {"data": data, "prompts_per_step": 4, "dtype": "float64", "token_budget": 40, "validation": data, "evaluate_every": 2}
    train(small_run(method, small_model, tmp_path / "b", **again))
    one, other = ([row["loss"] for row in lines(tmp_path / name) if "loss" in row] for name in "ab")
    assert one == pytest.approx(other, abs=1e-9)
    assert any("validation/loss" in row for row in lines(tmp_path / "b"))


def desk(folder: Path) -> Desk:
    model, tokenizer = load(folder)
    renderer = Renderer(tokenizer, generation_config=getattr(model.module, "generation_config", None))
    return Desk(renderer)


def test_a_ranking_stands_best_first_in_one_group(small_model: Path) -> None:
    here, rows = desk(small_model), rankings(2)
    samples = here.rankings(rows)
    assert [sample.group for sample in samples] == ["0/0"] * 3 + ["0/1"] * 4
    texts = [here.renderer.decode(sample.completion[:-1]) for sample in samples]
    assert texts == ["It is 1.", "Well.", "No idea.", "It is 11. Really.", "Well.", "No idea.", "Perhaps it is 7."]
    assert [sample.index for sample in samples] == list(range(7))
    assert units(pack(samples), "group") == [[0, 1, 2], [3, 4, 5, 6]]


@pytest.mark.parametrize("method", [BradleyTerry(), DPO()])
def test_a_method_of_pairs_takes_every_pair_of_a_ranking(method, small_model: Path, tmp_path: Path) -> None:
    here, rows = desk(small_model), rankings(2)
    samples = here.pairs(rows)
    assert len(samples) == 2 * (3 + 6)
    texts = [here.renderer.decode(sample.completion[:-1]) for sample in samples[:6]]
    assert texts == ["It is 1.", "Well.", "It is 1.", "No idea.", "Well.", "No idea."]
    assert {sample.group for sample in samples[:6]} == {"0/0"}
    train(small_run(method, small_model, tmp_path / "run", data=rankings()))
    assert len(lines(tmp_path / "run")) == 4


def test_answers_that_a_policy_wrote_can_be_judged(small_model: Path, tmp_path: Path) -> None:
    here = desk(small_model)
    made = here.replay(demonstrations(6))
    rows = [{"id": s.query, "sample": sample_to_json(s.with_(info={}, columns={})), "label": i / 5} for i, s in enumerate(made)]
    read_back = load_rows(jsonl(tmp_path / "samples.jsonl", rows))
    samples = OutcomeReward().experience(here, read_back, None)
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in made]
    assert [sample.columns["label"] for sample in samples] == [i / 5 for i in range(6)]
    train(small_run(OutcomeReward(), small_model, tmp_path / "run", data=read_back))
    assert all("accuracy" in row for row in lines(tmp_path / "run"))


def test_a_process_reward_model_tells_right_steps_from_wrong_ones(small_model: Path, tmp_path: Path) -> None:
    """Steps that say a wrong sum are told from right ones at their own last token, not from what stands behind."""
    rows = [
        {"prompt": user("Go."), "steps": ["Up is good.", f"{word} is good.", "Now we end."], "labels": [1, int(word == "Up"), 1]}
        for word in ("Up", "Down")
    ] * 4
    train(small_run(ProcessReward(), small_model, tmp_path / "run", data=rows, steps=40, prompts_per_step=8))
    here = desk(tmp_path / "run" / "model")
    model, _ = load(tmp_path / "run" / "model")
    samples = here.steps(rows[:2])
    up, down = step_scores(model, samples, [[t for t, end in enumerate(s.columns["step_end"]) if end] for s in samples])
    assert min(up) > 0.8
    assert down[0] > 0.8 > 0.2 > down[1]
