"""PPO for language models: a critic says what each token should have earned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.advantages import gae, rewards_less_kl, whiten, whiten_keeping_mean
from posttrain.formulas.divergences import difference
from posttrain.formulas.ratios import token_ratio
from posttrain.formulas.reductions import token_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.formulas.surrogates import clipped, clipped_value_loss, was_clipped
from posttrain.method import Method, Part, Sum
from posttrain.methods.policy.grpo import check_clip
from posttrain.methods.sft.sft import SFT
from posttrain.types import Batch, Readings, State, Term, View


def adapted(beta: float, kl: float, *, target: float, horizon: float, num_samples: int) -> float:
    """The KL weight after a step: `beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)`.

    Source: "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * num_samples / horizon)


@dataclass(frozen=True, kw_only=True)
class PPO(Method):
    """Clipped policy gradient with generalised advantages; the KL to the start is part of the reward.

        R_t = -beta (log old_t - log ref_t), plus r at the last token;   A = whiten(GAE(R, V))
        c_t = -min(rho_t A_t, clip(rho_t) A_t) + vf 0.5 max((v - G)^2, (clip(v, old v) - G)^2)

    averaged over all tokens.  Rows are prompts; one answer each is enough.  Models: the policy, a `critic` with a
    value head and, where beta is above 0, the `reference`.  The value after the last token is 0, also where an answer
    was cut. The pretraining mix (PPO-ptx) is `with_pretraining`, a critic on the policy's own trunk `shared_critic`.
    Left out: weight averaging.

    Source: "Training language models to follow instructions with human feedback", arXiv:2203.02155, equation 2 and
    appendix C.4; lambda, value clip, vf and the adaptive KL from openai/lm-human-preferences, which the paper builds
    on.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    trains: ClassVar[tuple[str, ...]] = ("policy", "critic")

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    value_clip: float = 0.2
    """How far a value may move from the old one before its loss stops falling."""
    vf: float = 0.1
    """Weight of the value loss."""
    beta: float = 0.02
    """Weight of the KL to the reference in the reward (at the start, where it adapts); at 0 no reference is read."""
    gamma: float = 1.0
    """Discount of later rewards, in [0, 1]."""
    lam: float = 0.95
    """Decay of the advantage estimate (lambda), in [0, 1]; at 1 the return less the value."""
    whiten_rewards: bool = False
    """Bring token rewards, KL included, to spread 1 about their mean before the advantages (openai/lm-human-preferences does)."""
    missing_end: float | None = None
    """Reward of an answer that was cut at the limit, in place of what it earned: -10 in Tulu 3; left out, it keeps its own."""
    shared_critic: bool = False
    """Read values from a head on the policy's own trunk, which the value loss then shapes too: one model fewer, and `vf` counts."""
    target_kl: float = 0.0
    """KL an answer that the weight adapts to, in nats; 0 keeps the weight fixed."""
    horizon: float = 10000.0
    """Samples over which the weight adapts."""

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ConfigError(f"gamma is {self.gamma} and lam {self.lam}; expected both in [0, 1]")
        if self.beta < 0 or self.target_kl < 0 or self.horizon <= 0:
            raise ConfigError(f"beta {self.beta}, target_kl {self.target_kl}, horizon {self.horizon}; expected >= 0, >= 0, > 0")
        if self.target_kl and not self.beta:
            raise ConfigError("target_kl adapts beta, which is 0 and would stay 0; set beta above 0 or leave target_kl out")
        if self.shared_critic:
            object.__setattr__(self, "trains", ("policy",))  # the one class attribute that a setting decides

    def views(self) -> dict[str, View]:
        """Policy and critic, before the first update and at every one; the reference where beta is above 0."""
        live = (reads.logprob, reads.watched_entropy)
        if self.shared_critic:
            views = {
                "old": View(reads=(reads.logprob, reads.value), once=True),
                "policy": View(reads=(*live, reads.value)),
            }
        else:
            views = {
                "old": View(reads=(reads.logprob,), once=True, credit=self.beta > 0),
                "old_critic": View("critic", (reads.value,), once=True),
                "policy": View(reads=live),
                "critic": View("critic", (reads.value,)),
            }
        return {**views, "reference": View("reference", (reads.logprob,), once=True)} if self.beta > 0 else views

    def beta_at(self, state: State) -> float:
        """The KL weight of this step."""
        return float(state.memory.get("beta", self.beta))

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Rewards of tokens, advantages whitened over the batch, and returns (from advantages before whitening)."""
        kl = torch.zeros_like(batch.logprobs)
        if self.beta > 0:
            kl = difference(seen.old.logprob, seen.reference.logprob, batch.mask)
        score = batch.rewards
        if self.missing_end is not None:
            score = torch.where(batch.truncated, self.missing_end, score)
        rewards = rewards_less_kl(score, kl, batch.mask, beta=self.beta_at(state))
        if self.whiten_rewards:
            rewards = whiten_keeping_mean(rewards, batch.mask)
        values = (seen.old if self.shared_critic else seen.old_critic).value.to(rewards.dtype)
        advantages, returns = gae(rewards, values, batch.mask, gamma=self.gamma, lam=self.lam)
        whitened = whiten(advantages, batch.mask)
        return batch.with_(advantages=whitened, returns=returns).with_columns(kl=sequence_sum(kl, batch.mask))

    def terms(self, state: State) -> dict[str, Term]:
        """Surrogate and value loss, each over all tokens."""
        return {"loss": Term(token_mean), "value_loss": Term(token_mean, weight=self.vf)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: surrogate and value loss of each token."""
        ratio = token_ratio(seen.policy.logprob, seen.old.logprob, batch.mask)
        low, high = self.clip_low, self.clip_high
        critic, old_critic = (seen.policy, seen.old) if self.shared_critic else (seen.critic, seen.old_critic)
        value, old = critic.value, old_critic.value
        return {
            "loss": clipped(ratio, batch.advantages, low=low, high=high),
            "value_loss": clipped_value_loss(value, old, batch.returns, clip=self.value_clip),
            "kl_per_answer": batch.columns["kl"],
            "value": value,
            "clip_fraction": was_clipped(ratio.detach(), batch.advantages, low=low, high=high),
            "entropy": seen.policy.entropy,
        }

    def begin(self) -> dict[str, Any]:
        """The KL weight, where it adapts."""
        return {"beta": self.beta} if self.target_kl else {}

    def remember(self, state: State, batch: Batch, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The KL weight for the next step."""
        live = batch.mask.any(-1)
        count = int(live.sum())
        if not self.target_kl or not count:
            return dict(state.memory)
        kl = float(batch.columns["kl"][live].mean())
        target, horizon = self.target_kl, self.horizon
        return {"beta": adapted(self.beta_at(state), kl, target=target, horizon=horizon, num_samples=count)}


def with_pretraining(ppo: PPO, *, weight: float = 27.8, data: str = "pretraining") -> Sum:
    """PPO-ptx: every update also maximises the likelihood of pretraining text, `weight` (gamma_ptx) times.

    Source: arXiv:2203.02155, equation 2; 27.8 with 8 times more pretraining examples than episodes (appendix C.4).
    """
    return Sum(members={"ppo": Part(method=ppo), "ptx": Part(method=SFT(), weight=weight, data=data)})
