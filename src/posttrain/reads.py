"""The stock reads: what methods ask of a forward.

Reads of logits get a chunk `[n, V]` (see `At` for what stands beside it) and return one value, or a few, for each of
its n tokens.  They work in float32 at least, and at the temperature at which the tokens were drawn.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from posttrain.formulas import divergences
from posttrain.types import At, Batch, Read

if TYPE_CHECKING:
    from torch import Tensor


LEAST = -80.0
"""Nats below which a token adds nothing to an entropy: its probability would be denormal, on which CPUs are slow."""


def log_probabilities(logits: Tensor, at: At) -> Tensor:
    """`log softmax(logits / temperature)`, in float32 at least; worked out once for all reads of a chunk.  `[n, V] -> [n, V]`."""
    if at.memo.get("logits") is logits:
        found = at.memo["logp"]
        return found if torch.is_grad_enabled() else found.detach()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    temperature = at.temperature
    if temperature.device.type != "cpu" or not bool((temperature == 1).all()):
        wide = wide / temperature.to(wide.dtype).unsqueeze(-1)
    logp = wide.log_softmax(-1)
    if torch.is_grad_enabled() or not logits.requires_grad:
        at.memo.update(logits=logits, logp=logp)
    return logp


def chosen(values: Tensor, at: At) -> Tensor:
    """The entry of the token that stands there.  `[n, V] -> [n]`."""
    return values.gather(-1, at.target.unsqueeze(-1)).squeeze(-1)


def _logprob(logits: Tensor, at: At) -> Tensor:
    return chosen(log_probabilities(logits, at), at)


def _entropy(logits: Tensor, at: At) -> Tensor:
    logp = log_probabilities(logits, at).clamp(min=LEAST)
    return -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def _watched_entropy(logits: Tensor, at: At) -> Tensor:
    return _entropy(logits, at)


def _mean_logprob(logits: Tensor, at: At) -> Tensor:
    return log_probabilities(logits, at).mean(-1)


def _argmax(logits: Tensor, at: At) -> Tensor:  # noqa: ARG001
    return logits.argmax(-1)


def _top(logits: Tensor, at: At, *, k: int) -> Tensor:
    return log_probabilities(logits, at).topk(k, dim=-1).values


def _top_tokens(logits: Tensor, at: At, *, k: int) -> Tensor:  # noqa: ARG001
    return logits.topk(k, dim=-1).indices


def _divergence(logits: Tensor, at: At, *, formula: Any) -> Tensor:
    assert at.beside is not None, "the engine gives the logits of the view named by `beside`"
    policy, reference = log_probabilities(logits, at), log_probabilities(at.beside, at)
    return formula(policy, reference.to(policy.dtype))  # type: ignore[no-any-return]


def _scalar(model: Any, hidden: Tensor, head: str) -> Tensor:
    out = model.heads[head](hidden).reshape(hidden.shape[:-1])  # [n, D] -> [n], whether the head gives [n] or [n, 1]
    return out if out.dtype == torch.float64 else out.float()


def _value(model: Any, hidden: Tensor, at: At) -> Tensor:  # noqa: ARG001
    return _scalar(model, hidden, "value")


def _reward(model: Any, hidden: Tensor, ends: Tensor) -> Tensor:
    return _scalar(model, hidden[ends], "reward")


def _token_reward(model: Any, hidden: Tensor, at: At) -> Tensor:  # noqa: ARG001
    return _scalar(model, hidden, "reward")


def _attention_to_prompt(probabilities: Tensor, batch: Batch) -> Tensor:
    positions = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    prompt = ~batch.mask & (positions < batch.lengths.unsqueeze(-1))  # [B, T]
    mass = torch.where(prompt[:, None, None, :], probabilities, 0).sum(-1).mean(1)  # [B, H, T, T] -> [B, T]
    return torch.where(batch.mask, mass, 0)


logprob = Read("logprob", "logits", _logprob)
"""`[B, T]`, nats: log-probability of the token that stands there."""

entropy = Read("entropy", "logits", _entropy)
"""`[B, T]`, nats: entropy over the whole vocabulary, with gradient."""

watched_entropy = Read("entropy", "logits", _watched_entropy)
"""`[B, T]`, nats: the same number for the report alone, without gradient."""

mean_logprob = Read("mean_logprob", "logits", _mean_logprob)
"""`[B, T]`, nats: mean log-probability over the vocabulary (label smoothing)."""

argmax = Read("argmax", "logits", _argmax)
"""`[B, T]` int64: the likeliest token."""

value = Read("value", "hidden", _value, head="value")
"""`[B, T]`: the value head at the state before each token."""

reward = Read("reward", "row", _reward, head="reward")
"""`[B]`: the reward head at the last real token of each row."""

token_reward = Read("token_reward", "after", _token_reward, head="reward")
"""`[B, T]`: the reward head at each trained token, which it has read: a verdict on the answer so far."""


def top_k(k: int) -> Read:
    """`[B, T, k]`, nats: the k largest log-probabilities, largest first."""
    return Read("top_k", "logits", partial(_top, k=k))


def top_k_tokens(k: int) -> Read:
    """`[B, T, k]` int64: the k likeliest tokens, likeliest first."""
    return Read("top_k_tokens", "logits", partial(_top_tokens, k=k))


def forward_kl(*, beside: str) -> Read:
    """`[B, T]`, nats: KL(that view || this one) over the whole vocabulary."""
    return Read("forward_kl", "logits", partial(_divergence, formula=divergences.forward_kl), beside=beside)


def reverse_kl(*, beside: str) -> Read:
    """`[B, T]`, nats: KL(this view || that one) over the whole vocabulary."""
    return Read("reverse_kl", "logits", partial(_divergence, formula=divergences.reverse_kl), beside=beside)


def attention_to_prompt(layer: int = -1) -> Read:
    """`[B, T]` in [0, 1]: share of attention that a trained token, as query, gives to untrained tokens; mean over heads."""
    return Read("attention_to_prompt", "attention", _attention_to_prompt, layer=layer)
