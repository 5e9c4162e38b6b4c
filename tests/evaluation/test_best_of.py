"""Choosing among several answers: the arithmetic by hand, and the whole evaluation with reward models of outcomes and of steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.evaluation.best_of import BestOf, Question, _choices
from posttrain.evaluation.step_labels import StepLabelled, auc, first_wrong
from posttrain.models.load import load, save
from posttrain.synthesis.maker import Workshop
from posttrain.synthesis.step_labels import StepLabels, lines
from posttrain.tasks import task
from posttrain.types import Sampling


def test_choices_by_hand() -> None:
    question = Question("q", [False, True, True, False], ["5", "7", "7", ""], {"rm": [0.9, 0.8, 0.1, 0.95]})
    found = {name: values[0] for name, values in _choices([question], 4, ["rm"]).items()}
    assert found == {"any": 1.0, "majority": 1.0, "best rm": 0.0, "vote rm": 0.0}  # 0.9 for 5 against 0.8 + 0.1 for 7: the first
    pairs = {name: values[0] for name, values in _choices([question], 2, ["rm"]).items()}
    assert pairs["any"] == pytest.approx(1 - 1 / 6)
    assert pairs["majority"] == 0.5  # blocks (5, 7) -> 5, the first; (7, "") -> 7
    assert pairs["best rm"] == pytest.approx((0 * 3 + 0 * 2 + 1 * 1) / 6)  # sorted: "", 5, 7, 7


def test_auc_and_first_errors() -> None:
    assert auc([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]) == 1.0
    assert auc([0.5, 0.5], [0, 1]) == 0.5
    assert first_wrong([1, 1, 0, 1]) == 2
    assert first_wrong([1, 1]) == -1


def test_steps_of_lines() -> None:
    assert lines("a\nb") == [2, 3]
    assert lines("") == []


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a reward head: it writes sentences that can be cut."""
    model, tokenizer = load("tiny")
    model.add_reward_head(seed=1)
    return save(model, tokenizer, tmp_path_factory.mktemp("rm") / "rm")


def test_labels_by_checker_and_by_rollouts_and_what_reads_them(stage: Path, tmp_path: Path) -> None:
    words = task("word-problems", level="easy")
    rows = words.rows("demonstrations", 3)
    written = [{"id": row["id"], **row} for row in rows]
    shop = Workshop(
        {"data": _as_samples(written, stage)},
        {"start": stage},
        tmp_path,
        sampling=Sampling(max_tokens=12),
        rewards=words.rewards,
        values=words.values,
        quiet=True,
    )
    checked = StepLabels().make(shop)
    assert checked.metrics["right_answers"] == checked.metrics["right_steps"] == 1.0
    marks = [[mark for mark in row["columns"]["step_label"] if mark is not None] for row in checked.rows]
    assert [len(each) for each in marks] == [row["steps"] + 1 for row in rows]
    soft = StepLabels(labels="soft", completions=2).make(shop)
    again = [[mark for mark in row["columns"]["step_label"] if mark is not None] for row in soft.rows]
    assert [each[-1] for each in again] == [1.0] * 3  # the last step's label is the answer's
    assert all(mark in (0.0, 0.5, 1.0) for each in again for mark in each)
    wrong = [
        {**row, "columns": {"step_label": [0.0 if m == 1.0 else m for m in row["columns"]["step_label"]]}} for row in checked.rows
    ]
    shop.sets = {"data": [*checked.rows, *wrong]}
    outcome = StepLabelled(resamples=20).examine(shop, model_name="prm")
    found = {number["metric"]: number["value"] for number in outcome.numbers}
    assert found["auc"] == 0.5  # the same answers with either label
    with pytest.raises(DataError, match="no steps with labels"):
        StepLabelled().examine(Workshop({"data": rows}, {"start": stage}, tmp_path), model_name="prm")


def _as_samples(rows: list[dict[str, object]], stage: Path) -> list[dict[str, object]]:
    """Demonstrations as if a policy had written them."""
    from posttrain.data.chat import renderer_of
    from posttrain.records import sample_to_json
    from posttrain.types import Origin

    renderer = renderer_of(*load(stage))
    made = []
    for number, row in enumerate(rows):
        sample = renderer.demonstrations(row)[0]
        origin = [int(Origin.POLICY) if o == Origin.DEMONSTRATION else o for o in sample.origin]
        info = {"answer": row["answer"], "prompt": row["prompt"]}
        sample = sample.with_(origin=origin, query=str(row["id"]), group=str(number), index=number, info=info)
        made.append({"id": row["id"], "sample": sample_to_json(sample)})
    return made


def test_best_of_with_models_of_outcomes_and_of_steps(stage: Path, tmp_path: Path) -> None:
    words = task("word-problems", level="easy")
    shop = Workshop(
        {"data": words.rows("test", 3)},
        {"start": stage, "orm": stage, "prm": stage},
        tmp_path,
        samples=4,
        sampling=Sampling(max_tokens=20),
        rewards=words.rewards,
        quiet=True,
    )
    outcome = BestOf(process=("prm",), sizes=(1, 2, 4, 8)).examine(shop, model_name="generator")
    metrics = {number["metric"] for number in outcome.numbers}
    assert {"mean@1", "maj@4", "pass@4", "best orm@4", "vote orm@4", "best prm product@4", "best prm min@4"} <= metrics
    assert len(outcome.records) == 3
    assert len(outcome.records[0]["right"]) == 4
    assert [point[0] for point in outcome.curves[0]["lines"]["majority"]] == [1, 2, 4]
    with pytest.raises(ConfigError, match="split is 'words'"):
        BestOf(split="words")
