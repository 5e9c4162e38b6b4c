"""One-token rollouts: at every demonstrated token the policy draws candidates, and the demonstration scores them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.reductions import sequence_mean
from posttrain.method import Method
from posttrain.random import ONE_TOKEN, categorical, uniform
from posttrain.reads import log_probabilities
from posttrain.types import At, Batch, Read, Readings, Reduction, State, Term, View


def sampled_cost(logits: Tensor, at: At, *, samples: Tensor, beta: float) -> Tensor:
    """Cost and hit rate of given candidates.  `[n, V], [n, K] -> [n, 2]`."""
    logp = log_probabilities(logits, at).gather(-1, samples)  # [n, K]
    hit = samples == at.target.unsqueeze(-1)
    reward = torch.where(hit, torch.ones_like(logp), beta)
    return torch.stack([-(reward * logp).mean(-1), hit.to(logp.dtype).mean(-1)], dim=-1)


def sampled(logits: Tensor, at: At, *, kappa: float, beta: float, num_samples: int) -> Tensor:
    """Draw candidates at temperature kappa, and cost them at temperature 1.  `[n, V] -> [n, 2]`."""
    with torch.no_grad():
        draws = uniform(at.seed, at.step, at.index, at.position, draws=num_samples, stream=ONE_TOKEN)
        samples = categorical((logits.double() / kappa).softmax(-1), draws.view(-1, num_samples))
    return sampled_cost(logits, at, samples=samples, beta=beta)


def exact(logits: Tensor, at: At, *, kappa: float, beta: float) -> Tensor:
    """The expectation of `sampled` over candidates: cost and hit rate.  `[n, V] -> [n, 2]`."""
    logp = log_probabilities(logits, at)
    with torch.no_grad():
        proposal = (logits.to(logp.dtype) / kappa).softmax(-1)  # [n, V]
        hit = torch.nn.functional.one_hot(at.target, logits.shape[-1]).to(logp.dtype)
        reward = beta + (1 - beta) * hit
    return torch.stack([-(proposal * reward * logp).sum(-1), (proposal * hit).sum(-1)], dim=-1)


@dataclass(frozen=True, kw_only=True)
class OTR(Method):
    """Makes SFT on-policy one token at a time: the demonstrated token is rewarded when the policy draws it.

        l_t = -1/K sum_j sg[R(a_j, y_t)] log pi(a_j),   a_j ~ softmax(logits / kappa),   R = 1 if a = y_t else beta

    At kappa = 1 its expected gradient is (1 - beta) times that of DFT.  No importance ratio is applied, as in the
    source. Draws are keyed by (seed, step, index, position), so that a recompute draws the same.  The loss may be
    negative and does not measure progress; `hit_rate` does.  Rows are demonstrations.

    Source: "One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient", arXiv:2509.26313,
    equation 8 (its number and the default of beta are from memory).
    """

    num_samples: int = 256
    """Candidates drawn at each position (K), with replacement."""
    kappa: float = 1.3
    """Temperature at which candidates are drawn; the cost is always taken at 1."""
    beta: float = -0.1
    """Reward of a candidate that is not the demonstrated token.  Usual: -0.5 to 0."""
    reduce: Reduction = sequence_mean
    """How token losses are averaged: a function of `formulas.reductions`."""

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.kappa <= 0:
            raise ConfigError(f"num_samples is {self.num_samples} and kappa {self.kappa}; expected >= 1 and > 0")

    def views(self) -> dict[str, View]:
        """One read of the policy's logits."""
        draw = partial(sampled, kappa=self.kappa, beta=self.beta, num_samples=self.num_samples)
        return {"policy": View(reads=(Read("rollout", "logits", draw),))}

    def terms(self, state: State) -> dict[str, Term]:
        """The chosen reduction."""
        return {"loss": Term(self.reduce)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the cost of each position, and how often the demonstrated token was drawn."""
        cost, hits = seen.policy.rollout.unbind(-1)
        return {"loss": cost, "hit_rate": hits.detach()}


@dataclass(frozen=True, kw_only=True)
class ExactOTR(Method):
    """One-token rollouts without sampling noise: the sum over all candidates instead of K draws.

        l_t = -sum_a sg[pi'(a) R(a, y_t)] log pi(a),   pi' = softmax(logits / kappa)

    Costs the whole vocabulary once more, and no other forward.  Rows are demonstrations.

    Source: "One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient", arXiv:2509.26313, the
    expectation of equation 8 (its number and the default of beta are from memory).
    """

    kappa: float = 1.3
    """Temperature of the candidates' distribution; the cost is always taken at 1."""
    beta: float = -0.1
    """Reward of a candidate that is not the demonstrated token.  Usual: -0.5 to 0."""
    reduce: Reduction = sequence_mean
    """How token losses are averaged: a function of `formulas.reductions`."""

    def __post_init__(self) -> None:
        if self.kappa <= 0:
            raise ConfigError(f"kappa is {self.kappa}; expected a number > 0")

    def views(self) -> dict[str, View]:
        """One read of the policy's logits."""
        return {"policy": View(reads=(Read("rollout", "logits", partial(exact, kappa=self.kappa, beta=self.beta)),))}

    def terms(self, state: State) -> dict[str, Term]:
        """The chosen reduction."""
        return {"loss": Term(self.reduce)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the expected cost of each position, and the chance to draw the demonstrated token."""
        cost, hits = seen.policy.rollout.unbind(-1)
        return {"loss": cost, "hit_rate": hits.detach()}
