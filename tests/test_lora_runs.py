"""LoRA from the command line to a merged model: the reference costs nothing, a kill costs nothing, a merge changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import demonstrations, jsonl, pairs, same, small_run, weights
from test_restart import assert_same, train_until
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import ConfigError
from posttrain.layout import Layout
from posttrain.method import Method, Optimizer
from posttrain.methods import DPO, GRPO, PPO, SFT
from posttrain.models.load import default_lr, load, save
from posttrain.models.lora import Lora, merge
from posttrain.models.model import LanguageModel
from posttrain.run import Run, train
from posttrain.wiring import START, AdaptersOff, build_models, derived_optimizer

pytest.importorskip("peft", reason="the extra peft is not installed")

HERE = Layout.of_rows([[5, 6, 7, 8, 9], [10, 11]])
FAST = ["prompts_per_step=2", "steps=3", "sampling.max_tokens=8", "optimizer.lr=0.01", "lora.r=8", "-q"]


def logits(model: Any) -> torch.Tensor:
    return model.logits(model.trunk(HERE).hidden).detach()


def run_command(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def adapted(model: Path, out: Path, method: Method | None = None, **changes: Any) -> Run:
    return small_run(method or SFT(), model, out, lora=Lora(r=4), **changes)


def rewarding(folder: Path) -> str:
    """A reward in a file of the user's own."""
    file = folder / "parity.py"
    file.write_text("def parity(answer):\n    return float(sum(answer.text.encode()) % 2)\n", encoding="utf-8")
    return f"{file}:parity"


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_the_command_trains_adapters_alone(method: str, small_model: Path, tmp_path: Path) -> None:
    rows = pairs() if method == "dpo" else demonstrations()
    more = ["--reward", rewarding(tmp_path), "samples_per_prompt=4"] if method == "grpo" else []
    out = tmp_path / method
    data = str(jsonl(tmp_path / "rows.jsonl", rows))
    run_command("train", method, "--lora", "-m", str(small_model), "-d", data, "-o", str(out), *more, *FAST)
    settings = json.loads((out / "run.json").read_text(encoding="utf-8"))["lora"]
    assert settings["r"] == 8
    assert {path.name for path in (out / "model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    model, _ = load(out / "model", device="cpu")
    base, _ = load(small_model, device="cpu")
    assert (logits(model) - logits(base)).abs().max() > 1e-3, "nothing was learnt"
    with model.adapters_off():
        assert torch.equal(logits(model), logits(base)), "the weights under the adapters were changed"


@pytest.mark.parametrize("precision", ["exact", "fast", "bf16"])
def test_the_reference_is_the_policy_with_its_adapters_off(precision: Any, small_model: Path, tmp_path: Path) -> None:
    models, _, _ = build_models(adapted(small_model, tmp_path / "run", GRPO(beta=0.04), precision=precision))
    policy, reference = models["policy"], models["reference"]
    assert isinstance(reference, AdaptersOff)
    assert isinstance(models[START], AdaptersOff)
    before = logits(reference)
    with torch.no_grad():
        for name, weight in policy.parameters().items():
            if "lora_B" in name:
                weight.fill_(0.1)
    assert torch.equal(logits(reference), before)
    assert (logits(policy) - before).abs().max() > 0.01
    assert all(weight.requires_grad for weight in policy.parameters().values())
    plain, _ = load(small_model, device="cpu")
    plain.use_precision(policy.precision)
    if precision == "exact":
        assert torch.equal(logits(plain), before)
    else:  # without adapters several layers go through one product, which rounds in another order
        tolerance = {"fast": 1e-5, "bf16": 0.05}[precision]
        torch.testing.assert_close(logits(plain), before, atol=tolerance, rtol=tolerance)


def test_the_reference_of_adapters_that_go_on_is_where_they_started(small_model: Path, tmp_path: Path) -> None:
    """Switched off they would be the base model; the start is the model that the first run left behind."""
    first = train(adapted(small_model, tmp_path / "sft")).model
    models, _, _ = build_models(small_run(DPO(), first, tmp_path / "dpo"))
    assert not isinstance(models["reference"], AdaptersOff)
    assert models["policy"].has_adapters
    assert torch.equal(logits(models["reference"]), logits(load(first, device="cpu")[0]))
    assert (logits(models["reference"]) - logits(load(small_model, device="cpu")[0])).abs().max() > 1e-3
    result = train(small_run(DPO(), first, tmp_path / "dpo"))
    assert result.metrics["loss"] < 0.6931
    with pytest.raises(ConfigError, match="holds LoRA adapters already"):
        train(adapted(first, tmp_path / "again"))


def test_the_first_loss_of_dpo_is_that_of_equal_models(small_model: Path, tmp_path: Path) -> None:
    result = train(adapted(small_model, tmp_path / "run", DPO(), steps=1))
    assert result.metrics["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_critic_has_adapters_of_its_own(small_model: Path, tmp_path: Path) -> None:
    models, _, _ = build_models(adapted(small_model, tmp_path / "run", PPO()))
    critic = models["critic"]
    assert critic.has_adapters
    assert critic.module is not models["policy"].module
    assert {name.split(".")[0] for name in critic.parameters()} == {"base_model", "heads"}
    assert all("lora_" in name or name.startswith("heads.") for name in critic.parameters())


RESUMED: dict[str, tuple[Method, dict[str, Any]]] = {
    "sft": (SFT(), {}),
    "dpo": (DPO(), {}),
    "grpo": (GRPO(beta=0.04), {"updates": 2, "minibatches": 2}),
    "ppo": (PPO(), {}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_equals_undisturbed(
    name: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, changes = RESUMED[name]
    runs = {out: adapted(small_model, tmp_path / out / "stage", method, **changes) for out in "ab"}
    train(runs["a"])
    train_until(3, runs["b"], monkeypatch)
    train(runs["b"])
    assert_same(tmp_path / "a/stage", tmp_path / "b/stage")
    trained = weights(tmp_path / "a/stage/model")
    assert any(value.abs().max() > 0 for key, value in trained.items() if "lora_B" in key), "nothing was learnt"


RECIPE: dict[str, Any] = {
    "name": "adapters",
    "task": "word-problems",
    "stages": [
        {
            "name": "sft",
            "train": "sft",
            "data": {"split": "demonstrations", "count": 4},
            "run": {"steps": 2, "prompts_per_step": 2, "lora": {"r": 4}, "optimizer": {"lr": 0.01}},
        },
        {"name": "whole", "merge": "sft"},
        {
            "name": "rl",
            "train": "grpo",
            "start": "whole",
            "data": {"split": "train", "count": 4},
            "run": {
                "steps": 1,
                "prompts_per_step": 2,
                "samples_per_prompt": 2,
                "lora": {"r": 4},
                "sampling": {"max_tokens": 8},
            },
        },
    ],
    "evaluate": [{"of": ["base", "sft", "whole"], "count": 2, "max_tokens": 8}],
}


def test_a_recipe_merges_into_a_whole_folder_with_the_same_logprobs(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = tmp_path / "adapters.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "model": str(small_model)}), encoding="utf-8")
    out = tmp_path / "out"
    run_command("run", str(recipe), "-o", str(out), "-q")
    whole = out / "whole/model"
    assert not (whole / "adapter_config.json").exists()
    adapters, _ = load(out / "sft/model", device="cpu")
    theirs = LanguageModel(AutoModelForCausalLM.from_pretrained(str(whole)))
    assert theirs.module.state_dict().keys() == load(small_model, device="cpu")[0].module.state_dict().keys()
    found, wanted = logits(theirs).log_softmax(-1), logits(adapters).log_softmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (wanted - logits(load(small_model, device="cpu")[0]).log_softmax(-1)).abs().max() > 1e-3
    numbers = {row["model"] for row in json.loads((out / "summary.json").read_text(encoding="utf-8"))["evaluations"]}
    assert numbers == {"base", "sft", "whole"}
    before = (whole / "model.safetensors").stat().st_mtime_ns
    run_command("run", str(recipe), "-o", str(out), "-q")
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


def test_a_merge_of_no_stage_is_refused_with_the_nearest(small_model: Path, tmp_path: Path) -> None:
    from posttrain.recipe import parse_recipe

    stages = [RECIPE["stages"][0], {"name": "whole", "merge": "sf"}]
    with pytest.raises(ConfigError, match=r"'whole' builds on 'sf', which is no stage before it.*'sft'"):
        parse_recipe({**RECIPE, "stages": stages, "evaluate": []})


def test_a_merged_stage_notices_other_adapters(small_model: Path, tmp_path: Path) -> None:
    """What is merged is an input: other adapters under the same name are not taken for the ones before."""
    from posttrain.errors import CheckpointError
    from posttrain.pipeline import run_recipe
    from posttrain.recipe import parse_recipe

    recipe = parse_recipe({**RECIPE, "model": str(small_model), "stages": RECIPE["stages"][:2], "evaluate": []})
    run_recipe(recipe, tmp_path / "out", quiet=True)
    model, tokenizer = load(tmp_path / "out/sft/model", device="cpu")
    with torch.no_grad():
        next(iter(model.parameters().values())).add_(1.0)
    other = save(model, tokenizer, tmp_path / "other")
    target = tmp_path / "out/sft/model/adapter_model.safetensors"
    target.write_bytes((other / "adapter_model.safetensors").read_bytes())
    record = tmp_path / "out/sft/stage.json"
    from posttrain.manifest import hash_folder

    done = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps({**done, "hash": hash_folder(target.parent)}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"stage 'whole' .*from other inputs \(models\)"):
        run_recipe(recipe, tmp_path / "out", quiet=True)


def test_the_learning_rate_is_derived_and_printed(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = adapted(small_model, tmp_path / "run", steps=1, optimizer=Optimizer(), quiet=False, show=0)
    model = build_models(run)[0]["policy"]
    rate = derived_optimizer(run, model).lr
    assert rate == default_lr(model.num_parameters, True, "sft")
    assert rate == pytest.approx(10 * default_lr(model.num_parameters, False, "sft"))
    train(run)
    printed = capsys.readouterr().err
    assert f"learning rate {rate:g}," in printed
    assert "in adapters, learn" in printed


def test_merging_by_hand_equals_the_adapters(small_model: Path, tmp_path: Path) -> None:
    where = train(adapted(small_model, tmp_path / "run")).model
    model, _ = load(where, device="cpu")
    torch.testing.assert_close(logits(merge(model)), logits(model), atol=1e-5, rtol=0)
    assert same(weights(where), weights(save(model, load(where)[1], tmp_path / "copy")))


def test_settings_that_cannot_be_honoured_are_refused(small_model: Path, tmp_path: Path) -> None:
    data = str(jsonl(tmp_path / "rows.jsonl", demonstrations()))

    def refused(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            run_command("train", "sft", "-m", str(small_model), "-d", data, "-o", str(tmp_path / "x"), *words)
        return str(caught.value)

    assert "without --lora" in refused("lora.r=8")
    assert "lora has no option 'rank'" in refused("--lora", "lora.rank=8")
    assert "r is 0" in refused("--lora", "lora.r=0")
    assert "lora.dropout is 0.1" in refused("--lora", "lora.dropout=0.1")
    assert "LoRA targets ['attn'] cannot be adapted" in refused("--lora", "lora.targets=[attn]")
