"""How much better than expected: rewards become advantages.  Nothing here carries a gradient.

Group formulas take `rewards [B]`, `group [B]` (equal within a group) and `live [B]` bool, the rows that were scored;
rows that were not are left out of every statistic and get 0.  A group whose rewards are all equal, up to float noise,
gets exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.formulas.sequences import last_trained, masked_mean, next_trained, reverse_discounted_sum


def _statistics(rewards: Tensor, group: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards in float64, and of each row's group: live count, mean, and whether its rewards differ.  `[B]` each."""
    live = torch.ones_like(rewards, dtype=torch.bool) if live is None else live
    noise = 1e-8 if rewards.dtype == torch.float64 else 1e-6
    values = torch.where(live, rewards, 0).to(torch.float64)
    names, member = torch.unique(group, return_inverse=True)  # [G], [B]
    zeros = values.new_zeros(len(names))
    count = zeros.index_add(0, member, live.to(values.dtype))
    mean = zeros.index_add(0, member, values) / count.clamp(min=1)
    centred = torch.where(live, values - mean[member], 0)
    widest = zeros.scatter_reduce(0, member, centred.abs(), "amax")
    scale = zeros.scatter_reduce(0, member, values.abs(), "amax")
    return values, count[member], mean[member], (widest > noise * scale)[member] & live


def group_mean_centred(rewards: Tensor, group: Tensor, live: Tensor | None = None) -> Tensor:
    """`r_i - mean_G`.  `[B] -> [B]`.  Source: Dr. GRPO, arXiv:2503.20783."""
    values, _, mean, differs = _statistics(rewards, group, live)
    return torch.where(differs, values - mean, 0).to(rewards.dtype)


def leave_one_out(rewards: Tensor, group: Tensor, live: Tensor | None = None) -> Tensor:
    """`r_i - mean of the others = G / (G - 1) (r_i - mean_G)`.  `[B] -> [B]`.  Source: RLOO, arXiv:2402.14740."""
    values, count, mean, differs = _statistics(rewards, group, live)
    return torch.where(differs, (values - mean) * count / (count - 1).clamp(min=1), 0).to(rewards.dtype)


def _zscore(rewards: Tensor, group: Tensor, live: Tensor | None, *, eps: float, freedom: int) -> Tensor:
    values, count, mean, differs = _statistics(rewards, group, live)
    centred = torch.where(differs, values - mean, 0)
    names, member = torch.unique(group, return_inverse=True)
    squares = centred.new_zeros(len(names)).index_add(0, member, centred**2)[member]
    std = (squares / (count - freedom).clamp(min=1)).sqrt()
    return torch.where(differs, centred / torch.where(differs, std + eps, 1), 0).to(rewards.dtype)


def group_zscore(rewards: Tensor, group: Tensor, live: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """`(r_i - mean_G) / (std_G + eps)`, population standard deviation (divided by G).  `[B] -> [B]`."""
    return _zscore(rewards, group, live, eps=eps, freedom=0)


def group_zscore_sample(rewards: Tensor, group: Tensor, live: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """`(r_i - mean_G) / (std_G + eps)`, sample standard deviation (divided by G - 1, as `torch.std`).  `[B] -> [B]`.

    Source: GRPO, arXiv:2402.03300, equation 3; neither eps nor the divisor is printed there, and public code has this
    one.
    """
    return _zscore(rewards, group, live, eps=eps, freedom=1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over trained tokens; the value after the last is 0, also when the answer was cut.

        delta_t = R_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

    Args:
        rewards: `[B, T]`, the reward that token t earns.
        values: `[B, T]`, the value of the state before token t.
        mask: `[B, T]` bool.  t + 1 is the next trained token.

    Returns:
        Advantages (not whitened) and returns, `[B, T]` each, 0 where nothing is trained.

    Source: Schulman et al., arXiv:1506.02438, equation 16.
    """
    delta = rewards + gamma * next_trained(values, mask) - values
    advantages = torch.where(mask, reverse_discounted_sum(delta, mask, gamma * lam), 0)
    return advantages, torch.where(mask, advantages + values, 0)


def _over_spread(centred: Tensor, variance: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`centred / sqrt(variance + eps)`, and exactly 0 where nothing differs by more than float noise."""
    noise = 1e-8 if centred.dtype == torch.float64 else 1e-6
    differs = centred.abs().amax() > noise * scale if centred.numel() else torch.zeros_like(scale, dtype=torch.bool)
    return torch.where(differs, centred / (variance + eps).sqrt(), 0)


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over all trained tokens of the batch, population variance.  `[B, T] -> [B, T]`."""
    centred = torch.where(mask, values - masked_mean(values, mask), 0)
    return _over_spread(centred, masked_mean(centred**2, mask), masked_mean(values.abs(), mask), eps)


def whiten_sample(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """As `whiten`, with the variance divided by n - 1.  `[B, T] -> [B, T]`."""
    centred = torch.where(mask, values - masked_mean(values, mask), 0)
    variance = (centred**2).sum() / (mask.sum() - 1).clamp(min=1).to(values.dtype)
    return _over_spread(centred, variance, masked_mean(values.abs(), mask), eps)


def whiten_keeping_mean(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """As `whiten`, with the mean put back: spread 1 about the mean that was there.  `[B, T] -> [B, T]`.

    Source: openai/lm-human-preferences, the whitening of token rewards (`shift_mean=False`).
    """
    return torch.where(mask, whiten(values, mask, eps=eps) + masked_mean(values, mask), 0)


def score_at_end(score: Tensor, mask: Tensor) -> Tensor:
    """The reward of each row, placed on its last trained token.  `[B], [B, T] -> [B, T]`."""
    return torch.where(last_trained(mask), score.unsqueeze(-1), 0)


def rewards_less_kl(score: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """`R_t = -beta kl_t`, plus the row's score on its last trained token.  `[B], [B, T], [B, T] -> [B, T]`.

    Source: InstructGPT, arXiv:2203.02155, equation 2, as coded in openai/lm-human-preferences.
    """
    return score_at_end(score, mask) - beta * torch.where(mask, kl, 0)


def soft_overlong(lengths: Tensor, *, max_tokens: int, cache: int) -> Tensor:
    """A penalty in [-1, 0] that grows over the last `cache` tokens before `max_tokens`, and is -1 beyond.

    `[B] -> [B]`.

    Args:
        lengths: `[B]`, tokens of each answer.
        max_tokens: The longest answer.
        cache: The width of the ramp, in tokens.

    Source: DAPO, arXiv:2503.14476, equation 13.
    """
    return ((max_tokens - cache - lengths).to(torch.get_default_dtype()) / cache).clamp(min=-1.0, max=0.0)
