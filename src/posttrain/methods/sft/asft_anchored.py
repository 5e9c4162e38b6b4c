"""Anchored supervised fine-tuning: DFT held to a reference by the full KL divergence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.reductions import token_mean
from posttrain.method import Method
from posttrain.methods.sft.dft import rectified
from posttrain.types import Batch, Readings, Reduction, State, Term, View


@dataclass(frozen=True, kw_only=True)
class AnchoredSFT(Method):
    """DFT drifts towards what is already likely; an anchor to the start, over the whole vocabulary, stops it.

        l_t = -sg[pi(y_t)] log pi(y_t) + lambda KL(ref || pi)

    Rows are demonstrations.  The reference is the model before fine-tuning (with LoRA: its adapters off).
    Not to be confused with aligned SFT, a preference method with the same acronym.

    Source: "Anchored Supervised Fine-Tuning", arXiv:2509.23753, equation 12; forward direction as in zhuchichi56/ASFT.
    The equation's number is from memory.
    """

    lam: float = 0.05
    """Weight of the KL to the reference (lambda).  Usual: 0.05 to 0.1."""
    reduce: Reduction = token_mean
    """How token values are averaged: a function of `formulas.reductions`."""

    def __post_init__(self) -> None:
        if self.lam < 0:
            raise ConfigError(f"lam is {self.lam}; expected a number >= 0 (0 is DFT)")

    def views(self) -> dict[str, View]:
        """The reference's logits beside the policy's."""
        if not self.lam:
            return {"policy": View(reads=(reads.logprob,))}
        return {
            "reference": View("reference", grad=False),
            "policy": View(reads=(reads.logprob, reads.forward_kl(beside="reference"))),
        }

    def terms(self, state: State) -> dict[str, Term]:
        """The cost and the anchor, each over all trained tokens."""
        anchor = {"kl": Term(self.reduce, weight=self.lam)} if self.lam else {}
        return {"loss": Term(self.reduce), **anchor}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the rectified cost and the divergence; `nll` and `weight` for the report."""
        loss, weight = rectified(seen.policy.logprob, batch.mask)
        anchor = {"kl": seen.policy.forward_kl} if self.lam else {}
        return {"loss": loss, **anchor, "nll": -seen.policy.logprob, "weight": weight}
