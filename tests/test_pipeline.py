"""Pipelines: stages hand artifacts on, what is done and whole is not done again, what changed is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import demonstrations, jsonl, lines, same, weights

from posttrain.errors import CheckpointError, ConfigError, DataError
from posttrain.manifest import hash_folder
from posttrain.pipeline import run_recipe
from posttrain.recipe import load_recipe, parse_recipe, shipped
from posttrain.report.summary import read_summary

SHORT: dict[str, Any] = {"steps": 2, "prompts_per_step": 2, "optimizer": {"lr": 1e-2}}


def two_stages(model: Path) -> dict[str, Any]:
    """A cold start and a little RL on the embedded task."""
    return {
        "name": "two",
        "model": str(model),
        "task": {"name": "word-problems", "level": "easy", "max_tokens": 6},
        "stages": [
            {"name": "cold-start", "train": "sft", "data": {"split": "demonstrations", "count": 4}, "run": dict(SHORT)},
            {
                "name": "rl",
                "train": "grpo",
                "start": "cold-start",
                "data": {"split": "train", "count": 4},
                "run": {**SHORT, "samples_per_prompt": 2, "sampling": {"temperature": 1.1}},
            },
        ],
        "evaluate": [{"of": ["base", "rl"], "count": 2, "samples": 2}],
    }


def make(tree: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run a recipe; its summary."""
    run_recipe(parse_recipe(tree), out, quiet=True)
    return dict(read_summary(out))


@pytest.fixture(scope="module")
def done(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two stages, run once; tests that change the folder restore it."""
    out = tmp_path_factory.mktemp("pipeline") / "two"
    make(two_stages(small_model), out)
    return out


def touched(out: Path) -> dict[str, int]:
    """When each file of the stages and evaluations was written."""
    parts = [*sorted(out.glob("*/model/*")), *sorted(out.glob("*/stage.json")), *sorted(out.glob("evaluations/*"))]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in parts}


# --------------------------------------------------------------------------------------------------------------
# What a pipeline leaves.


def test_the_summary_has_exactly_its_form(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert list(summary) == ["name", "seed", "versions", "stages", "evaluations"]
    assert (summary["name"], summary["seed"]) == ("two", 0)
    assert {"python", "torch", "transformers"} <= summary["versions"].keys()
    for stage, method in zip(summary["stages"], ("sft", "grpo"), strict=True):
        assert list(stage) == ["name", "kind", "method", "artifact", "seconds", "metrics"]
        assert (stage["kind"], stage["method"]) == ("train", method)
        assert stage["artifact"] == f"{stage['name']}/model"
        assert stage["seconds"] > 0
        assert (done / stage["artifact"] / "model.safetensors").is_file()
    assert [stage["name"] for stage in summary["stages"]] == ["cold-start", "rl"]
    for number in summary["evaluations"]:
        assert list(number) == ["model", "task", "split", "n", "metric", "value", "low", "high"]
        assert (number["split"], number["n"] <= 2) == ("test", True)
    metrics = {(number["model"], number["metric"]) for number in summary["evaluations"]}
    assert {(model, metric) for model in ("base", "rl") for metric in ("accuracy", "mean@2", "pass@2")} <= metrics


def test_the_folder_holds_what_the_module_says(done: Path) -> None:
    files = ("recipe.yaml", "report.html", "cold-start/run.json", "cold-start/metrics.jsonl", "rl/samples.jsonl")
    assert all((done / name).is_file() for name in (*files, "evaluations/rl.json", "evaluations/rl.jsonl"))
    assert len((done / "evaluations/rl.jsonl").read_text().splitlines()) == 2
    again = parse_recipe(yaml.safe_load((done / "recipe.yaml").read_text()))
    assert [stage.name for stage in again.stages] == ["cold-start", "rl"]


def test_a_stage_starts_where_the_one_before_ended(done: Path) -> None:
    settings = json.loads((done / "rl/run.json").read_text())
    assert settings["model"] == str(done / "cold-start/model")
    assert settings["sampling"]["temperature"] == 1.1
    assert settings["sampling"]["max_tokens"] == 6
    assert len(lines(done / "rl")) == 2


# --------------------------------------------------------------------------------------------------------------
# Running again.


def test_running_again_does_nothing(done: Path, small_model: Path) -> None:
    before, summary = touched(done), json.loads((done / "summary.json").read_text())
    assert make(two_stages(small_model), done) == summary
    assert touched(done) == before


def test_a_damaged_artifact_is_made_again(done: Path, small_model: Path) -> None:
    """The same bytes come out, so what was built on it stands."""
    before, hashes = touched(done), {name: hash_folder(done / name / "model") for name in ("cold-start", "rl")}
    file = done / "cold-start/model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert hash_folder(done / "cold-start/model") != hashes["cold-start"]
    make(two_stages(small_model), done)
    assert {name: hash_folder(done / name / "model") for name in hashes} == hashes
    after = touched(done)
    assert after["cold-start/model/model.safetensors"] != before["cold-start/model/model.safetensors"]
    assert after["rl/model/model.safetensors"] == before["rl/model/model.safetensors"]
    assert after["evaluations/rl.json"] == before["evaluations/rl.json"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda tree: tree["stages"][0]["run"].update(steps=3), "stage"),
        (lambda tree: tree.update(seed=1), "seed"),
        (lambda tree: tree["task"].update(level="demo"), "task, rows"),
        (lambda tree: tree["stages"][0]["data"].update(count=3), "stage, rows"),
    ],
)
def test_changed_inputs_are_refused_by_name(change: Any, key: str, done: Path, small_model: Path) -> None:
    tree, before = two_stages(small_model), touched(done)
    change(tree)
    with pytest.raises(CheckpointError, match=rf"stage 'cold-start' .*other inputs \({key}\).*another --out"):
        make(tree, done)
    assert touched(done) == before


def test_only_what_is_new_is_evaluated(done: Path, small_model: Path) -> None:
    """A second evaluation of a model has files of its own."""
    tree = two_stages(small_model)
    tree["evaluate"].append({"of": ["cold-start", "rl"], "split": "validation", "count": 1})
    before = touched(done)
    summary = make(tree, done)
    found = [(number["model"], number["split"]) for number in summary["evaluations"]]
    assert list(dict.fromkeys(found)) == [("base", "test"), ("rl", "test"), ("cold-start", "validation"), ("rl", "validation")]
    after = touched(done)
    assert {name: after[name] for name in before} == before
    make(tree, done)
    assert touched(done) == after
    make(two_stages(small_model), done)


# --------------------------------------------------------------------------------------------------------------
# Samples, repeats, merges.

PASSES = """
def always(answer):
    return 1.0

def seldom(answer):
    return float(answer.index % 4 == 0)

def never(answer):
    return 0.0
"""


@pytest.fixture
def sampling(small_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A sample stage that keeps what passed, and a stage that imitates it."""
    (tmp_path / "mine.py").write_text(PASSES)
    path = jsonl(tmp_path / "rows.jsonl", demonstrations(4))
    return {
        "name": "rejection",
        "model": str(small_model),
        "stages": [
            {
                "name": "write",
                "sample": "answers",
                "data": {"file": str(path)},
                "samples": 2,
                "method": {"keep": "passed"},
                "rewards": [f"{tmp_path / 'mine.py'}:seldom"],
                "run": {"sampling": {"max_tokens": 5}},
            },
            {"name": "imitate", "train": "sft", "data": {"stage": "write"}, "run": dict(SHORT)},
        ],
    }


def test_what_passed_is_imitated(sampling: dict[str, Any], small_model: Path, tmp_path: Path) -> None:
    summary = make(sampling, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/write/rows/rows.jsonl").read_text().splitlines()]
    assert [row["sample"]["index"] for row in rows] == [0, 4]
    metrics = summary["stages"][0]["metrics"]
    assert (metrics["samples"], metrics["kept"]) == (8, 2)
    assert metrics["reward"] == pytest.approx(0.25)
    assert summary["stages"][0]["artifact"] == "write/rows"
    settings = json.loads((tmp_path / "out/imitate/run.json").read_text())
    assert settings["rows"]["data"]["count"] == 2
    assert not same(weights(tmp_path / "out/imitate/model"), weights(small_model))


def test_nothing_that_passed_is_said(sampling: dict[str, Any], tmp_path: Path) -> None:
    sampling["stages"][0]["rewards"] = [f"{tmp_path / 'mine.py'}:never"]
    with pytest.raises(DataError, match=r"imitate: stage 'write' gave no rows; it kept no sample"):
        make(sampling, tmp_path / "out")


def test_without_rewards_all_is_kept(sampling: dict[str, Any], tmp_path: Path) -> None:
    stage = sampling["stages"][0]
    del stage["rewards"]
    with pytest.raises(ConfigError, match="'answers' has no rewards; name some"):
        make(sampling, tmp_path / "out")
    stage["method"] = {"keep": "all"}
    stage["run"]["stpes"] = 2
    with pytest.raises(ConfigError, match=r"does not read run\.stpes"):
        make(sampling, tmp_path / "out")
    del stage["run"]["stpes"]
    make(sampling, tmp_path / "out")
    settings = json.loads((tmp_path / "out/imitate/run.json").read_text())
    assert settings["rows"]["data"]["count"] == 8


def test_the_best_of_each_prompt(sampling: dict[str, Any], tmp_path: Path) -> None:
    sampling["stages"][0] |= {"method": {"keep": "best"}, "samples": 3}
    del sampling["stages"][1]
    make(sampling, tmp_path / "out")
    rows = [json.loads(line)["sample"] for line in (tmp_path / "out/write/rows/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert [row["index"] for row in rows] == [0, 4, 8, 9]  # the winner, or the first where none won


def test_rounds_start_where_the_round_before_ended(small_model: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", demonstrations(4))
    inner = {
        "name": "round-{round}",
        "train": "sft",
        "start": {"first": "base", "then": "round-{previous}"},
        "data": {"file": str(path)},
        "run": dict(SHORT),
    }
    tree = {"name": "rounds", "model": str(small_model), "stages": [{"repeat": 2, "stages": [inner]}]}
    recipe = parse_recipe(tree)
    assert [(stage.name, stage.start) for stage in recipe.stages] == [("round-1", "base"), ("round-2", "round-1")]
    make(tree, tmp_path / "out")
    settings = json.loads((tmp_path / "out/round-2/run.json").read_text())
    assert settings["model"] == str(tmp_path / "out/round-1/model")


# --------------------------------------------------------------------------------------------------------------
# Reading recipes.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update(stagse=[]), "'stagse' is no key.*'stages'"),
        (lambda t: t["stages"][0].update(trian="sft"), "trian.*'train'"),
        (lambda t: t["stages"][0]["data"].update(coutn=3), "coutn.*'count'"),
        (lambda t: t["evaluate"][0].update(smaples=3), "smaples.*'samples'"),
        (lambda t: t["stages"][0].pop("train"), "exactly one of"),
        (lambda t: t["stages"][1].update(start="cold-strat"), "'cold-strat'.*'cold-start'"),
        (lambda t: t["stages"].append({"name": "m", "merge": "rll"}), "'rll'.*'rl'"),
        (lambda t: t["stages"][1].update(name="cold-start"), "is taken"),
        (lambda t: t["stages"][1].update(name="../up"), "no plain name"),
        (lambda t: t["evaluate"][0].update(of=["lr"]), "evaluate names 'lr'"),
        (lambda t: t["stages"][0]["data"].update(count=0), "count"),
        (lambda t: (t.pop("stages"), t.pop("evaluate")), "neither stages nor evaluate"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(change: Any, words: str, small_model: Path, tmp_path: Path) -> None:
    tree = two_stages(small_model)
    change(tree)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=words):
        load_recipe(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["stages"][0]["run"].update(stpes=3), "stage 'cold-start' has no option 'stpes'.*'steps'"),
        (lambda t: t["stages"][0]["run"].update(steps="many"), "steps is 'many'"),
        (lambda t: t["stages"][0].update(method={"betta": 1}), "sft has no option 'betta'"),
        (lambda t: t["stages"][0].update(train="sftt"), "'sftt'.*'sft'"),
        (lambda t: t["stages"][0].update(data={"split": "demos", "count": 2}), "'demos'"),
        (lambda t: t["stages"][0].pop("data"), "has no data"),
    ],
)
def test_settings_of_a_stage_are_refused_by_name(change: Any, words: str, small_model: Path, tmp_path: Path) -> None:
    tree = two_stages(small_model)
    change(tree)
    with pytest.raises(ConfigError, match=words):
        make(tree, tmp_path / "out")
    assert not list(tmp_path.glob("out/*/model"))


SAMPLE = {"name": "write", "sample": "answers", "data": {"split": "train", "count": 1}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["stages"][1]["run"].update(stps=2), "stage 'rl' has no option 'stps'.*'steps'"),
        (lambda t: t["stages"][1]["run"].update(steps="many"), "stage 'rl'.steps is 'many'"),
        (lambda t: t["stages"][1].update(method={"betta": 1}), "grpo has no option 'betta'"),
        (lambda t: t["stages"][1]["run"].update(optimizer={"lrr": 1}), "'lrr'.*'lr'"),
        (lambda t: t["stages"][1]["run"]["sampling"].update(top=1), "'top'.*'top_p'"),
        (lambda t: t["stages"][1]["run"].update(lora={"rr": 1}), "'rr'.*'r'"),
        (lambda t: t["stages"][1]["run"].update(samples_per_prompt=1), "at least 2"),
        (lambda t: t["stages"][1].update(rewards=["none.py:mine"]), "none.py"),
        (lambda t: t["stages"][1].update(train="none.py:Mine"), "none.py"),
        (lambda t: t["stages"][1].update(data={"split": "trian", "count": 1}), "'trian'.*'train'"),
        (lambda t: t["stages"][1].update(data={"file": "none.jsonl"}), "none.jsonl"),
        (lambda t: t["stages"][1].update(train="dpo"), "stage 'rl': dpo learns from a better and a worse answer"),
        (lambda t: t["stages"][1].update(models={"critic": "cold-start"}), "grpo reads no model 'critic'"),
        (lambda t: t["stages"][1].update(models={"reference": "./none/at/all"}), "none/at/all is not a folder"),
        (lambda t: t["evaluate"][0].update(split="tset"), "'tset'.*'test'"),
        (lambda t: t["stages"].append({**SAMPLE, "run": {"a": 1}}), "run.a"),
        (lambda t: t["stages"].append({**SAMPLE, "sample": "anwsers"}), "'anwsers'.*answers"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    change: Any, words: str, small_model: Path, tmp_path: Path
) -> None:
    tree = two_stages(small_model)
    change(tree)
    with pytest.raises((ConfigError, DataError), match=words):
        make(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_file_that_cannot_be_run_is_named(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import os\n\nos.no_such_thing\n")
    tree = two_stages(small_model)
    tree["stages"][1]["train"] = f"{tmp_path / 'broken.py'}:Mine"
    with pytest.raises(ConfigError, match=r"broken.py could not be run \(AttributeError at line 3\)"):
        make(tree, tmp_path / "out")


def test_changes_by_path(small_model: Path) -> None:
    recipe = parse_recipe(two_stages(small_model), changes={"seed": 3, "stages.rl.run.steps": 7, "evaluate.0.count": 5})
    assert (recipe.seed, recipe.stages[1].run["steps"], recipe.evaluate[0].count) == (3, 7, 5)
    with pytest.raises(ConfigError, match=r"'rll'.*'rl'"):
        parse_recipe(two_stages(small_model), changes={"stages.rll.run.steps": 7})
    with pytest.raises(ConfigError, match="no small form"):
        parse_recipe(two_stages(small_model), small=True)


@pytest.mark.slow
def test_the_demo_in_its_small_form(tmp_path: Path) -> None:
    """The embedded model itself, from base to report."""
    run_recipe(load_recipe("word-problems", small=True), tmp_path / "demo", quiet=True)
    summary = read_summary(tmp_path / "demo")
    assert [stage["name"] for stage in summary["stages"]] == ["cold-start", "rl"]
    assert (tmp_path / "demo/report.html").stat().st_size > 10_000


def test_shipped_recipes_can_be_read_in_both_forms() -> None:
    from posttrain.recipe import shipped

    for name in shipped():
        whole = load_recipe(name)
        assert whole.shows, name
        if whole.small:
            assert load_recipe(name, small=True).stages


# --------------------------------------------------------------------------------------------------------------
# Feedback: rankings, a reward model, its scale, RL against it, and what it is worth.


@pytest.fixture(scope="module")
def feedback(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Rankings by a scripted annotator -> reward model -> rescaled -> PPO with a critic that starts from it; DPO beside it."""
    folder = tmp_path_factory.mktemp("feedback")
    (folder / "mine.py").write_text("def long(answer):\n    return float(len(answer.text) % 5)\n")
    short = {**SHORT, "optimizer": {"lr": 1e-3}}
    drawn = {"sampling": {"temperature": 1.5, "max_tokens": 8}}
    tree = {
        "name": "feedback",
        "model": str(small_model),
        "task": {"name": "word-problems", "level": "easy", "max_tokens": 8},
        "stages": [
            {
                "name": "rankings",
                "sample": "rankings",
                "data": {"split": "train", "count": 8},
                "samples": 3,
                "rewards": [f"{folder / 'mine.py'}:long"],
                "run": drawn,
            },
            {"name": "raw", "train": "all_pairs", "data": {"stage": "rankings", "count": 5}, "run": short},
            {"name": "rm", "normalise": "raw", "data": {"stage": "rankings"}},
            {
                "name": "ppo",
                "train": "ppo",
                "models": {"critic": "rm"},
                "data": {"split": "train", "count": 4},
                "rewards": ["model:rm", "right*0"],
                "run": {**short, "samples_per_prompt": 1, **drawn},
            },
            {
                "name": "dpo",
                "train": "dpo",
                "data": {"mix": [{"stage": "rankings", "count": 2}, {"stage": "rankings", "skip": 6}]},
                "run": short,
            },
        ],
        "evaluate": [
            {"of": ["ppo"], "count": 2},
            {
                "kind": "reward_pairs",
                "of": ["rm"],
                "models": {"raw": "raw"},
                "data": {"stage": "rankings", "skip": 5},
                "options": {"least": 1},
            },
        ],
    }
    make(tree, folder / "out")
    return tree, folder / "out"


def test_a_reward_model_from_rankings_drives_ppo(feedback: tuple[dict[str, Any], Path]) -> None:
    tree, out = feedback
    summary = read_summary(out)
    rows = lines(out / "rankings/rows", "rows.jsonl")
    assert all(len(row["responses"]) == len(row["samples"]) == len(row["ranking"]) for row in rows)
    metrics = lines(out / "ppo")
    assert all({"reward/model", "reward/right"} <= step.keys() for step in metrics)
    assert all(step["reward"] == pytest.approx(step["reward/model"]) for step in metrics)  # the other weighs 0
    found = {number["metric"]: number for number in summary["evaluations"] if number["model"] == "rm"}
    assert {"pair_accuracy", "disagreement", "length_correlation"} <= found.keys()
    assert found["disagreement"]["value"] == 0.0  # another scale is the same order
    count = json.loads((out / "dpo/run.json").read_text())["rows"]["data"]["count"]
    assert count == 2 + len(rows) - 6
    before = touched(out)
    make(tree, out)
    assert touched(out) == before


def test_what_rests_on_a_reward_model_is_made_again_when_it_changes(feedback: tuple[dict[str, Any], Path]) -> None:
    _, out = feedback
    record = out / "ppo/stage.json"
    inputs = json.loads(record.read_text())["inputs"]["models"]
    assert inputs["reward model:rm"] == inputs["critic"] == hash_folder(out / "rm/model")
    assert "Calibration of rm" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["stages"][0].update(sample="rankngs"), "'rankngs'.*'rankings'"),
        (lambda t: t["stages"][0].update(method={"noise": 0.9}), r"noise is 0\.9"),
        (lambda t: t["stages"][2].pop("data"), "stage 'rm' has no data"),
        (lambda t: t["stages"][3].update(rewards=["model:rn"]), "'rn', which is no stage before it.*'rm'"),
        (lambda t: t["stages"][4].update(data={"stage": "rankings", "skip": 99}), "99 of its rows are skipped"),
        (lambda t: t["stages"][4].update(data={"split": "train", "stage": "rankings"}), "expected exactly one of"),
        (lambda t: t["evaluate"][1].update(kind="reward_pair"), "'reward_pair'.*'reward_pairs'"),
        (lambda t: t["evaluate"][1].update(options={"bin": 3}), "'bin'.*'bins'"),
        (lambda t: t["evaluate"][1].pop("data"), "'reward_pairs' needs data"),
        (lambda t: t["evaluate"][0].update(rewards=["right"]), "'accuracy' asks the task and does not read rewards"),
    ],
)
def test_what_feedback_cannot_be_is_refused(change: Any, words: str, feedback: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    tree = json.loads(json.dumps(feedback[0]))
    change(tree)
    with pytest.raises((ConfigError, DataError), match=words):
        make(tree, tmp_path / "out")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_recipe_that_ships_reads_well_small_and_whole(name: str) -> None:
    for small in (False, True):
        recipe = load_recipe(name, small=small)
        assert recipe.shows
        assert recipe.minutes
        assert recipe.source
