"""Best-of-n distillation: imitate the best of the policy's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.reductions import token_mean
from posttrain.method import Method
from posttrain.types import Batch, Readings, Reduction, State, Term, View


def best_rows(batch: Batch, keep: int, threshold: float | None = None) -> Tensor:
    """`[B]` bool: of each group's scored answers the `keep` with the highest rewards (0: all) that reach the threshold.

    The first of ties wins; nothing is ever compared across groups.
    """
    live = batch.mask.any(-1)
    if threshold is not None:
        live &= batch.rewards >= threshold
    if not keep:
        return live
    rows = live.nonzero().flatten()
    order = rows[torch.argsort(batch.rewards[rows], descending=True, stable=True)]
    kept = torch.zeros_like(live)
    taken: dict[int, int] = {}
    for row, group in zip(order.tolist(), batch.group[order].tolist(), strict=True):
        taken[group] = taken.get(group, 0) + 1
        kept[row] = taken[group] <= keep
    return kept


def with_best(batch: Batch, keep: int, threshold: float | None = None) -> Batch:
    """The batch with nothing in its mask but the answers that `best_rows` keeps, each token with advantage 1."""
    mask = batch.mask & best_rows(batch, keep, threshold).unsqueeze(-1)
    return batch.with_(mask=mask, advantages=mask.to(batch.advantages.dtype))


@dataclass(frozen=True, kw_only=True)
class BestOfN(Method):
    """Answers are sampled, scored, and the best are imitated: no ratio, no baseline, no critic.

        c_t = -log pi(y_t)   of the `keep` best of each prompt's answers whose reward reaches `threshold`

    With `keep=0 threshold=1` it is rejection-sampling fine-tuning: every answer that the verifier calls right.  Only the order of
    rewards matters to `keep`.  Rows are prompts; with one answer each and no threshold it is SFT on the policy's own samples,
    whose expected gradient is zero.  Log-probabilities are read at the temperature of the sampling.  Left out: the expansion of
    the data with demonstrations, and ranking over all prompts at once.

    Source: "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment", arXiv:2304.06767, algorithm 1.
    The number of the algorithm is from memory.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"

    keep: int = 1
    """Answers of each prompt that are imitated (k); 0 keeps all that reach the threshold."""
    threshold: float | None = None
    """Least reward of an answer that is imitated, where there is one; 1 keeps what a verifier calls right."""
    reduce: Reduction = token_mean
    """How token costs are averaged: a function of `formulas.reductions`."""

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ConfigError(f"keep is {self.keep}; expected a number of answers, or 0 for all that reach the threshold")

    def views(self) -> dict[str, View]:
        """The policy alone."""
        return {"policy": View(reads=(reads.logprob, reads.watched_entropy))}

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """The best answers alone stay in the mask."""
        return with_best(batch, self.keep, self.threshold)

    def terms(self, state: State) -> dict[str, Term]:
        """The cost, averaged as `reduce` says."""
        return {"loss": Term(self.reduce)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the negative log-likelihood of each token, and the reward of the answers that are kept."""
        return {"loss": -seen.policy.logprob, "kept_reward": batch.rewards, "entropy": seen.policy.entropy}
