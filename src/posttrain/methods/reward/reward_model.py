"""Reward modelling from comparisons: a scalar that orders answers as people did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.preferences import pairs, smoothed
from posttrain.formulas.reductions import pair_mean
from posttrain.method import Method
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(Method):
    """The better answer scores higher, by the logistic model of paired comparison.

        L = -p log sigmoid(d) - (1 - p) log sigmoid(-d),   d = r_chosen - r_rejected - m,   plus eta (r_chosen +
        r_rejected)^2

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected; the reward is read at the last token of each row, from
    the model's reward head.  A row's columns may bring `margin` (m, default 0) and `preference` (p, default 1: the
    share of judges that prefer the chosen one); a pair's columns are read on its chosen row.  A row that ranks K answers
    brings all K (K - 1) / 2 pairs, and each answer is read K - 1 times; `all_pairs` reads it once.

    Source: "Training language models to follow instructions with human feedback", arXiv:2203.02155, equation 1;
    margin from Llama 2, arXiv:2307.09288, equation 2; centring from "Helping or Herding?", arXiv:2312.09244.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"
    imitates: ClassVar[bool] = False

    centering: float = 0.0
    """Weight of the squared sum of the two rewards (eta), which fixes their free constant.  Usual: 0 or 0.01."""

    def __post_init__(self) -> None:
        if self.centering < 0:
            raise ConfigError(f"centering is {self.centering}; expected a number >= 0")

    def views(self) -> dict[str, View]:
        """The reward head of the model that learns."""
        return {"policy": View(reads=(reads.reward,))}

    def terms(self, state: State) -> dict[str, Term]:
        """The comparison, and the centring where it is on."""
        centre = {"centre": Term(pair_mean, weight=self.centering)} if self.centering else {}
        return {"loss": Term(pair_mean), **centre}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[P]`: the cost of each pair; a tie counts as wrong in `accuracy`."""
        chosen, rejected = pairs(seen.policy.reward)  # [B / 2] each
        gap = chosen - rejected
        margin = batch.columns["margin"][0::2] if "margin" in batch.columns else torch.zeros_like(gap)
        wanted = batch.columns["preference"][0::2] if "preference" in batch.columns else torch.ones_like(gap)
        return {
            "loss": smoothed(gap - margin, wanted),
            "centre": (chosen + rejected) ** 2,
            "accuracy": (gap > 0).to(gap.dtype),
            "gap": gap,
            "reward": (chosen + rejected) / 2,
        }
