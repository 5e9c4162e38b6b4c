"""Two ranks compute what one computes: whole runs of SFT, DPO and GRPO, the native sampler and rewards included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from small import lines, weights

from posttrain.distributed.world import World
from posttrain.run import train
from posttrain.state import load_state

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_ranks(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes made the runs of `ranks.py`."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(HERE / "ranks.py"), str(small_model), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize(("name", "steps"), [("sft", 20), ("dpo", 6), ("dpo-few", 2), ("grpo", 4)])
def test_losses_and_weights_are_those_of_one_rank(
    name: str, steps: int, two_ranks: Path, small_model: Path, tmp_path: Path
) -> None:
    train(ranks.runs(small_model, tmp_path)[name])
    one, two = lines(tmp_path / name), lines(two_ranks / name)
    assert len(one) == len(two) == steps
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for key in alone.keys() - {"stage", "reward_counts"}:
            assert together[key] == pytest.approx(alone[key], abs=1e-6), f"{key} at step {alone['step']}"
        assert alone.get("reward_counts") == together.get("reward_counts")
    assert len({round(row["loss"], 9) for row in one}) > 1, "the loss never moved"
    expected = weights(tmp_path / name / "model")
    for key, tensor in weights(two_ranks / name / "model").items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-7, rtol=0)


def test_a_save_of_two_ranks_goes_on_with_one(two_ranks: Path, small_model: Path, tmp_path: Path) -> None:
    saved = load_state(two_ranks / "stopped" / "state")
    assert saved is not None
    assert saved.step == 2
    train(ranks.runs(small_model, two_ranks)["stopped"])
    train(ranks.runs(small_model, tmp_path)["stopped"])
    one, two = lines(tmp_path / "stopped"), lines(two_ranks / "stopped")
    assert [row["step"] for row in two] == list(range(5))
    for alone, together in zip(one, two, strict=True):
        assert together["reward"] == alone["reward"]
        assert together.get("loss", 0.0) == pytest.approx(alone.get("loss", 0.0), abs=1e-6)


def test_a_pipeline_of_two_ranks_writes_each_artifact_once(two_ranks: Path, small_model: Path, tmp_path: Path) -> None:
    ranks.pipeline(small_model, tmp_path / "pipeline", World())
    one, two = tmp_path / "pipeline", two_ranks / "pipeline"
    numbers = [json.loads((out / "summary.json").read_text())["evaluations"] for out in (one, two)]
    assert numbers[0] == numbers[1]
    assert {number["model"] for number in numbers[1]} == {"base", "imitate"}
    texts = [(out / "write/rows/rows.jsonl").read_text() for out in (one, two)]
    rows = [[json.loads(line)["sample"] for line in text.splitlines()] for text in texts]
    assert len(rows[0]) == 6
    for alone, together in zip(*rows, strict=True):
        assert together["tokens"] == alone["tokens"]
        assert together["index"] == alone["index"]
    expected = weights(one / "imitate/model")
    for key, tensor in weights(two / "imitate/model").items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-7, rtol=0)
