"""ReLIFT: reinforce what the policy can do, and imitate what it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError, DataError
from posttrain.formulas.advantages import group_mean_centred
from posttrain.formulas.ratios import token_ratio
from posttrain.formulas.reductions import constant, token_mean
from posttrain.method import Method, Optimizer, Part
from posttrain.methods.policy.grpo import rollout_views, with_group_advantages
from posttrain.types import Batch, GroupStats, Readings, Row, State, Term, View

Order = Callable[[list[Any], list[Any]], list[Any]]
"""`(waiting, new) -> waiting`: where new rows stand in the buffer."""


def newest_first(waiting: list[Any], new: list[Any]) -> list[Any]:
    """New rows go in front, as in the public code; old ones may wait for ever."""
    return [*new, *waiting]


def first_in_first_out(waiting: list[Any], new: list[Any]) -> list[Any]:
    """New rows queue up behind."""
    return [*waiting, *new]


def hardest(groups: GroupStats, fail_value: float) -> list[int]:
    """Numbers of the groups in which every scored answer got exactly the fail value (not merely equal rewards)."""
    failed = (groups.count > 0) & ((groups.mean - fail_value).abs() < 1e-6) & (groups.std < 1e-6)
    return [int(number) for number in failed.nonzero().flatten()]


@dataclass(frozen=True, kw_only=True)
class Practice(Method):
    """ReLIFT's policy gradient: rewards less their group's mean, no clipping, token sums over a constant.

    Source: arXiv:2506.07527, the settings of the public scripts.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    max_tokens: int = 8192
    """The constant that token sums are divided by."""
    entropy: float = 0.001
    """Weight of the entropy bonus."""

    def views(self) -> dict[str, View]:
        """Policy, with its entropy, and old policy."""
        return {**rollout_views(), "policy": View(reads=(reads.logprob, reads.entropy))}

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Rewards less their group's mean."""
        return with_group_advantages(batch, group_mean_centred)

    def terms(self, state: State) -> dict[str, Term]:
        """Token sums over a constant, less the mean entropy."""
        return {"loss": Term(constant(self.max_tokens)), "entropy": Term(token_mean, weight=-self.entropy)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: cost and entropy of each token."""
        ratio = token_ratio(seen.policy.logprob, seen.old.logprob, batch.mask)
        return {"loss": -ratio * batch.advantages, "entropy": seen.policy.entropy}


@dataclass(frozen=True, kw_only=True)
class Study(Method):
    """ReLIFT's imitation: token-mean likelihood of the demonstrations, less an entropy bonus with gradient.

    Source: arXiv:2506.07527, equation 6 (its number is from memory).
    """

    entropy: float = 0.001
    """Weight of the entropy bonus."""

    def views(self) -> dict[str, View]:
        """The policy and its entropy."""
        return {"policy": View(reads=(reads.logprob, reads.entropy))}

    def terms(self, state: State) -> dict[str, Term]:
        """Both over all tokens."""
        return {"loss": Term(token_mean), "entropy": Term(token_mean, weight=-self.entropy)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: cost and entropy of each token."""
        return {"loss": -seen.policy.logprob, "entropy": seen.policy.entropy}


@dataclass(frozen=True, kw_only=True)
class ReLIFT(Method):
    """Prompts that no answer solved teach RL nothing; their demonstrations wait in a buffer and are imitated now and then.

    Every step is an RL step. Prompts whose answers all got the fail value join the buffer; once it holds
    `buffer_size` rows, that many are taken out and imitated in one step of their own, with an optimiser of their own,
    in the step after the one that filled it. A row that fails again while it waits is not added twice. Rows are
    prompts with at least 2 answers each, and each brings its demonstration (`completion`). The public code divides
    the token sum by L_max alone, so that its step grows with the batch; here it is the mean over answers. Left out:
    asking a teacher for a demonstration when it is needed.

    Source: "Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions",
    arXiv:2506.07527, algorithm 1; values from the scripts of TheRoadQaQ/ReLIFT (the paper's best `entropy` is 1e-4).
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    least_samples: ClassVar[int] = 2

    buffer_size: int = 128
    """Hardest rows that start an imitation step, and its size (M); -1 never imitates."""
    order: Order = newest_first
    """Where new rows stand in the buffer: `newest_first` or `first_in_first_out`."""
    fail_value: float = 0.0
    """The reward of a wrong answer; a failed format with another value does not count as hardest."""
    max_tokens: int = 8192
    """The constant that token sums of RL are divided by: the longest answer."""
    entropy: float = 0.001
    """Weight of the entropy bonus, in RL and in imitation."""
    study_lr: float = 1e-6
    """Learning rate of the imitation steps."""

    def __post_init__(self) -> None:
        if self.buffer_size < 1 and self.buffer_size != -1:
            raise ConfigError(f"buffer_size is {self.buffer_size}; expected at least 1, or -1 for RL alone")

    def views(self) -> dict[str, View]:
        """Its parts read."""
        return {}

    def terms(self, state: State) -> dict[str, Term]:
        """Its parts cost."""
        return {}

    def parts(self) -> dict[str, Part]:
        """RL always; imitation when the buffer has been emptied into `due`, with moments of its own."""
        practice = Part(method=Practice(max_tokens=self.max_tokens, entropy=self.entropy))
        study = Part(
            method=Study(entropy=self.entropy),
            weight=lambda state: 1.0 if state.memory.get("due") else 0.0,
            supply=lambda state: _rows(state.memory.get("due", ())),
            optimizer=Optimizer(lr=self.study_lr, clip=1.0),
            alone=True,
        )
        return {"rl": practice} if self.buffer_size == -1 else {"rl": practice, "sft": study}

    def begin(self) -> dict[str, Any]:
        """An empty buffer, and nothing due."""
        return {"buffer": [], "due": []}

    def remember(self, state: State, batch: Batch, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The hardest rows of this step join the buffer; enough of them fall due."""
        if state.groups is None or self.buffer_size == -1:
            return dict(state.memory)
        new = [dict(state.rows[number]) for number in hardest(state.groups, self.fail_value)]
        if any("completion" not in row and "messages" not in row for row in new):
            raise DataError("no answer solved a prompt whose row has no 'completion' to imitate; add one to every row")
        again = {_identity(row) for row in new}
        old = [row for row in state.memory.get("buffer", ()) if _identity(row) not in again]  # a row waits once
        waiting = self.order(old, new)
        take = self.buffer_size if len(waiting) >= self.buffer_size else 0
        return {"buffer": waiting[take:], "due": waiting[:take]}


def _identity(row: Row) -> str:
    """What makes two rows the same question."""
    return str(row.get("id") or row["prompt"])


def _rows(rows: Any) -> Sequence[Row]:
    return list(rows)
