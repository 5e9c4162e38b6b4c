"""Reward modelling from comparisons, judged at every token: a verdict on the text so far, not on its end alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain import reads
from posttrain.formulas.preferences import pairs, smoothed
from posttrain.formulas.reductions import pair_mean
from posttrain.method import Method
from posttrain.types import Batch, Readings, State, Term, View


def held(values: Tensor, mask: Tensor) -> Tensor:
    """Each row's values, that of its last trained token going on behind it.  `[B, T], [B, T] -> [B, T]`."""
    places = torch.arange(mask.shape[1], device=mask.device)
    end = torch.where(mask, places, 0).amax(-1, keepdim=True)  # [B, 1]
    return values.gather(-1, torch.minimum(places.expand_as(mask), end))


@dataclass(frozen=True, kw_only=True)
class TokenBradleyTerry(Method):
    """From the first token in which two answers differ, the better one scores higher at every token.

        L = mean_{t >= divergence} [-p log sigmoid(d_t) - (1 - p) log sigmoid(-d_t)],   d_t = z_w,t - z_l,t,   one value a pair

    z_t is the reward head at token t, which it has read; the shorter answer keeps its last score while the longer goes on.
    An answer's reward is its score at the last token, as with `bradley_terry`, but every token of it learns, so that a mistake
    is blamed where it stands.  Rows come in pairs: row 2i is chosen, row 2i + 1 rejected; rankings give all their pairs.  The
    column `preference` may bring p (default 1), read on the chosen row.

    Source: "DeepSpeed-Chat: Easy, Fast and Affordable RLHF Training of ChatGPT-like Models at All Scales", arXiv:2308.01320;
    the loss is that of its public code (from memory), which has no p.
    """

    rows: ClassVar[Literal["pairs"]] = "pairs"
    unit: ClassVar[Literal["pair"]] = "pair"
    imitates: ClassVar[bool] = False

    def views(self) -> dict[str, View]:
        """The reward head at every token of the answers."""
        return {"policy": View(reads=(reads.token_reward,))}

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over pairs."""
        return {"loss": Term(pair_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[P]`: the cost of each pair; a tie at the end counts as wrong in `accuracy`."""
        scores = held(seen.policy.token_reward, batch.mask)  # [B, T]
        better, worse = pairs(scores)  # [P, T] each
        (first, second), (one, other) = pairs(batch.tokens), pairs(batch.mask)
        written = one | other
        differ = written & ((first != second) | (one != other))
        counted = written & (differ.cumsum(-1) > 0)  # [P, T]
        wanted = batch.columns["preference"][0::2, None] if "preference" in batch.columns else 1.0
        cost = torch.where(counted, smoothed(better - worse, wanted), 0).sum(-1) / counted.sum(-1).clamp(min=1).to(scores.dtype)
        gap = (better - worse)[:, -1].detach()
        return {
            "loss": cost,
            "accuracy": (gap > 0).to(gap.dtype),
            "gap": gap,
            "reward": (better + worse)[:, -1].detach() / 2,
        }
