"""The learning rate when none is given."""

from __future__ import annotations

from typing import Literal

from posttrain.errors import ConfigError

AT_7B: dict[str, tuple[float, float]] = {"sft": (2e-5, 0.5), "preference": (5e-7, 0.6), "rl": (1e-6, 0.6)}
"""For each kind of training: the usual rate at 7e9 weights, all trained, and how steeply smaller models take more."""

LARGEST = 1e-3
"""No derived rate of full training is above this."""


def default_lr(num_parameters: int, lora: bool, kind: Literal["sft", "preference", "rl"]) -> float:
    """A peak learning rate for AdamW: `rate at 7B * (7e9 / num_parameters) ** exponent`, ten times that with LoRA.

    A rule of thumb, not a result: it passes through the rates that published recipes use at 7B (2e-5 for fine-tuning,
    5e-7 for DPO in Tulu 3, arXiv 2411.15124; 1e-6 for GRPO) and near the larger ones that models of 0.1B and below
    need.  At most `LARGEST`.  That LoRA wants about ten times the rate of full training: Schulman et al., "LoRA
    Without Regret", 2025.

    Args:
        num_parameters: All weights of the model, trained or not.
        lora: Are only low-rank adapters trained?
        kind: Imitation, preferences, or a policy gradient.

    Example:
        >>> default_lr(7_000_000_000, False, "sft"), default_lr(7_000_000_000, True, "rl")
        (2e-05, 1e-05)
    """
    if kind not in AT_7B:
        raise ConfigError(f"kind is '{kind}'; expected one of {', '.join(AT_7B)}")
    rate, exponent = AT_7B[kind]
    full = min(LARGEST, rate * (7e9 / max(1, num_parameters)) ** exponent)
    return float(f"{full * (10 if lora else 1):.2g}")


__all__ = ["AT_7B", "LARGEST", "default_lr"]
