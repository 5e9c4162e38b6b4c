"""`posttrain bench` runs whole in its quick form, and its arithmetic is right.  What it measures is not tested here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from posttrain.bench import PARTS, Setting, bench, gpu
from posttrain.bench.measure import Seconds, busy, clocked, paired
from posttrain.bench.setting import has_trl
from posttrain.cli import app
from posttrain.errors import ConfigError
from posttrain.models import torch_compile
from posttrain.models.random import random_model

QUICK = Setting(quick=True, rounds=1)
KEYS = {
    "sft": {"sft_fp32", "sft_bf16_3m", "sft_bf16_135m"},
    "dpo": {"dpo_fp32", "dpo_bf16"},
    "grpo": {"grpo_short", "grpo_shared"},
    "decode": {"decode_3m_bf16", "decode_3m_bf16_b64", "decode_3m_fp32", "decode_135m_bf16", "continuous_3m_bf16"},
    "rollout": {"rollout_ragged"},
    "overhead": {"overhead_sft", "overhead_dpo", "overhead_grpo"},
    "memory": {"logits_mb", "logits_time"},
    "numbers": {"real_tokens", "logprob_gap"},
}


@pytest.mark.parametrize("part", KEYS)
def test_every_part_runs(part: str, tmp_path: Path) -> None:
    told: list[str] = []
    rows = bench(QUICK, parts=[part], json_file=tmp_path / "rows.json", tell=told.append)
    assert {row.key for row in rows} >= KEYS[part]
    assert all(row.ours > 0 for row in rows)
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["machine"]["quick"] is True
    assert [row["key"] for row in saved["rows"]] == [row.key for row in rows]
    assert {"key", "what", "ratio", "low", "high", "unit", "ours", "peer", "peer_name"} <= saved["rows"][0].keys()
    assert len(told) == len(rows) + 2
    for row in rows:
        assert (row.ratio is None) == (row.peer is None), row
        assert row.peer is not None or not has_trl() or row.unit == "nats"


def test_the_rows_of_a_gpu_are_rehearsed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile, "BACKEND", "aot_eager")
    rows = list(gpu.rows(Setting(quick=True, rounds=1, model="tiny")))
    sft = [f"gpu_sft_135m{kind}{how}" for kind in ("", "_ragged") for how in ("", "_compiled")]
    assert [row.key for row in rows] == [*sft, "gpu_grpo_135m", "gpu_rollout_135m"]
    assert [row.peer_name for row in rows[1:4:2]] == ["compile=false"] * 2


def test_what_an_accelerator_did_is_that_of_the_clocked_part(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profile:
        def __init__(self, activities: Any) -> None:
            self.told = SimpleNamespace(self_device_time_total=2e6)

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def key_averages(self) -> list[Any]:
            return [self.told, self.told]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert busy(lambda: clocked(lambda: 1.0)) == 4.0
    monkeypatch.setattr(torch.profiler, "profile", None)
    assert clocked(lambda: 3.0).amount == 3.0


def test_operations_of_a_token() -> None:
    model = random_model("llama", tie_word_embeddings=False)
    inputs = model.vocab_size * model.hidden_size
    expected = 6 * (model.num_parameters - inputs) + 6 * model.num_layers * model.hidden_size * 100
    assert gpu.flop_per_token(model, 100) == expected


def test_parts_and_keys_of_this_test_are_all() -> None:
    assert set(PARTS) == {*KEYS, "gpu"}


def test_ratios_are_of_rates_and_medians() -> None:
    costs = iter([9, 1, 2, 3])
    ours = lambda: Seconds(next(costs), 1.0, 10.0)  # noqa: E731
    peer = lambda: Seconds(6.0, 2.0, 20.0)  # noqa: E731
    row = paired("k", "w", ours, peer, rounds=3, peer_name="p", unit="tokens/CPU s", same=False, goal=2.0)
    assert (row.low, row.ratio, row.high) == pytest.approx((1.0, 1.5, 3.0))
    assert row.ours == pytest.approx(5.0)
    assert row.peer == pytest.approx(20 / 6)
    assert row.wall == pytest.approx(1.0)
    alone = paired("k", "w", lambda: Seconds(2.0, 1.0, 4.0), None, rounds=1, peer_name="p", unit="CPU ms/step")
    assert (alone.ratio, alone.peer, alone.peer_name, alone.ours) == (None, None, None, 500.0)


def test_unfair_comparisons_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not be fair"):
        paired("k", "w", lambda: Seconds(1, 1, 1), lambda: Seconds(1, 1, 2), rounds=1, peer_name="p", unit="tokens/s")


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 5"):
        bench(Setting(rounds=2))
    with pytest.raises(ConfigError, match="there is no part 'sfd'"):
        bench(QUICK, parts=["sfd"])


def test_the_command(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    told = CliRunner().invoke(app, ["bench", "--quick", "--rounds", "1", "--only", "numbers", "--json", str(tmp_path / "b.json")])
    torch.set_num_threads(threads)
    assert told.exit_code == 0, told.output
    assert "real_tokens" in told.output
    assert (tmp_path / "b.json").exists()
