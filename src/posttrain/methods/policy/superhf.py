"""SuperHF: best-of-n distillation, round after round, held to the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.reductions import sum_of_row_means, token_mean
from posttrain.method import Method
from posttrain.methods.policy.best_of_n import with_best
from posttrain.types import Batch, Readings, State, Term, View


@dataclass(frozen=True, kw_only=True)
class SuperHF(Method):
    """The reward model without PPO: imitate the best of n own answers, and stay near the base over the whole vocabulary.

        c_t = -log pi(y_t) + beta KL(base || pi)   of the `keep` best of each prompt's answers, averaged over their tokens

    Rows are prompts.  The base is the model before training (the model `reference`; with LoRA the adapters off); its KL covers
    every mode of the base.  Where the answers to a prompt score alike the first is kept.  Left out: the inverse-loss and length
    penalties of the public code (off there), its clamp of the KL (it is exact here), and its shift by one: the KL is of the
    distributions that the tokens were drawn from.

    Source: "SuperHF: Supervised Iterative Learning from Human Feedback", arXiv:2310.16763, as coded in openfeedback/superhf;
    the defaults are those of its main configuration (with 16 answers a prompt, 2 prompts a step, top-p 0.95).
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "prompts"

    beta: float = 0.35
    """Weight of the KL to the base; at 0 no base is read.  Usual: 0.1 to 0.4."""
    keep: int = 1
    """Answers of each prompt that are imitated (k)."""
    kl_rows: int = 0
    """0 averages the KL over tokens; above, it is the sum of the token means of so many answers, as the public code has it over its
    minibatches (there 2)."""

    def __post_init__(self) -> None:
        if self.beta < 0 or self.keep < 1 or self.kl_rows < 0:
            raise ConfigError(
                f"beta is {self.beta}, keep {self.keep} and kl_rows {self.kl_rows}; expected beta >= 0, keep >= 1, kl_rows >= 0"
            )

    def views(self) -> dict[str, View]:
        """The base's logits beside the policy's, where beta is above 0."""
        if not self.beta:
            return {"policy": View(reads=(reads.logprob, reads.watched_entropy))}
        kl = reads.forward_kl(beside="reference")
        return {
            "reference": View("reference", grad=False),
            "policy": View(reads=(reads.logprob, reads.watched_entropy, kl)),
        }

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """The best answers alone stay in the mask."""
        return with_best(batch, self.keep)

    def terms(self, state: State) -> dict[str, Term]:
        """The cost over all tokens, and the KL as `kl_rows` says."""
        reduce = sum_of_row_means(self.kl_rows) if self.kl_rows else token_mean
        kl = {"kl": Term(reduce, weight=self.beta)} if self.beta else {}
        return {"loss": Term(token_mean), **kl}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the negative log-likelihood and the divergence of each token, and the reward of the answers that are kept."""
        kl = {"kl": seen.policy.forward_kl} if self.beta else {}
        return {"loss": -seen.policy.logprob, **kl, "kept_reward": batch.rewards, "entropy": seen.policy.entropy}
