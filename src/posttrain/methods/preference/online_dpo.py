"""Online DPO: the pairs are the policy's own answers of this step, told apart by rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import best_and_worst, logistic
from posttrain.formulas.reductions import row_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.method import Method
from posttrain.methods.policy.grpo import need_groups
from posttrain.methods.preference.dpo import pair_metrics, referenced_views
from posttrain.types import Batch, Readings, State, Term, View


def sides(batch: Batch) -> Tensor:
    """`[B]`: 1 for the best scored answer of each group, -1 for its worst, 0 for all others and where all score alike."""
    side = torch.zeros_like(batch.rewards)
    members: dict[int, list[int]] = {}
    for row in batch.mask.any(-1).nonzero().flatten().tolist():
        members.setdefault(int(batch.group[row]), []).append(row)
    rewards = batch.rewards.tolist()
    for rows in members.values():
        found = best_and_worst([rewards[row] for row in rows])
        if found is not None:
            side[rows[found[0]]], side[rows[found[1]]] = 1, -1
    return side


@dataclass(frozen=True, kw_only=True)
class OnlineDPO(Method):
    """DPO on fresh pairs: of each prompt's answers the best one beats the worst one.

        L = -log sigmoid(beta (r_best - r_worst)),   r = sum_t log pi(y_t) - log ref(y_t)

    Rows are prompts with at least 2 answers each, scored by whatever the run names: a verifier, a reward model, a judge.
    One value a group; a group whose scores lie within 1e-8 trains nothing, and neither do the answers between best and worst.
    Left out: the paper's prompt for a language model as judge, and its IPO and SLiC losses.

    Source: "Direct Language Model Alignment from Online AI Feedback", arXiv:2402.04792, algorithm 1 (its number is from memory);
    best against worst of K is the rule of CheXalign, arXiv:2410.07025.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"
    unit: ClassVar[Literal["row", "pair", "group"]] = "group"
    least_samples: ClassVar[int] = 2

    beta: float = 0.1
    """Weight of the implicit KL to the reference; higher keeps the policy nearer."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; expected a number > 0")

    def views(self) -> dict[str, View]:
        """The policy at every step, the reference once."""
        return referenced_views()

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Best and worst of each group stay in the mask; the advantage says which is which."""
        need_groups(batch)
        side = sides(batch)
        mask = batch.mask & (side != 0).unsqueeze(-1)
        advantages = torch.where(mask, side.unsqueeze(-1), 0)
        return batch.with_(mask=mask, advantages=advantages).with_columns(side=side)

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over pairs: both rows of a pair hold its cost."""
        return {"loss": Term(row_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B]`: the cost of each row's pair."""
        reward = self.beta * sequence_sum(seen.policy.logprob - seen.reference.logprob, batch.mask)  # [B]
        side = batch.columns["side"]
        names, member = torch.unique(batch.group, return_inverse=True)  # [G], [B]
        margin = reward.new_zeros(len(names)).index_add(0, member, side * reward)  # [B] -> [G]
        best, worst = (side > 0).nonzero().flatten(), (side < 0).nonzero().flatten()  # rows of a group stand together
        pairs = torch.stack([best, worst], 1).flatten()  # best and worst in turn, as in a batch of pairs
        metrics = pair_metrics(reward[pairs], seen.policy.logprob[pairs], batch.mask[pairs])
        return {"loss": logistic(margin)[member], **metrics}
