"""SASR: at every step either study or practise, drawn by how hard studying still pulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from posttrain.errors import ConfigError
from posttrain.method import Method, Part
from posttrain.methods.policy.grpo import GRPO
from posttrain.methods.sft.sft import SFT
from posttrain.random import SWITCH, single
from posttrain.types import Batch, State, Term, View

Against = Callable[[Mapping[str, Any]], float]
"""The norm that the last study norm is compared with, from the method's memory."""


def warmup_norm(memory: Mapping[str, Any]) -> float:
    """The gradient norm at the end of the warm-up."""
    return float(memory.get("warm", 0.0))


def practice_norm(memory: Mapping[str, Any]) -> float:
    """The gradient norm of the last practice step."""
    return float(memory.get("practice", 0.0))


def study_probability(last: float, against: float, gamma: float) -> float:
    """`last / (last + gamma * against)`; 0 / 0 is 0."""
    return last / (last + gamma * against) if last > 0 else 0.0


def shared_draw(state: State) -> float:
    """A number in [0, 1) that depends on (seed, step) alone, so that all ranks take the same branch."""
    return single(state.seed, 0, stream=SWITCH, step=state.step)


@dataclass(frozen=True, kw_only=True)
class SASR(Method):
    """A large SFT gradient means that the policy is far from the demonstrations: study; a small one: practise.

        study with p = g_last / (g_last + gamma g_warm), else one GRPO step

    g_last is the gradient norm (before clipping) of the last study step, g_warm the mean over the last steps of an
    SFT warm-up. Rows are prompts with at least 2 answers each that also hold a demonstration (`completion`).  One
    optimiser is shared. The source's code is not public: the rule is recalled from the paper, and the defaults of
    `warmup` and `gamma` are ours.

    Source: "Step-wise Adaptive Integration of Supervised Fine-tuning and Reinforcement Learning for Task-Specific
    LLMs", arXiv:2505.13026, section 3 (the switching rule).
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    warmup: int = 100
    """Study steps before the first draw (W)."""
    warmup_norms: int = 10
    """How many of the last warm-up steps g_warm is the mean of."""
    gamma: float = 1.0
    """How readily practice takes over; 0 studies for ever."""
    against: Against = warmup_norm
    """What g_last is compared with: `warmup_norm`, or `practice_norm` (a second reading of the paper)."""
    study: Method = field(default_factory=SFT)
    """The imitating part."""
    practice: Method = field(default_factory=lambda: GRPO(beta=0.0))
    """The practising part; its KL is off by default."""

    def __post_init__(self) -> None:
        if self.warmup < 1 or self.warmup_norms < 1 or self.gamma < 0:
            raise ConfigError(
                f"warmup is {self.warmup}, warmup_norms {self.warmup_norms}, gamma {self.gamma}; expected >= 1, >= 1, >= 0"
            )

    def views(self) -> dict[str, View]:
        """Its parts read."""
        return {}

    def terms(self, state: State) -> dict[str, Term]:
        """Its parts cost."""
        return {}

    def probability(self, state: State) -> float:
        """The chance that this step studies; 1 during the warm-up."""
        if state.step < self.warmup:
            return 1.0
        return study_probability(float(state.memory.get("last", 0.0)), self.against(state.memory), self.gamma)

    def studies(self, state: State) -> bool:
        """Does this step study?"""
        return shared_draw(state) < self.probability(state)

    def parts(self) -> dict[str, Part]:
        """Weights 1 and 0, or 0 and 1."""
        return {
            "rl": Part(method=self.practice, weight=lambda state: 0.0 if self.studies(state) else 1.0),
            "sft": Part(method=self.study, weight=lambda state: 1.0 if self.studies(state) else 0.0),
        }

    def begin(self) -> dict[str, Any]:
        """No norm known."""
        return {"last": 0.0, "warm": 0.0, "practice": 0.0, "norms": []}

    def remember(self, state: State, batch: Batch, metrics: Mapping[str, float]) -> dict[str, Any]:
        """A study step updates `last` (and `warm` while warming up), a practice step `practice` alone."""
        memory = {**self.begin(), **state.memory}
        if not self.studies(state):
            return {**memory, "practice": float(metrics.get("rl/gradient_norm", memory["practice"]))}
        last = float(metrics.get("sft/gradient_norm", memory["last"]))
        if state.step >= self.warmup:
            return {**memory, "last": last}
        norms = [*memory["norms"], last][-self.warmup_norms :]
        return {**memory, "last": last, "norms": norms, "warm": sum(norms) / len(norms)}
