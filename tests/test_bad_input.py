"""What goes in badly comes out as one clear error before step 1, or as a marked sample: nothing is lost or cut in silence."""

from __future__ import annotations

import errno
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CONTEXT, PARITY, Reward, assistant, demonstrations, jsonl, lines, one, parity, same, small_run, user, weights
from typer.testing import CliRunner

from posttrain import files
from posttrain.cli import app
from posttrain.errors import CheckpointError, ConfigError, DataError, MissingExtraError, PosttrainError, RewardError, TemplateError
from posttrain.method import Optimizer
from posttrain.methods import DPO, GRPO, SFT
from posttrain.models.lora import Lora
from posttrain.recipe import load_recipe
from posttrain.rewards import load_reward
from posttrain.run import Run, train
from posttrain.session import Session
from posttrain.state import load_state


@pytest.fixture
def refused(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail before step 1, and gives the error's text."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the run came to step 1")

    monkeypatch.setattr(Session, "experience", never)

    def call(*arguments: str, kind: type[PosttrainError] = PosttrainError) -> str:
        command = [*arguments, "-m", str(small_model), "-o", str(tmp_path / "out"), "-q"]
        with pytest.raises(kind) as error:
            CliRunner().invoke(app, command, catch_exceptions=False)
        assert not (tmp_path / "out" / "model").exists()
        return str(error.value)

    return call


# --------------------------------------------------------------------------------------------------------------
# Data.


def test_missing_file_names_the_nearest(refused: Callable[..., str], tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", demonstrations())
    text = refused("train", "sft", "-d", str(tmp_path / "row.jsonl"), kind=ConfigError)
    assert "row.jsonl" in text
    assert "'rows.jsonl'" in text


def test_empty_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    assert "rows.jsonl is empty" in refused("train", "sft", "-d", str(tmp_path / "rows.jsonl"), kind=DataError)


def test_no_rows(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        train(small_run(SFT(), small_model, tmp_path / "run", data=[]))
    with pytest.raises(ConfigError, match="no set of rows"):
        small_run(SFT(), small_model, tmp_path / "run", data={})


def test_a_line_that_is_not_json_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", demonstrations(3))
    path.write_text(path.read_text() + '{"prompt": "a", "completion": \n')
    assert "rows.jsonl:4" in refused("train", "sft", "-d", str(path), kind=DataError)


def test_missing_column_names_the_nearest(refused: Callable[..., str], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "What?", "completoin": "That."}])
    text = refused("train", "sft", "-d", str(path), kind=DataError)
    assert "completion" in text
    assert "completoin" in text
    text = refused("train", "dpo", "-d", str(jsonl(path, demonstrations(2))), kind=DataError)
    assert "chosen" in text
    text = refused("train", "sft", "-d", str(path), "--map", "completion=answr", kind=ConfigError)
    assert "'answer'" in text


def test_empty_completion_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    rows = [*demonstrations(2), {"prompt": "What?", "completion": "  "}]
    text = refused("train", "sft", "-d", str(jsonl(tmp_path / "rows.jsonl", rows)), kind=DataError)
    assert "rows.jsonl:3" in text
    assert "empty" in text


def test_row_longer_than_the_context_is_refused_not_cut(refused: Callable[..., str], tmp_path: Path) -> None:
    rows = [*demonstrations(2), {"id": "endless", "prompt": "why? " * CONTEXT, "completion": "So."}]
    text = refused("train", "sft", "-d", str(jsonl(tmp_path / "rows.jsonl", rows)), kind=DataError)
    assert f"1 of 3 rows do not fit {CONTEXT} tokens" in text
    assert "endless" in text


def test_prompt_that_leaves_no_room_for_an_answer(refused: Callable[..., str], tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def fine(answer):\n    return 1.0\n")
    path = jsonl(tmp_path / "rows.jsonl", demonstrations(2))
    text = refused("train", "grpo", "max_tokens=120", "-d", str(path), "-r", f"{reward}:fine", kind=DataError)
    assert f"do not fit {CONTEXT - 120} tokens" in text


def test_the_smaller_of_max_length_and_context_limits(refused: Callable[..., str], tmp_path: Path) -> None:
    """And the advice is about the one that does."""
    rows = [*demonstrations(2), {"id": "endless", "prompt": "why? " * CONTEXT, "completion": "So."}]
    path = str(jsonl(tmp_path / "rows.jsonl", rows))
    for given in ((), (f"max_length={CONTEXT}",), (f"max_length={100 * CONTEXT}",)):
        text = refused("train", "sft", *given, "-d", path, kind=DataError)
        assert f"1 of 3 rows do not fit {CONTEXT} tokens" in text
        assert "take a model with a longer context" in text
        assert "raise max_length" not in text
    text = refused("train", "sft", f"max_length={CONTEXT // 2}", "-d", path, kind=DataError)
    assert f"do not fit {CONTEXT // 2} tokens" in text
    assert "raise max_length" in text


# --------------------------------------------------------------------------------------------------------------
# Templates.


def with_template(model: Path, folder: Path, template: str | None) -> Path:
    """The model with another chat template, or none."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_model_without_a_chat_template(small_model: Path, tmp_path: Path) -> None:
    """Chats cannot be written for it; plain prompts and completions can."""
    model = with_template(small_model, tmp_path / "model", None)
    chats = [{"messages": [*user("What?"), *assistant("That."), *user("Why?"), *assistant("So.")]}] * 2
    with pytest.raises(TemplateError, match="chat template"):
        train(small_run(SFT(), model, tmp_path / "run", data=chats))


def test_template_that_writes_no_stop_token(small_model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    model = with_template(small_model, tmp_path / "model", template)
    with pytest.raises(TemplateError, match="stop token is not trained"):
        train(small_run(SFT(), model, tmp_path / "run"))


# --------------------------------------------------------------------------------------------------------------
# Options.


def test_unknown_options_name_the_nearest(refused: Callable[..., str], tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", demonstrations(2)))
    assert "'steps'" in refused("train", "sft", "stpes=3", "-d", path, kind=ConfigError)
    assert "'lr'" in refused("train", "sft", "optimizer.l=3", "-d", path, kind=ConfigError)
    assert "'grpo'" in refused("train", "grpoo", "-d", path, kind=ConfigError)
    assert "'word-problems'" in refused("train", "sft", "-t", "word-problem", kind=ConfigError)


def test_unknown_recipe_keys_name_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: x\nstages:\n- {name: a, train: sft, data: {fil: rows.jsonl}}\n")
    with pytest.raises(ConfigError, match=r"stages.0.*fil.*nearest: 'file'"):
        load_recipe(recipe)


def test_impossible_combinations(small_model: Path, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            small_run(changes.pop("method", GRPO()), small_model, tmp_path / "run", **changes)

    refused("samples_per_prompt is 1, expected at least 2", samples_per_prompt=1)
    refused("the run has none", rewards=())
    refused("rewards have no effect", method=SFT(), rewards=(PARITY,))
    refused("steps is 0", method=SFT(), steps=0)
    refused("nothing to evaluate", method=SFT(), evaluate_every=2)
    with pytest.raises(ConfigError, match="clip_low"):
        GRPO(clip_low=-0.1)


def test_models_that_nothing_reads(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not read"):
        train(small_run(SFT(), small_model, tmp_path / "run", models={"referense": small_model}))


def test_extra_that_is_not_installed(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'posttrain\[peft\]'"):
        train(small_run(SFT(), small_model, tmp_path / "run", lora=Lora()))


# --------------------------------------------------------------------------------------------------------------
# Rewards.

FAULTY = '''
import sys, time

def bad(answer):
    return answer.info["hard"] and answer.index % 2 == 0

def score(answer):
    return float(sum(answer.text.encode()) % 2)

def raises(answer):
    if bad(answer):
        raise ValueError("poison")
    return score(answer)

def hangs(answer):
    if bad(answer):
        time.sleep(600)
    return score(answer)

def nan(answer):
    return float("nan") if bad(answer) else score(answer)

def prints(answer):
    sys.stdout.write("x" * 2_000_000)
    print("{}")
    return score(answer)

def always_raises(answer):
    raise ValueError("poison")
'''


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[..., Reward]:
    """A reward of a file, by its name."""
    path = tmp_path / "faulty.py"
    path.write_text(FAULTY)
    return lambda name, **fields: load_reward(f"{path}:{name}", **fields)


@pytest.mark.filterwarnings("ignore:reward 'hangs'")
@pytest.mark.parametrize(("name", "verdict"), [("raises", "infraerror"), ("nan", "infraerror"), ("hangs", "timeout")])
def test_failed_rewards_mask_their_sample_alone(
    name: str, verdict: str, faulty: Callable[..., Reward], small_model: Path, tmp_path: Path
) -> None:
    """Of each hard prompt's 4 answers 2 cannot be judged; the run goes on with the others."""
    changes: dict[str, Any] = {"steps": 2, "samples_per_prompt": 4, "max_failure_rate": 0.9}
    if name == "hangs":
        changes |= {"steps": 1, "data": demonstrations(2), "samples_per_prompt": 2}
    reward = faulty(name, deadline=0.5 if name == "hangs" else 30.0)
    train(small_run(GRPO(), small_model, tmp_path / "run", rewards=(reward,), **changes))
    steps = lines(tmp_path / "run")
    assert len(steps) == changes["steps"]
    shares = [step["reward_failures"] for step in steps]
    assert 0 < sum(shares) / len(shares) <= 0.5
    kinds = {sample["verdicts"][name]["verdict"] for sample in lines(tmp_path / "run", "samples.jsonl")}
    assert kinds == {"score", verdict}
    assert all(bool(torch.isfinite(w).all()) for w in weights(tmp_path / "run/model").values())


def test_rewards_that_fail_too_often_stop_the_run(faulty: Callable[..., Reward], small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="poison"):
        train(small_run(GRPO(), small_model, tmp_path / "run", rewards=(faulty("always_raises"),)))


def test_a_reward_that_prints_is_read_all_the_same(faulty: Callable[..., Reward], small_model: Path, tmp_path: Path) -> None:
    run = small_run(GRPO(), small_model, tmp_path / "run", rewards=(faulty("prints"),), steps=1)
    train(run)
    inline = small_run(GRPO(), small_model, tmp_path / "inline", rewards=(PARITY,), steps=1)
    train(inline)
    assert same(weights(tmp_path / "run/model"), weights(tmp_path / "inline/model"))


def test_equal_rewards_say_so_and_change_nothing(
    small_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even through the KL term, weight decay or moments: no group says which answer is better."""
    reward = Reward("one", one, where="inline")
    decayed = Optimizer(lr=1e-2, weight_decay=0.1)
    train(small_run(GRPO(), small_model, tmp_path / "run", rewards=(reward,), optimizer=decayed, steps=5, quiet=False, show=0))
    assert same(weights(tmp_path / "run/model"), weights(small_model))
    assert {step["signal"] for step in lines(tmp_path / "run")} == {0.0}
    assert "No signal" in "".join(capfd.readouterr())


def test_every_reward_failed_changes_nothing(faulty: Callable[..., Reward], small_model: Path, tmp_path: Path) -> None:
    run = small_run(GRPO(), small_model, tmp_path / "run", rewards=(faulty("always_raises"),), max_failure_rate=1.0, steps=2)
    train(run)
    assert same(weights(tmp_path / "run/model"), weights(small_model))
    assert [step["reward_failures"] for step in lines(tmp_path / "run")] == [1.0, 1.0]
    assert "poison" in str(lines(tmp_path / "run", "samples.jsonl")[0]["verdicts"])


# --------------------------------------------------------------------------------------------------------------
# Disks and folders.


def test_a_full_disk_stops_the_run_and_leaves_the_older_save(small_model: Path, tmp_path: Path) -> None:
    run = small_run(SFT(), small_model, tmp_path / "run/stage", save_every=1)

    def full(operation: files.Operation) -> None:
        if operation.kind == "write" and "step-00000003" in str(operation.path):
            raise OSError(errno.ENOSPC, "No space left on device", str(operation.path))

    with files.watched(full), pytest.raises(CheckpointError, match=r"step 3 could not be saved.*disk is full"):
        train(run)
    saved = load_state(tmp_path / "run/stage/state")
    assert saved is not None
    assert saved.step == 2
    train(run)  # with room again
    train(small_run(SFT(), small_model, tmp_path / "other/stage", save_every=1))
    assert same(weights(tmp_path / "run/stage/model"), weights(tmp_path / "other/stage/model"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"method": DPO(), "data": None}, "method was"),
        ({"optimizer": Optimizer(lr=1e-3)}, "optimizer was"),
        ({"data": demonstrations(7)}, "rows was"),
        ({"data": [{**row, "completion": assistant("Other.")} for row in demonstrations()]}, "rows was"),
    ],
)
def test_saves_of_other_settings_are_refused(changes: dict[str, Any], named: str, small_model: Path, tmp_path: Path) -> None:
    train(small_run(SFT(), small_model, tmp_path / "run", steps=2))
    before = weights(tmp_path / "run/model")
    method = changes.get("method", SFT())
    rest = {key: value for key, value in changes.items() if key != "method" and value is not None}
    with pytest.raises(CheckpointError, match=named):
        train(small_run(method, small_model, tmp_path / "run", **{"steps": 2, **rest}))
    assert same(weights(tmp_path / "run/model"), before)


def test_saves_of_another_model_are_refused(small_model: Path, tmp_path: Path) -> None:
    train(small_run(SFT(), small_model, tmp_path / "run", steps=1))
    other = shutil.copytree(small_model, tmp_path / "other")
    with pytest.raises(CheckpointError, match="model was"):
        train(small_run(SFT(), other, tmp_path / "run", steps=1))


def test_settings_that_do_not_touch_the_weights_may_change(small_model: Path, tmp_path: Path) -> None:
    run: Run = small_run(SFT(), small_model, tmp_path / "run", steps=2)
    train(run)
    train(small_run(SFT(), small_model, tmp_path / "run", steps=2, save_every=7, show=1))


def test_parity_is_not_constant() -> None:
    """The reward of these tests does tell answers apart."""
    from posttrain.rewards import Answer

    found = [parity(Answer(text=text)) for text in ("a", "b")]
    assert math.fsum(found) == 1
