"""The recipes r1-zero, r1 and tulu3: what each stage is given, the numbers of their sources, and small forms run whole."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from build import close, make_batch, objective, spread
from small import lines, same, small_run, weights
from transformers import AutoTokenizer

from posttrain import tiny
from posttrain.data.chat import Renderer
from posttrain.errors import ConfigError
from posttrain.evaluation.reward_means import RewardMeans
from posttrain.formulas.advantages import gae, group_zscore, group_zscore_sample, whiten
from posttrain.formulas.divergences import k3
from posttrain.formulas.reductions import token_mean
from posttrain.formulas.surrogates import clipped, was_clipped
from posttrain.manifest import hash_folder
from posttrain.method import Optimizer
from posttrain.methods.policy.grpo import GRPO
from posttrain.methods.policy.ppo import PPO
from posttrain.methods.reward.reward_model import BradleyTerry
from posttrain.methods.sft.sft import SFT
from posttrain.pack import shuffled_minibatches, units
from posttrain.pipeline import run_recipe
from posttrain.plan import Plan
from posttrain.recipe import load_recipe
from posttrain.records import sample_from_json
from posttrain.report.summary import read_summary
from posttrain.rewards import Answer, combine
from posttrain.rewards.last_number import LastNumber, last_number
from posttrain.rewards.named import named_rewards
from posttrain.rewards.readable import calculations, chain_of, consistency, is_readable
from posttrain.run import train
from posttrain.synthesis.maker import Workshop
from posttrain.tasks import task
from posttrain.tasks.word_problems import verify
from posttrain.types import Overlong, Readings, Score, Unparseable, Wrong
from posttrain.wiring import build_models

GOOD = "<think>He has <<3*4=12>>12. Then <<12-2=10>>10 are left.</think><answer>10</answer>"
NEAR = "<think>He has <<3*4=12>>12. Then 12 - 2 = 10 are left.</think><answer>10</answer>"


# --------------------------------------------------------------------------------------------------------------
# DeepSeek-R1: its numbers.


def test_advantages_of_equally_weighted_rewards() -> None:
    total, group = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    close(group_zscore(total, group, eps=0.0), [1.414214, 0, 0, -1.414214])
    close(group_zscore_sample(total, group, eps=0.0), [1.224745, 0, 0, -1.224745])
    assert (group_zscore(torch.ones_like(total), group) == 0).all()


def test_the_kl_estimator() -> None:
    d = torch.tensor([-1.0 + 1.2, -1.2 + 1.0, 0.0], dtype=torch.float64)  # log pi - log ref
    close(k3(d), [0.018731, 0.021403, 0.0])
    assert (k3(torch.linspace(-3, 3, 101, dtype=torch.float64)) >= 0).all()


def test_a_clip_of_ten_acts_above_eleven_only() -> None:
    ratio = torch.tensor([1e-6, 0.5, 10.9, 11.1, 40.0], dtype=torch.float64)
    for sign in (1.0, -1.0):
        cost = clipped(ratio, torch.full_like(ratio, sign), low=10.0, high=10.0)
        close(cost, -ratio.clamp(max=11.0) if sign > 0 else ratio)
        bound = was_clipped(ratio, torch.full_like(ratio, sign), low=10.0, high=10.0)
        assert bound.tolist() == ([False, False, False, True, True] if sign > 0 else [False] * 5)


def test_language_consistency() -> None:
    one, other = "<<3+4=7>>7", "3 + 4 = 7"
    assert consistency("<think>" + " and ".join([one] * 18 + [other] * 2) + "</think>") == 18 / 20 == 0.9
    assert consistency("<think></think><answer>7</answer>") == 0.0
    assert consistency("") == 0.0
    assert (consistency(GOOD), consistency(NEAR)) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("text", "one", "other"),
    [
        ("<<3*4=12>>12", 1, 0),
        ("$<<3*4=12>>12", 1, 0),
        ("<<3*4=12>>13", 0, 1),  # what stands after it is not its result: broken, and no longer the one notation
        ("<<3*4=12>>", 0, 1),
        ("3 * 4 = 12; 12-2=10", 0, 2),
        ("The cups cost $4 * 6 = $24.", 0, 1),
        ("3 + 4 is 7.", 0, 1),
        ("1. Multiply 3 by 4: 12.\n2. Take 2 away from 12: 10.", 0, 2),
        ("He has 12 cups, and 4 friends.", 0, 0),
    ],
)
def test_notations(text: str, one: int, other: int) -> None:
    assert [len(found) for found in calculations(text)] == [one, other]


def test_the_answer_is_no_part_of_the_chain() -> None:
    assert chain_of(GOOD).endswith("10 are left.")
    assert chain_of("3 + 4 = 7<answer>7</answer>") == "3 + 4 = 7"
    assert consistency("<think><<3+4=7>>7</think><answer>3 + 4 = 7</answer>") == 1.0


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        (GOOD, True),
        (NEAR, False),
        (GOOD.removesuffix("</answer>"), False),
        (GOOD.replace("12-2=10>>10", "3*4=12>>12"), False),  # the same calculation twice
        ("<think>It is ten.</think><answer>10</answer>", False),
    ],
)
def test_readable(text: str, readable: bool) -> None:
    assert is_readable(text) is readable


def test_right_without_tags_and_tags_without_right_earn_the_same() -> None:
    rewards = named_rewards(["last-number", "format"])
    texts = {GOOD: 2.0, "It is 10": 1.0, GOOD.replace("10", "11"): 1.0, "It is 11": 0.0}
    for text, wanted in texts.items():
        answer = Answer(text=text, info={"answer": "10"})
        assert combine(rewards, {reward.name: reward.fn(answer) for reward in rewards}, {"Wrong": 0.0})[0] == wanted


def test_a_rollout_of_8192_makes_sixteen_updates_of_512() -> None:
    batch = make_batch([1] * 8192, group=[row // 16 for row in range(8192)])
    cuts = shuffled_minibatches(units(batch, GRPO.unit), 16, torch.Generator().manual_seed(0))
    assert [sum(len(unit) for unit in cut) for cut in cuts] == [512] * 16
    assert sorted(row for cut in cuts for unit in cut for row in unit) == list(range(8192))


def test_only_the_first_update_of_a_rollout_is_on_policy(small_model: Path, tmp_path: Path) -> None:
    tight = GRPO(beta=0.0, clip_low=0.0, clip_high=0.0)  # every ratio but 1 is outside on one side
    for cuts, on_policy in ((1, True), (4, False)):
        settings: dict[str, Any] = {"steps": 2, "minibatches": cuts, "optimizer": Optimizer(lr=1e-2)}
        train(small_run(tight, small_model, tmp_path / str(cuts), **settings))
        assert all((row["clip_fraction"] == 0) is on_policy for row in lines(tmp_path / str(cuts)) if row["signal"])


# --------------------------------------------------------------------------------------------------------------
# Tulu 3: its numbers.  Those of the pairs' loss, of answers without an end and of n-grams stand with these.


def test_tokens_count_alike_however_a_batch_is_cut() -> None:
    batch = make_batch([10, 90])
    seen = Readings.of(policy={"logprob": spread(batch, [[-2.0] * 10, [-1.0] * 90], elsewhere=math.nan)})
    close(objective(SFT(), batch, seen), 1.10)  # and not (2 + 1) / 2
    assert int(token_mean(batch)[1]) == 100


def test_without_values_every_token_has_the_verifiers_number() -> None:
    batch = make_batch([4])
    earned = spread(batch, [[0.0, 0.0, 0.0, 10.0]])
    advantages, _ = gae(earned, torch.zeros_like(earned), batch.mask, gamma=1.0, lam=1.0)
    close(advantages[batch.mask], [10.0] * 4)
    assert (whiten(advantages, batch.mask) == 0).all()


@pytest.mark.parametrize(
    ("text", "expected", "verdict"),
    [
        ("... so 1,234 apples. Answer 1,234", "1234", Score(1.0)),
        ("... so 1,234 apples. Answer 1,234.", "1,234", Score(1.0)),
        ("5-3", "3", Score(1.0)),
        ("It is -3.", "-3", Score(1.0)),
        ("24.0", "24", Score(1.0)),
        (r"\boxed{24} apples", "24", Score(1.0)),
        ("First 24, then 25.", "24", Wrong()),
    ],
)
def test_the_last_number(text: str, expected: str, verdict: object) -> None:
    assert LastNumber()(Answer(text=text, info={"answer": expected})) == verdict


def test_no_number_and_no_end_earn_nothing() -> None:
    assert isinstance(LastNumber()(Answer(text="", info={"answer": "7"})), Unparseable)
    assert isinstance(LastNumber()(Answer(text="It is 7", info={"answer": "7"}, finish="length")), Overlong)
    assert last_number("9" * 65) is None


def test_the_critic_starts_from_the_reward_model(small_model: Path, tmp_path: Path) -> None:
    rm = train(small_run(BradleyTerry(), small_model, tmp_path / "rm", steps=1)).model
    models, _, _ = build_models(small_run(PPO(), small_model, tmp_path / "ppo", models={"critic": rm}))
    theirs, mine = weights(rm), models["critic"].module.state_dict()
    start = weights(small_model)
    moved = [key for key in start if not torch.equal(theirs[key], start[key])]
    assert moved
    for key in moved:
        assert torch.equal(mine[key.partition(":")[2]], theirs[key])
    values, rewards = models["critic"].heads["value"], theirs["heads.safetensors:reward.weight"]
    assert torch.equal(values.weight, rewards)


# --------------------------------------------------------------------------------------------------------------
# Chats, and data of another task.


def test_chats_verify_their_own_demonstrations() -> None:
    made = task("chats")
    rows = {split: made.rows(split, 60) for split in made.splits}
    for row in rows["test"]:
        right = row["completion"][0]["content"]
        judged = [made.rewards[0].fn(Answer(text=text, info=row)) for text in (right, right + " Really.", "")]
        assert [type(verdict) for verdict in judged] == [Score, Wrong, Unparseable]
    asked = [{json.dumps(row["prompt"]) for row in found} for found in rows.values()]
    assert sum(len(found) for found in asked) == len(set().union(*asked))
    assert made.rows("test", 5) == rows["test"][:5]
    with pytest.raises(ConfigError, match="nearest: 'test'"):
        made.rows("tset", 1)


def test_another_task_is_refused_by_name(tmp_path: Path) -> None:
    for change in ("evaluate.2.task", "stages.rl-1.data.task"):
        recipe = load_recipe("r1", small=True, changes={change: {"name": "chat"}})
        with pytest.raises(ConfigError, match=r"'chat'.*'chats'"):
            Plan(recipe, tmp_path).check()


def test_means_of_no_rewards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no rewards"):
        RewardMeans().examine(Workshop(sets={"data": []}, sources={}, folder=tmp_path), model_name="base")


@pytest.mark.parametrize(("name", "small"), [("r1", False), ("r1-zero", False), ("tulu3", False), ("tulu3", True)])
def test_every_stage_is_sound_before_the_first_runs(name: str, small: bool, tmp_path: Path) -> None:
    Plan(load_recipe(name, small=small), tmp_path).check()


# --------------------------------------------------------------------------------------------------------------
# The small forms, whole.


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small form of r1 on the embedded model, with fewer answers still."""
    out = tmp_path_factory.mktemp("r1") / "out"
    changes = {
        "model": str(tiny.path()),
        "stages.cold-start.run.epochs": 4,
        "stages.cold-start.run.optimizer.lr": 8.0e-4,
        "stages.kept.data.count": 24,
        "evaluate.0.count": 4,
        "evaluate.1.data.count": 4,
        "evaluate.2.count": 4,
    }
    run_recipe(load_recipe("r1", small=True, changes=changes), out, quiet=True)
    return out


def test_the_second_sft_starts_from_the_base(r1: Path) -> None:
    records = {name: json.loads((r1 / name / "stage.json").read_text()) for name in ("cold-start", "kept", "sft")}
    started = {name: record["inputs"]["models"] for name, record in records.items()}
    assert started["sft"]["start"] == started["cold-start"]["start"] == hash_folder(Path(tiny.path()))
    assert started["kept"]["start"] == hash_folder(r1 / "rl-1/model")
    assert json.loads((r1 / "sft/run.json").read_text())["model"] == str(tiny.path())
    assert json.loads((r1 / "rl-2/run.json").read_text())["model"] == str(r1 / "sft/model")
    kept = next(stage for stage in load_recipe("r1").stages if stage.name == "kept")
    assert not kept.run.get("sampling", {}).get("greedy", False)
    assert kept.samples > 1


def test_what_is_kept_verifies_reads_well_and_is_capped(r1: Path) -> None:
    recipe = load_recipe("r1")
    rows = [json.loads(line) for line in (r1 / "kept/rows/rows.jsonl").read_text().splitlines()]
    samples = [sample_from_json(row["sample"]) for row in rows]
    decode = Renderer(AutoTokenizer.from_pretrained(str(tiny.path()))).decode
    texts = [decode(sample.completion).removesuffix("<|end|>") for sample in samples]
    for text, sample in zip(texts, samples, strict=True):
        assert verify(text, sample.info) == Score(1.0)
        assert is_readable(text)
    most = recipe.stages[2].method["most"]
    assert max(Counter(sample.group for sample in samples).values()) <= most
    assert len({(sample.group, text) for sample, text in zip(samples, texts, strict=True)}) == len(samples)
    metrics = read_summary(r1)["stages"][2]["metrics"]
    assert metrics["kept"] == len(rows) >= metrics["prompts_kept"] == len({sample.group for sample in samples})
    assert metrics["samples"] == 24 * 4


def test_three_parts_of_reasoning_to_one_of_other_data() -> None:
    sft = next(stage for stage in load_recipe("r1").stages if stage.name == "sft")
    reasoning, other = (part.count for part in sft.data.mix)  # type: ignore[union-attr]
    assert reasoning == 3 * other


def test_a_new_stage_of_rl_is_a_new_reference(r1: Path) -> None:
    for stage in ("rl-1", "rl-2"):
        rows = lines(r1 / stage)
        assert rows[0]["kl"] == 0.0
        assert max(row["kl"] for row in rows) > 0.0


def test_every_node_is_measured_on_every_task(r1: Path) -> None:
    found = {(e["model"], e["task"], e["metric"]): e for e in read_summary(r1)["evaluations"]}
    for node in ("base", "cold-start", "rl-1", "sft", "rl-2"):
        for name, metrics in (
            ("word-problems", ("accuracy", "parsed")),
            ("word-problems(hard)", ("right", "last-number", "format", "consistent", "readable", "tokens", "truncated")),
            ("chats", ("accuracy",)),
        ):
            for metric in metrics:
                entry = found[node, name, metric]
                assert entry["n"] == 4
                assert metric == "tokens" or 0 <= entry["value"] <= 1
    asked = {json.loads(line)["id"] for line in (r1 / "evaluations/base.jsonl").read_text().splitlines()}
    other = {json.loads(line)["task"] for line in (r1 / "evaluations/base.2.jsonl").read_text().splitlines()}
    assert len(asked) == 4
    assert other == {"chats"}


def test_zero_does_not_start_in_a_format_it_never_wrote(tmp_path: Path) -> None:
    """No answer of the base is in the format, so no group has a signal and not one weight moves: the cold-start problem."""
    changes = {"stages.zero.run.samples_per_prompt": 4, "evaluate": [], "stages.zero-last-number.run.steps": 1}
    run_recipe(load_recipe("r1-zero", small=True, changes=changes), tmp_path, quiet=True)
    (row,) = lines(tmp_path / "zero")
    assert (row["signal"], row["reward"], row["parsed"]) == (0.0, 0.0, 0.0)
    assert same(weights(tmp_path / "zero/model"), weights(Path(tiny.path())))
    (row,) = lines(tmp_path / "zero-last-number")
    assert row["signal"] > 0
    assert row["reward/format"] == 0.0
    assert row["reward/last-number"] > 0.3
    assert not same(weights(tmp_path / "zero-last-number/model"), weights(Path(tiny.path())))
