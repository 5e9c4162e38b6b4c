"""Reward models as rewards: the very tokens are read, other tokenizers read the text, and a head is rescaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import demonstrations, pairs, rankings

from posttrain.data.chat import renderer_of
from posttrain.distributed.world import World
from posttrain.errors import ConfigError, DataError
from posttrain.experience import Desk
from posttrain.models.load import load, save
from posttrain.rewards import RewardRunner, score
from posttrain.rewards.model import normalised, reward_scores, step_scores
from posttrain.rewards.named import named_rewards
from posttrain.samplers.native import NativeSampler
from posttrain.types import Sampling


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    """The small model with a reward head."""
    model, tokenizer = load(small_model)
    model.add_reward_head(seed=2)
    return save(model, tokenizer, tmp_path / "rm")


def test_the_reward_of_a_rollout_is_the_head_at_its_last_token(folder: Path, small_model: Path) -> None:
    model, tokenizer = load(small_model)
    renderer = renderer_of(model, tokenizer)
    sampler = NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
    desk = Desk(renderer, sampler, Sampling(max_tokens=6), 2, 0, 0, World())
    answers = desk.rollout(demonstrations(3))
    rewards = named_rewards([f"model:{folder}*2"])
    with RewardRunner() as runner:
        scored, _ = score(rewards, answers, renderer.decode, runner=runner, stop_tokens=renderer.stop_tokens)
    judge, _ = load(folder)
    for sample in scored:
        hidden = judge.module.model(torch.tensor([sample.tokens])).last_hidden_state[0, -1]
        wanted = float(judge.heads["reward"](hidden.unsqueeze(0)))
        assert sample.info["rewards"]["model"] == pytest.approx(wanted, abs=1e-4)
        assert sample.reward == pytest.approx(2 * wanted, abs=2e-4)


def test_scores_do_not_depend_on_the_cut(folder: Path) -> None:
    model, tokenizer = load(folder)
    samples = Desk(renderer_of(model, tokenizer)).replay_or_prompts(pairs(6))
    assert reward_scores(model, samples, budget=1) == pytest.approx(reward_scores(model, samples), abs=1e-5)
    assert reward_scores(model, []) == []
    ends = [[len(sample) - 1] for sample in samples]
    at_end = [scores[0] for scores in step_scores(model, samples, ends)]
    assert at_end == pytest.approx(torch.tensor(reward_scores(model, samples)).sigmoid().tolist(), abs=1e-5)


def test_a_head_is_rescaled_to_mean_0_and_deviation_1(folder: Path) -> None:
    model, tokenizer = load(folder)
    samples = Desk(renderer_of(model, tokenizer)).replay_or_prompts(rankings(6))
    before = reward_scores(model, samples)
    normalised(model, samples)
    after = torch.tensor(reward_scores(model, samples))
    assert float(after.mean()) == pytest.approx(0, abs=1e-5)
    assert float(after.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert sorted(range(len(before)), key=before.__getitem__) == sorted(range(len(before)), key=after.tolist().__getitem__)
    with pytest.raises(DataError, match="the same score"):
        normalised(model, samples[:1])


def test_a_model_without_a_head_is_refused_with_what_to_do(small_model: Path) -> None:
    model, tokenizer = load(small_model)
    with pytest.raises(ConfigError, match="no reward head; train one"):
        reward_scores(model, Desk(renderer_of(model, tokenizer)).replay_or_prompts(pairs(1)))


def test_a_critic_of_a_reward_model_starts_at_its_head(folder: Path) -> None:
    model, _ = load(folder)
    value = model.add_value_head()
    assert torch.equal(value.weight, model.heads["reward"].weight)
    assert value.weight is not model.heads["reward"].weight
