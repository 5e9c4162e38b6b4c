"""Parity with TRL: the losses and gradients of its own trainers against this engine's, on one batch of one model.

TRL computes through `SFTTrainer.compute_loss`, `DPOTrainer.compute_loss` and, for GRPO, through the whole of
`_generate_and_score_completions` (only what is generated is given) and `_compute_loss`.  Both sides run in float64 with
bfloat16 autocast, which TRL turns on by default, turned off.

Conventions that differ, and how they are brought together:

- TRL divides group deviations by `std + 1e-4`; the default here is `std + 1e-6`.  The tests set 1e-4 here.
- TRL's "dapo" is the token mean alone; `DAPO` here also leaves groups out whose rewards are all equal (dynamic sampling) and
  punishes overlong answers.  The tests have no such group and set `cache=0`.
- TRL stacks all chosen rows before all rejected ones; here pairs stand side by side.
- TRL adds the KL term to each token of any loss; `DrGRPO`, `DAPO` and `GSPO` here have none, as in their papers.  With a KL,
  `GRPO` with their reduction and advantage is compared.
- TRL multiplies the KL by the importance ratio (`use_bias_correction_kl`, DeepSeek-V3.2) unless told not to; GRPO as published does
  not, so it is turned off.
- TRL's SFT divides by the labels of a micro-batch unless its trainer passes the number for the whole step; one is compared here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.distributed.world import World
from posttrain.formulas.advantages import group_mean_centred, group_zscore_sample
from posttrain.formulas.reductions import constant, sequence_mean, token_mean
from posttrain.method import Method, Part
from posttrain.methods import CISPO, DAPO, DPO, GRPO, GSPO, SFT, DrGRPO
from posttrain.models.load import load
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.pack import pack, units
from posttrain.score import prepare
from posttrain.step import Ready, Tally, accumulate
from posttrain.types import Origin, Sample, State

pytest.importorskip("trl", reason="trl is not installed (extra 'bench')")
pytest.importorskip("datasets", reason="datasets is not installed (extra 'bench')")

TOLERANCE = 1e-5  # relative; transformers works out norms and rotary tables in float32 in a float64 model too
PROMPTS, ANSWERS = 3, 4
TRL_EPS = 1e-4  # added to a group's standard deviation
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load("tiny")[1]


@pytest.fixture
def policy(tokenizer: Any) -> LanguageModel:
    return random_model("llama", seed=0, dtype="float64", vocab_size=len(tokenizer))


@pytest.fixture
def reference(tokenizer: Any) -> LanguageModel:
    return random_model("llama", seed=1, dtype="float64", vocab_size=len(tokenizer))


def common(folder: Path) -> dict[str, Any]:
    """Settings that all TRL trainers share here."""
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def answers(size: int, *, seed: int = 0) -> list[list[int]]:
    """`size` answers of ragged lengths, without special tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (size,), generator=draw).tolist()
    return [torch.randint(40, 300, (length,), generator=draw).tolist() for length in lengths]


def sample(prompt: Sequence[int], answer: Sequence[int], origin: Origin, **fields: Any) -> Sample:
    tokens = [*prompt, *answer]
    trained = [False] * len(prompt) + [True] * len(answer)
    return Sample(
        tokens=tokens, origin=[int(Origin.USER)] * len(prompt) + [int(origin)] * len(answer), trained=trained, **fields
    )


@dataclass
class Result:
    """A loss and the gradient of every weight."""

    loss: float
    gradient: dict[str, Tensor]
    metrics: dict[str, float]


def ours(
    models: dict[str, LanguageModel],
    method: Method,
    samples: Sequence[Sample],
    *,
    between: Callable[[], None] = lambda: None,
    budget: int = 10_000,
) -> Result:
    """The engine's loss and gradient; `between` runs after the readings that are made once."""
    for model in models.values():
        model.module.zero_grad()
    world, state = World(), State(step=1, total_steps=10, memory=method.begin())
    batch = pack(samples, dtype=torch.float64)
    batch, seen, state = prepare(models, method, batch, state, token_budget=budget, world=world, on_policy=False)
    between()
    ready, tally = Ready("", Part(method=method), 1.0, batch, seen, state), Tally()
    chosen = units(batch, method.unit)
    accumulate(models, ready, chosen, token_budget=budget, chunk_bytes=1 << 20, world=world, tally=tally)
    metrics = tally.means(world)
    loss = sum(metrics[name] * term.weight for name, term in method.terms(state).items())
    gradient = {name: p.grad.clone() for name, p in models["policy"].parameters().items() if p.grad is not None}
    return Result(loss, gradient, metrics)


def theirs(loss: Tensor, module: Any) -> Result:
    """TRL's loss and the gradient that it gives."""
    module.zero_grad()
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return Result(float(loss.detach()), gradient, {})


def assert_same(one: Result, other: Result, *, tolerance: float = TOLERANCE) -> None:
    assert one.gradient.keys() == other.gradient.keys()
    scale = max(float(g.abs().max()) for g in other.gradient.values())
    assert scale > 0, "the gradient is zero, so nothing is compared"
    gap = max(float((one.gradient[n] - other.gradient[n]).abs().max()) for n in one.gradient) / scale
    print(f"loss {one.loss:.12f} and {other.loss:.12f}, largest difference of the gradients {gap:.1e}")
    assert one.loss == pytest.approx(other.loss, rel=tolerance, abs=1e-6)
    assert gap <= tolerance


@pytest.mark.parametrize("budget", [10_000, 20])
def test_sft(policy: LanguageModel, tokenizer: Any, tmp_path: Path, budget: int) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [([1, 50 + i, 60, 61], answer) for i, answer in enumerate(answers(5))]
    examples = [{"input_ids": [*p, *a], "labels": [-100] * len(p) + a} for p, a in rows]
    module = copy.deepcopy(policy.module)
    trainer = SFTTrainer(
        model=module, args=SFTConfig(**common(tmp_path)), train_dataset=Dataset.from_list(examples), processing_class=tokenizer
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    samples = [sample(p, a, Origin.DEMONSTRATION, index=i) for i, (p, a) in enumerate(rows)]
    assert_same(ours({"policy": policy}, SFT(), samples, budget=budget), theirs(loss, module))


def test_dpo(policy: LanguageModel, reference: LanguageModel, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    chosen, rejected = answers(4), answers(4, seed=1)
    rows = [{"prompt_ids": [1, 50 + i, 60], "chosen_ids": chosen[i], "rejected_ids": rejected[i]} for i in range(4)]
    module, frozen = copy.deepcopy(policy.module), copy.deepcopy(reference.module)
    trainer = DPOTrainer(
        model=module,
        ref_model=frozen,
        args=DPOConfig(beta=0.3, **common(tmp_path)),
        train_dataset=Dataset.from_list([{"prompt": "1", "chosen": " 2", "rejected": " 3"}] * 4),
        processing_class=tokenizer,
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    samples = []
    for i, row in enumerate(rows):
        for key in ("chosen_ids", "rejected_ids"):
            samples.append(sample(row["prompt_ids"], row[key], Origin.DEMONSTRATION, group=str(i), index=len(samples)))
    assert_same(ours({"policy": policy, "reference": reference}, DPO(beta=0.3), samples), theirs(loss, module))


# --------------------------------------------------------------------------------------------------------------
# GRPO and its kin.


def nudge(module: Any) -> None:
    """Move the weights a little, so that old and new log-probabilities differ by about the clip width."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(0.03 * parameter.abs().mean() * noise)


@dataclass
class Rollout:
    """What TRL made of given answers: its inputs to the loss, the trainer, and the same answers as samples."""

    trainer: Any
    module: Any
    inputs: dict[str, Tensor]
    samples: list[Sample]


def rollout(policy: LanguageModel, reference: LanguageModel, tokenizer: Any, folder: Path, **settings: Any) -> Rollout:
    """TRL scores and credits given answers to three prompts; the policy's weights are moved afterwards."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    written = answers(PROMPTS * ANSWERS, seed=3)
    rewards = [float((i + i // ANSWERS) % 3 == 0) + 0.1 * (i % 2) for i in range(len(written))]
    prompts = ["one apple", "two and three pears", "four"]
    module, frozen = copy.deepcopy(policy.module), copy.deepcopy(reference.module)
    folder = folder / "reference"
    frozen.save_pretrained(folder)  # TRL opens the reference of GRPO by the name in the policy's config
    module.config._name_or_path = str(folder)
    beta = settings.pop("beta", 0.0)
    config = GRPOConfig(
        num_generations=ANSWERS,
        per_device_train_batch_size=PROMPTS * ANSWERS,
        gradient_accumulation_steps=1,
        num_iterations=2,  # old log-probabilities are read before the first update
        max_completion_length=16,
        beta=beta,
        use_bias_correction_kl=False,
        **settings,
        **common(folder.parent),
    )
    trainer = GRPOTrainer(
        model=module,
        reward_funcs=lambda completions, **_: rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    if beta:
        trainer.ref_model.double().load_state_dict(frozen.state_dict())
    trainer._generate_single_turn = lambda *_: (written, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(ANSWERS)])
    samples = []
    for i, answer in enumerate(written):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
        assert inputs["completion_ids"][i][inputs["completion_mask"][i].bool()].tolist() == answer
        samples.append(sample(prompt, answer, Origin.POLICY, group=str(i // ANSWERS), index=i, reward=rewards[i]))
    nudge(module)
    return Rollout(trainer, module, inputs, samples)


zscore = partial(group_zscore_sample, eps=TRL_EPS)
CASES: dict[str, tuple[dict[str, Any], Method]] = {
    "grpo": ({"loss_type": "grpo", "beta": 0.04}, GRPO(advantage=zscore)),
    "grpo without kl": ({"loss_type": "grpo"}, GRPO(advantage=zscore, beta=0.0)),
    "bnpo": ({"loss_type": "bnpo", "beta": 0.04}, GRPO(advantage=zscore, reduce=token_mean)),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, DrGRPO(max_tokens=16)),
    "dr_grpo with kl": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.04},
        GRPO(advantage=group_mean_centred, reduce=constant(16)),
    ),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, DAPO(cache=0, advantage=zscore)),
    "dapo with kl": (
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.04},
        GRPO(advantage=zscore, reduce=token_mean, clip_high=0.28),
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
        GSPO(advantage=zscore, clip_low=0.05, clip_high=0.06),
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, CISPO(advantage=zscore, cap=1.2)),
}


@pytest.mark.parametrize("name", CASES)
def test_grpo(policy: LanguageModel, reference: LanguageModel, tokenizer: Any, tmp_path: Path, name: str) -> None:
    settings, method = CASES[name]
    made = rollout(policy, reference, tokenizer, tmp_path, **settings)
    loss = made.trainer._compute_loss(made.module, made.inputs)
    models = {"policy": policy, "reference": reference}
    found = ours(models, method, made.samples, between=lambda: nudge(policy.module))
    assert_same(found, theirs(loss, made.module))
    assert 0 < found.metrics["clip_fraction"] < 1, "the clip must bind somewhere, and not everywhere"
    if made.trainer.beta:
        assert found.metrics["kl"] > 0


def test_grpo_advantages(policy: LanguageModel, reference: LanguageModel, tokenizer: Any, tmp_path: Path) -> None:
    made = rollout(policy, reference, tokenizer, tmp_path, loss_type="grpo")
    batch = pack(made.samples, dtype=torch.float64)
    found = zscore(batch.rewards, batch.group, batch.mask.any(-1))
    assert torch.allclose(found, made.inputs["advantages"].double(), atol=1e-6)
    assert not torch.allclose(found, group_zscore_sample(batch.rewards, batch.group, batch.mask.any(-1)), atol=1e-6)


def test_reductions_are_told_apart(policy: LanguageModel, reference: LanguageModel, tokenizer: Any, tmp_path: Path) -> None:
    made = rollout(policy, reference, tokenizer, tmp_path, loss_type="dapo")
    loss = theirs(made.trainer._compute_loss(made.module, made.inputs), made.module).loss
    method = GRPO(advantage=zscore, beta=0.0, reduce=sequence_mean)
    other = ours({"policy": policy}, method, made.samples, between=lambda: nudge(policy.module)).loss
    assert abs(loss - other) > 1e-6
