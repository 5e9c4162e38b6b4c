"""Process reward models: the chance that a step is right, learnt from steps that were judged one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from posttrain import reads
from posttrain.formulas.steps import to_first_wrong
from posttrain.method import Method
from posttrain.types import Batch, Readings, State, View

Supervise = Callable[[Tensor], Tensor]
"""`labels [B, T]`, NaN where there is none `-> [B, T]`, NaN where none is to be learnt from."""


@dataclass(frozen=True, kw_only=True)
class ProcessReward(Method):
    """The last token of each step predicts whether that step is right.

        L = mean over labelled steps of -[y_k log sigmoid(z_k) + (1 - y_k) log sigmoid(-z_k)]

    z_k is the reward head at the last token of step k, which it has read; nothing is learnt anywhere else.  Rows are worked
    answers in steps (`prompt`, `steps`, `labels`, with a line's end or the row's `separator` between steps), or a `sample`
    that a policy wrote with `columns` `step_label` and `step_end`.  Labels lie in [0, 1]; null is no label.  Scores of steps
    become one an answer by `formulas.steps`: `product`, `minimum`, `mean`, `last`.  The source has three classes; here neutral
    steps are labelled right or left out.

    Source: "Let's Verify Step by Step", arXiv:2305.20050, section 2.6; the binary loss, and labels from rollouts, from
    Math-Shepherd, arXiv:2312.08935, equation 2.  Section and equation numbers are from memory.
    """

    rows: ClassVar[Literal["steps"]] = "steps"
    imitates: ClassVar[bool] = False

    supervise: Supervise = to_first_wrong
    """Which labels are learnt from: `to_first_wrong`, as people label, or `every_step`; functions of `formulas.steps`."""

    def views(self) -> dict[str, View]:
        """The reward head at the end of every labelled step."""
        return {"policy": View(reads=(reads.token_reward,))}

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """The ends of steps to be learnt from stay in the mask."""
        label = self.supervise(torch.where(batch.mask, batch.columns["step_label"], math.nan))
        return batch.with_(mask=batch.mask & ~label.isnan())

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the cost of each step's verdict, at its last token; a score of one half counts as wrong."""
        logit = seen.policy.token_reward
        label = batch.columns["step_label"].to(logit.dtype).nan_to_num()
        right = (logit.detach() > 0) == (label > 0.5)
        return {
            "loss": binary_cross_entropy_with_logits(logit, label, reduction="none"),
            "accuracy": right.to(logit.dtype),
            "score": logit.detach().sigmoid(),
            "label": label,
        }
