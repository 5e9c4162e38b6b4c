"""Which of two (or of K) answers is better: losses of margins, rankings and ratings, one value a pair or a prompt.

Rows of a pair stand together: 2i is the chosen one, 2i + 1 the rejected.  `margin` is chosen minus rejected, `[P]`, P
= B / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected rows.  `[B, ...] -> [B / 2, ...]` twice."""
    return values[0::2], values[1::2]


def best_and_worst(scores: Sequence[float]) -> tuple[int, int] | None:
    """Numbers of the best and of the worst of several scores, the first of ties; None where they lie within 1e-8.

    Example:
        >>> best_and_worst([0.25, 0.5, 0.5, 0.0]), best_and_worst([1.0, 1.0])
        ((1, 3), None)

    Source: CheXalign, arXiv:2410.07025, the public script that makes its pairs.
    """
    if not scores or not max(scores) - min(scores) > 1e-8:
        return None
    return scores.index(max(scores)), scores.index(min(scores))


def logistic(margin: Tensor) -> Tensor:
    """`-log sigmoid(margin)`: Bradley-Terry, and DPO with a scaled margin.  Any shape."""
    return -logsigmoid(margin)


def smoothed(margin: Tensor, preference: Tensor | float) -> Tensor:
    """`-p log sigmoid(m) - (1 - p) log sigmoid(-m)`, p the probability that the chosen one is better.  Any shape."""
    return -preference * logsigmoid(margin) - (1 - preference) * logsigmoid(-margin)


def unbiased(margin: Tensor, flip: float) -> Tensor:
    """`[-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2e)`: `logistic` in expectation when labels flip with chance e."""
    return (-(1 - flip) * logsigmoid(margin) + flip * logsigmoid(-margin)) / (1 - 2 * flip)


def hinge(margin: Tensor) -> Tensor:
    """`max(0, 1 - margin)`.  Any shape."""
    return (1 - margin).clamp(min=0)


def squared_margin(margin: Tensor, target: float) -> Tensor:
    """`(margin - target)^2`.  Any shape."""
    return (margin - target) ** 2


def log_odds(logprob: Tensor) -> Tensor:
    """`a - log(1 - exp(a))` for `a < 0`; a is kept one float step below 0, where the odds are infinite.  Any shape."""
    below = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def ranked(values: Tensor, group: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """One value a row as one line a group, in the order of its rows, live rows first.

    Args:
        values: `[B]`, one a row.
        group: `[B]`, equal within a group; groups may differ in size.
        live: `[B]` bool, rows that count.

    Returns:
        `[G, K]` values, K those of the largest group, 0 where a group has no more, and `[G, K]` bool: where it has.
    """
    names, member = torch.unique(group, return_inverse=True)  # [G], [B]
    own = torch.nn.functional.one_hot(member, len(names)) * live.long().unsqueeze(-1)  # [B, G]
    place = own.cumsum(0).gather(1, member.unsqueeze(-1)).squeeze(-1) - 1  # [B] among the live rows of its group
    shape = (len(names), max(1, int(own.sum(0).max())))
    at = (member[live], place[live])
    there = torch.zeros(shape, dtype=torch.bool, device=values.device).index_put(at, torch.ones_like(live[live]))
    return values.new_zeros(shape).index_put(at, values[live]), there


def _remaining(rewards: Tensor, there: Tensor | None) -> Tensor:
    """`logsumexp_{j >= k} r_j` over the entries that are there.  `[..., K] -> [..., K]`."""
    size = rewards.shape[-1]
    behind = torch.ones(size, size, dtype=torch.bool, device=rewards.device).triu(1)  # [k, j]: j stands behind k
    behind = behind if there is None else behind & there.unsqueeze(-2)
    kept = behind | torch.eye(size, dtype=torch.bool, device=rewards.device)  # never nothing, whose gradient would be NaN
    return torch.where(kept, rewards.unsqueeze(-2), -torch.inf).logsumexp(-1)


def all_pairs(rewards: Tensor, there: Tensor | None = None) -> Tensor:
    """The mean of `logistic(r_i - r_j)` over all pairs i < j of a ranking, best first.  `[..., K] -> [...]`.

    Args:
        rewards: Best first.
        there: `[..., K]` bool, which entries are real; the others stand last.  0 where fewer than two are.

    Source: InstructGPT, arXiv:2203.02155, equation 1.
    """
    better, worse = torch.triu_indices(rewards.shape[-1], rewards.shape[-1], offset=1, device=rewards.device)
    cost = logistic(rewards[..., better] - rewards[..., worse])
    if there is None:
        return cost.mean(-1)
    real = there[..., better] & there[..., worse]
    return torch.where(real, cost, 0).sum(-1) / real.sum(-1).clamp(min=1).to(cost.dtype)


def plackett_luce(rewards: Tensor, there: Tensor | None = None) -> Tensor:
    """`sum_k [logsumexp_{j >= k} r_j - r_k]` of a ranking, best first: minus the log-probability of that order.

    `[..., K] -> [...]`; for K = 2 it is `logistic`.  `there` as in `all_pairs`.

    Source: Zhu et al., arXiv:2301.11270, section 4.
    """
    cost = _remaining(rewards, there) - rewards
    return (cost if there is None else torch.where(there, cost, 0)).sum(-1)


def best_of(rewards: Tensor, there: Tensor | None = None) -> Tensor:
    """`logsumexp_j r_j - r_0`, the best standing first: the first term of `plackett_luce`.  `[..., K] -> [...]`.

    `there` as in `all_pairs`.
    """
    return _remaining(rewards, there)[..., 0] - rewards[..., 0]


def present_squared_error(predictions: Tensor, ratings: Tensor) -> Tensor:
    """The mean of `(prediction - rating)^2` over ratings that are present (not NaN).  `[B, J], [B, J] -> []`.

    Source: ArmoRM, arXiv:2406.12845, equation 2.
    """
    present = ~ratings.isnan()
    error = torch.where(present, predictions - torch.where(present, ratings, 0), 0)
    return (error**2).sum() / present.sum().clamp(min=1).to(predictions.dtype)


def gated(rewards: Tensor, gate_logits: Tensor, *, temperature: float = 10.0, scale: float = 1.0) -> Tensor:
    """`scale * softmax(gate / temperature) . rewards`.  `[..., J], [..., J] -> [...]`.

    Source: ArmoRM, arXiv:2406.12845.
    """
    return scale * ((gate_logits / temperature).softmax(-1) * rewards).sum(-1)


def kto_value(log_ratio: Tensor, reference_point: Tensor, desirable: Tensor) -> Tensor:
    """`1 - sigmoid(u - z)` of a desirable answer, `1 - sigmoid(z - u)` of an undesirable one.  `[B] -> [B]`.

    Source: KTO, arXiv:2402.01306, equation 8; `log_ratio` and `reference_point` are already scaled by beta.
    """
    gap = log_ratio - reference_point.detach()
    return torch.where(desirable, (-gap).sigmoid(), gap.sigmoid())


