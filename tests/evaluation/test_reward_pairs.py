"""How far a reward model is trusted: pairs of rankings, calibration, ranks, and the whole evaluation on a model that is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from small import rankings

from posttrain.errors import ConfigError, DataError
from posttrain.evaluation.reward_pairs import RewardPairs, calibration, pairs_of, ranks, spearman
from posttrain.models.load import load, save
from posttrain.synthesis.maker import Workshop


def test_pairs_of_a_ranking_by_hand() -> None:
    pairs = pairs_of("q", [[3.0, 1.0, 2.0], [0.0, 1.0, 1.0]], [5, 5, 7], [1.0, 0.0, 0.0])
    assert [pair.gap for pair in pairs] == [2.0, 1.0, -1.0]
    assert [pair.longer for pair in pairs] == [0, -2, -2]
    assert [pair.gold for pair in pairs] == [1.0, 1.0, 0.0]
    assert [pair.others for pair in pairs] == [(-1.0,), (-1.0,), (0.0,)]
    assert math.isnan(pairs_of("q", [[1.0, 0.0]], [1, 2], None)[0].gold)


def test_calibration_by_hand() -> None:
    logit = math.log(0.8 / 0.2)
    points, error = calibration([logit] * 4 + [-logit], bins=1)
    assert points == [[pytest.approx(0.8), pytest.approx(0.8)]]
    assert error == pytest.approx(0.0)
    points, error = calibration([logit, -logit, 0.1, -0.1], bins=2)
    assert [right for _, right in points] == [0.5, 0.5]
    assert error == pytest.approx((0.5 * (1 / (1 + math.exp(-0.1)) - 0.5)) + 0.5 * 0.3)
    with pytest.raises(ConfigError, match="bins is 0"):
        calibration([1.0], bins=0)


def test_a_tie_is_never_right() -> None:
    assert calibration([0.0, 0.0], bins=1)[0] == [[0.5, 0.0]]


def test_ranks_share_ties() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1.0)
    assert math.isnan(spearman([(1, 5), (2, 5)]))
    assert math.isnan(spearman([(1, 5)]))


@pytest.fixture
def reward_model(small_model: Path, tmp_path: Path) -> Path:
    """The small model with a reward head of random weights."""
    model, tokenizer = load(small_model)
    model.add_reward_head(seed=3)
    return save(model, tokenizer, tmp_path / "rm")


def test_the_whole_evaluation(reward_model: Path, small_model: Path, tmp_path: Path) -> None:
    rows = [{**row, "scores": [float(i) for i in range(len(row["responses"]))]} for row in rankings(12)]
    shop = Workshop({"data": rows}, {"start": reward_model, "other": reward_model}, tmp_path, quiet=True)
    outcome = RewardPairs(least=1).examine(shop, model_name="rm")
    found = {number["metric"]: number for number in outcome.numbers}
    pairs = sum(math.comb(len(row["responses"]), 2) for row in rows)
    assert found["pair_accuracy"]["n"] == pairs == len(outcome.records)
    share = sum(record["gap"] > 0 for record in outcome.records) / pairs
    assert found["pair_accuracy"]["value"] == pytest.approx(share)
    assert found["disagreement"]["value"] == 0.0  # the other model is the same
    longer = sum((record["longer"] > 0) + 0.5 * (record["longer"] == 0) for record in outcome.records) / pairs
    assert found["prefers_longer"]["value"] == pytest.approx(longer)
    assert -1 <= found["length_correlation"]["value"] <= 1
    assert outcome.curves[0]["lines"]["rm"]
    with pytest.raises(ConfigError, match="no reward head"):
        RewardPairs().examine(Workshop({"data": rows}, {"start": small_model}, tmp_path), model_name="base")
    with pytest.raises(DataError, match="row 0 is no comparison"):
        RewardPairs().examine(Workshop({"data": [{"prompt": "x"}]}, {"start": reward_model}, tmp_path), model_name="rm")
