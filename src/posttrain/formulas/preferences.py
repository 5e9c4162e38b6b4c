"""Which of two (or of K) answers is better: losses of margins, rankings and ratings, one value a pair or a prompt.

Rows of a pair stand together: 2i is the chosen one, 2i + 1 the rejected.  `margin` is chosen minus rejected, `[P]`, P
= B / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected rows.  `[B, ...] -> [B / 2, ...]` twice."""
    return values[0::2], values[1::2]


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


def all_pairs(rewards: Tensor) -> Tensor:
    """The mean of `logistic(r_i - r_j)` over all pairs i < j of a ranking, best first.  `[..., K] -> [...]`.

    Source: InstructGPT, arXiv:2203.02155, equation 1.
    """
    better, worse = torch.triu_indices(rewards.shape[-1], rewards.shape[-1], offset=1, device=rewards.device)
    return logistic(rewards[..., better] - rewards[..., worse]).mean(-1)


def plackett_luce(rewards: Tensor) -> Tensor:
    """`sum_k [logsumexp_{j >= k} r_j - r_k]` of a ranking, best first.

    `[..., K] -> [...]`; for K = 2 it is `logistic`.

    Source: Zhu et al., arXiv:2301.11270, section 4.
    """
    remaining = rewards.flip(-1).logcumsumexp(-1).flip(-1)
    return (remaining - rewards).sum(-1)


def best_of(rewards: Tensor) -> Tensor:
    """`logsumexp_j r_j - r_0`, the best standing first: the first term of `plackett_luce`.  `[..., K] -> [...]`."""
    return rewards.logsumexp(-1) - rewards[..., 0]


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


