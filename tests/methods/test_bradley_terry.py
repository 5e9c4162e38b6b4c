"""The reward model by hand: comparison, margin, soft labels, centring."""

import math

import torch
from build import close, float64, make_batch, objective

from posttrain import reads
from posttrain.methods.reward.reward_model import BradleyTerry
from posttrain.types import Readings


def scalar(rewards, method: BradleyTerry | None = None, columns=None) -> torch.Tensor:
    batch = make_batch([2] * len(rewards), columns=columns)
    return objective(method or BradleyTerry(), batch, Readings.of(policy={"reward": rewards}))


def test_comparison_and_margin() -> None:
    close(scalar(float64([1.0, 0.2])), 0.371101)
    close(scalar(float64([1.0, 0.2]), columns={"margin": [1 / 3, 1 / 3]}), 0.486793)
    close(scalar(float64([1.0, 0.2]), columns={"margin": [1.0, 1.0]}), 0.798139)


def test_centring_is_added() -> None:
    close(scalar(float64([1.0, 0.2]), BradleyTerry(centering=0.01)), 0.371101 + 0.0144)
    shifted = scalar(float64([4.0, 3.2]))
    close(shifted, 0.371101)  # without centring a shift of both changes nothing


def test_soft_labels() -> None:
    rewards = float64([1.0, 0.2])
    loss = scalar(rewards, columns={"preference": [0.8, 0.8]})
    close(loss, 0.531101)
    loss.backward()
    close(rewards.grad, [-0.110026, 0.110026])


def test_start() -> None:
    batch, seen = make_batch([2, 2]), Readings.of(policy={"reward": float64([0.3, 0.3])})
    close(objective(BradleyTerry(), batch, seen), math.log(2))
    assert BradleyTerry().loss(batch, seen, None)["accuracy"].tolist() == [0.0]  # a tie counts as wrong


def test_a_pair_that_lost_a_row_counts_nowhere() -> None:
    batch = make_batch([2, 2, 2, 2])
    mask = batch.mask.clone()
    mask[3] = False
    seen = Readings.of(policy={"reward": float64([1.0, 0.2, math.nan, math.nan])})
    close(objective(BradleyTerry(), batch.with_(mask=mask), seen), 0.371101)


def test_the_reward_is_read_at_the_last_real_token() -> None:
    class Model:
        heads = {"reward": torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)}

    with torch.no_grad():
        Model.heads["reward"].weight.copy_(torch.tensor([[1.0, 10.0]]))
    hidden = torch.arange(10.0, dtype=torch.float64).view(5, 2)  # rows of 2 and 3 tokens, one after another
    close(reads.reward.fn(Model, hidden, torch.tensor([1, 4])), [2 + 30, 8 + 90])
    close(reads.reward.fn(Model, hidden[:1], torch.tensor([0])), [0 + 10])  # one row stays a row
