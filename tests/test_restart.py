"""Killed at any moment and started again, a run ends as if nothing had happened: weights, moments, memory and metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small import UNLESS_HARD, demonstrations, jsonl, lines, same, small_run, weights

from posttrain.errors import CheckpointError
from posttrain.lock import run_lock
from posttrain.method import Method
from posttrain.methods import DPO, GRPO, PPO, SASR, SFT, PlackettLuce, ProcessReward, ReLIFT
from posttrain.run import Result, train
from posttrain.session import Session
from posttrain.state import load_state

METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "sft": (SFT(), {}),
    "dpo": (DPO(), {}),
    "grpo": (GRPO(), {"updates": 2, "minibatches": 2}),
    "ppo": (PPO(target_kl=0.1, horizon=16), {}),
    "relift": (
        ReLIFT(buffer_size=2, max_tokens=8, study_lr=1e-2),
        {"rewards": (UNLESS_HARD,), "steps": 5, "samples_per_prompt": 2},
    ),
    "plackett_luce": (PlackettLuce(), {}),
    "process_reward": (ProcessReward(), {}),
    "sasr": (SASR(warmup=2, warmup_norms=2), {"steps": 6}),
}


class Stopped(Exception):
    """The lights went out."""


def train_until(step: int, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and stop in the middle of step `step`: its samples are drawn, its update is not made."""
    real = Session.score

    def score(session: Session, work: Any, phases: Any) -> Any:
        if session.step == step:
            raise Stopped
        return real(session, work, phases)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "score", score)
        with pytest.raises(Stopped):
            train(run)


def everything(out: Path) -> dict[str, Any]:
    """Weights, moments and memory of the last save."""
    saved = load_state(out / "state")
    assert saved is not None
    return dict(saved.tensors)


def assert_same(undisturbed: Path, other: Path) -> None:
    assert same(weights(undisturbed / "model"), weights(other / "model"))
    assert same(everything(undisturbed), everything(other))
    assert lines(undisturbed) == lines(other)
    if (undisturbed / "samples.jsonl").exists():
        assert lines(undisturbed, "samples.jsonl") == lines(other, "samples.jsonl")


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_equals_undisturbed(
    name: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, changes = METHODS[name]
    runs = {out: small_run(method, small_model, tmp_path / out, **changes) for out in ("a/stage", "b/stage")}
    train(runs["a/stage"])
    train_until(3, runs["b/stage"], monkeypatch)
    assert not (tmp_path / "b/stage/model").exists()
    result = train(runs["b/stage"])
    assert result.steps == runs["a/stage"].steps
    assert_same(tmp_path / "a/stage", tmp_path / "b/stage")
    assert not same(weights(tmp_path / "a/stage/model"), weights(small_model)), "nothing was learnt"


def test_hybrids_have_a_memory_worth_keeping(small_model: Path, tmp_path: Path) -> None:
    """What the runs above carry over is not empty: a buffer that filled, a norm that was measured."""
    for name, key in (("relift", "buffer"), ("sasr", "warm")):
        method, changes = METHODS[name]
        train(small_run(method, small_model, tmp_path / name, **changes))
        saved = load_state(tmp_path / name / "state")
        assert saved is not None
        memory = saved.values["memory"]
        assert isinstance(memory, dict)
        assert key in memory
        for part in ("rl/", "sft/"):
            assert any(k.startswith(part) for row in lines(tmp_path / name) for k in row), f"{name} never took {part}"


def test_stopped_before_the_first_save_starts_over(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {out: small_run(SFT(), small_model, tmp_path / out / "stage") for out in "ab"}
    train(runs["a"])
    train_until(1, runs["b"], monkeypatch)
    assert len(lines(tmp_path / "b/stage")) == 1
    train(runs["b"])
    assert_same(tmp_path / "a/stage", tmp_path / "b/stage")


def test_stopped_twice(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {out: small_run(GRPO(), small_model, tmp_path / out / "stage", save_every=1) for out in "ab"}
    train(runs["a"])
    train_until(1, runs["b"], monkeypatch)
    train_until(3, runs["b"], monkeypatch)
    train(runs["b"])
    assert_same(tmp_path / "a/stage", tmp_path / "b/stage")


def test_a_finished_run_does_nothing_when_run_again(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(GRPO(), small_model, tmp_path / "run")
    first = train(run)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/model").iterdir()}
    numbers = lines(tmp_path / "run")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run sampled again")

    monkeypatch.setattr(Session, "experience", never)
    again: Result = train(run)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run/model").iterdir()} == before
    assert lines(tmp_path / "run") == numbers
    assert (again.steps, again.metrics) == (first.steps, first.metrics)


KILLED = """
import sys
import torch
torch.set_num_threads(1)
from posttrain.cli import app
app(sys.argv[1:])
"""


def test_sigkill_in_the_middle_of_a_save(small_model: Path, tmp_path: Path) -> None:
    """The process is killed before the rename of its second save; the same command goes on from the first."""
    data = jsonl(tmp_path / "rows.jsonl", demonstrations())
    settings = ["steps=4", "prompts_per_step=2", "save_every=1", "optimizer.lr=0.01"]

    def command(out: str) -> list[str]:
        return ["train", "sft", *settings, "-m", str(small_model), "-d", str(data), "-o", str(tmp_path / out / "stage"), "-q"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POSTTRAIN_KILL_AT": "save:2:rename"}
    killed = subprocess.run([sys.executable, "-c", KILLED, *command("b")], env=environment, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    saved = load_state(tmp_path / "b/stage/state")
    assert saved is not None
    assert saved.step == 1

    from typer.testing import CliRunner

    from posttrain.cli import app

    for out in "ab":
        result = CliRunner().invoke(app, command(out), catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert_same(tmp_path / "a/stage", tmp_path / "b/stage")


HOLDS = """
import sys, time
from posttrain.lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(120)
"""


def test_a_second_process_on_the_same_folder_is_refused(small_model: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"another process.*pid {holder.pid}"):
            train(small_run(SFT(), small_model, tmp_path / "run"))
    finally:
        holder.kill()
        holder.wait()
    train(small_run(SFT(), small_model, tmp_path / "run", steps=1))


def test_the_same_folder_twice_in_one_process_is_refused(small_model: Path, tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"), pytest.raises(CheckpointError, match="already being written by this process"):
        train(small_run(SFT(), small_model, tmp_path / "run"))
