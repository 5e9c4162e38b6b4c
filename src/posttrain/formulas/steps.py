"""Scores of the steps of a worked answer: one number from several, labels for them, and what is done with the numbers.

Axes: `K` steps of an answer, `C` classes, `N` completions of a step, `M` answers to one question.  A score is a probability
that a step is right.  Answers with fewer steps are padded, and `there` `[..., K]` bool says which steps are real.  Numbers of
sections and equations are from memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from posttrain.formulas.advantages import group_zscore, group_zscore_sample

Answer = TypeVar("Answer", bound=Hashable)


def _there(scores: Tensor, there: Tensor | None) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool) if there is None else there


# --------------------------------------------------------------------------------------------------------------
# One score an answer.  An answer without a step scores 1 by `product` and `minimum` and 0 by `mean` and `last`.


def log_product(scores: Tensor, there: Tensor | None = None) -> Tensor:
    """`sum_k log p_k`, nats: the product of many steps without underflow.  `[..., K] -> [...]`."""
    return torch.where(_there(scores, there), scores, 1).log().sum(-1)


def product(scores: Tensor, there: Tensor | None = None) -> Tensor:
    """`prod_k p_k`: the chance that every step is right.  `[..., K] -> [...]`.

    Source: "Let's Verify Step by Step", arXiv:2305.20050, section 2.6.
    """
    return log_product(scores, there).exp()


def minimum(scores: Tensor, there: Tensor | None = None) -> Tensor:
    """`min_k p_k`: the weakest step.  `[..., K] -> [...]`.  Source: Math-Shepherd, arXiv:2312.08935."""
    return torch.where(_there(scores, there), scores, 1).amin(-1)


def mean(scores: Tensor, there: Tensor | None = None) -> Tensor:
    """`mean_k p_k`.  `[..., K] -> [...]`."""
    real = _there(scores, there)
    return torch.where(real, scores, 0).sum(-1) / real.sum(-1).clamp(min=1).to(scores.dtype)


def last(scores: Tensor, there: Tensor | None = None) -> Tensor:
    """The score of the last step.  `[..., K] -> [...]`."""
    real = _there(scores, there)
    at_end = real & (real.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(at_end, scores, 0).sum(-1)


def positive_only(logits: Tensor) -> Tensor:
    """`P(right)` of the classes wrong, neutral, right.  `[..., 3] -> [...]`."""
    return logits.softmax(-1)[..., 2]


def neutral_is_right(logits: Tensor) -> Tensor:
    """`P(right) + P(neutral)` of the classes wrong, neutral, right.  `[..., 3] -> [...]`.

    Source: "Let's Verify Step by Step", arXiv:2305.20050, appendix F (neutral counts as right there).
    """
    return logits.softmax(-1)[..., 1:].sum(-1)


# --------------------------------------------------------------------------------------------------------------
# Labels of steps; NaN is no label.


def every_step(labels: Tensor) -> Tensor:
    """All labels as they stand.  `[..., K] -> [..., K]`."""
    return labels


def to_first_wrong(labels: Tensor) -> Tensor:
    """Labels up to and including the first wrong step, one whose label is 0; NaN behind it.  `[..., K] -> [..., K]`.

    Source: "Let's Verify Step by Step", arXiv:2305.20050, section 2.6.
    """
    wrong = (labels == 0).long()
    return torch.where(wrong.cumsum(-1) - wrong > 0, math.nan, labels)


def labels_of_ratings(ratings: Sequence[int | None]) -> list[float | None]:
    """Ratings -1 (wrong), 0 (neutral) and 1 (right) as labels, neutral counting as right; None stays None.

    Example:
        >>> labels_of_ratings([1, 0, -1, None])
        [1.0, 1.0, 0.0, None]
    """
    return [None if rating is None else float(rating >= 0) for rating in ratings]


def soft_labels(right: Tensor) -> Tensor:
    """The share of a step's completions that reach the answer.  `[..., N] bool -> [...]`.

    Source: Math-Shepherd, arXiv:2312.08935, equation 4.
    """
    return right.to(torch.get_default_dtype()).mean(-1)


def hard_labels(right: Tensor) -> Tensor:
    """1 where any of a step's completions reaches the answer, 0 elsewhere.  `[..., N] bool -> [...]`.

    Source: Math-Shepherd, arXiv:2312.08935, equation 3.
    """
    return right.bool().any(-1).to(torch.get_default_dtype())


# --------------------------------------------------------------------------------------------------------------
# Choosing among answers.


def best_of_n(scores: Sequence[float], right: Sequence[bool | float], n: int) -> float:
    """The chance that the best-scored of n answers drawn from these M is right: `sum_i c_i C(M - 1 - i, n - 1) / C(M, n)`.

    Ties of scores are broken by order, the first before the second.

    Args:
        scores: One an answer, M >= n of them.
        right: Whether each is right, 0 or 1.
        n: How many are drawn, without putting back.

    Example:
        >>> best_of_n([0.9, 0.8, 0.7, 0.6], [True, True, False, False], 2)
        0.8333333333333334
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    total = math.comb(len(order), n)
    return sum(float(right[i]) * math.comb(len(order) - 1 - rank, n - 1) for rank, i in enumerate(order)) / total


def weighted_vote(answers: Sequence[Answer], scores: Sequence[float]) -> Answer:
    """The answer with the largest sum of scores; of equal ones, that which came first.

    Example:
        >>> weighted_vote(["A", "A", "A", "B"], [0.2, 0.2, 0.2, 0.9])
        'B'
    """
    totals: dict[Answer, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        totals.setdefault(answer, []).append(score)
    return max(totals, key=lambda answer: math.fsum(totals[answer]))


def majority(answers: Sequence[Answer]) -> Answer:
    """The commonest answer; of equally common ones, that which came first."""
    return weighted_vote(answers, [1.0] * len(answers))


# --------------------------------------------------------------------------------------------------------------
# Rewards of steps in reinforcement learning.


def _process(rewards: Tensor, ends: Tensor, group: Tensor, zscore: Callable[..., Tensor], eps: float) -> Tensor:
    row, place = ends.nonzero(as_tuple=True)
    normalised = zscore(rewards[row, place], group[row], eps=eps)
    spread = torch.zeros_like(rewards).index_put((row, place), normalised)
    return spread.flip(-1).cumsum(-1).flip(-1)


def process_advantages(rewards: Tensor, ends: Tensor, group: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Normalise the rewards of all steps of a group together; a token's advantage is the sum over steps that end at or after it.

        A_t = sum_{k: end of k >= t} (r_k - mean) / (std + eps),   mean and std over every step of every answer of the group

    The standard deviation is the population's.  Nothing here carries a gradient.

    Args:
        rewards: `[B, T]`, the reward of the step that ends at t.
        ends: `[B, T]` bool, where steps end; `rewards` is not read elsewhere.
        group: `[B]`, equal within a group.
        eps: Added to the standard deviation.

    Returns:
        `[B, T]`; 0 behind the last step, and everywhere where a group's steps all have one reward.

    Source: "DeepSeekMath", arXiv:2402.03300, section 4.1.3 (process supervision with GRPO).
    """
    return _process(rewards.detach(), ends, group, group_zscore, eps)


def process_advantages_sample(rewards: Tensor, ends: Tensor, group: Tensor, *, eps: float = 1e-6) -> Tensor:
    """As `process_advantages`, with the sample's standard deviation (divided by n - 1, as `torch.std`)."""
    return _process(rewards.detach(), ends, group, group_zscore_sample, eps)
