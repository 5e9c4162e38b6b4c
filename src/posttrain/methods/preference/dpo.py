"""Direct preference optimisation: a reward model that is the policy itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError
from posttrain.formulas.preferences import logistic, pairs
from posttrain.formulas.reductions import pair_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.method import Method
from posttrain.types import Batch, Readings, State, Term, View


def pair_metrics(reward: Tensor, logprob: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What every pairwise method reports, `[P]` each, from implicit rewards `[B]` and token log-probabilities `[B, T]`.

    The chosen answers' own log-probability is there to show displacement: a margin may grow while it falls.
    """
    (chosen, rejected), (likely, unlikely) = pairs(reward.detach()), pairs(sequence_sum(logprob.detach(), mask))
    return {
        "accuracy": (chosen > rejected).to(reward.dtype),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_logprob": likely,
        "rejected_logprob": unlikely,
    }


def referenced_views() -> dict[str, View]:
    """The policy at every step, the reference once."""
    return {"policy": View(reads=(reads.logprob,)), "reference": View("reference", (reads.logprob,), once=True)}


@dataclass(frozen=True, kw_only=True)
class DPO(Method):
    """The chosen answer beats the rejected one, measured in log-probability relative to a frozen reference.

        L = -log sigmoid(beta (r_chosen - r_rejected)),   r = sum_t log pi(y_t) - log ref(y_t)

    Rows come in pairs: row 2i is chosen, row 2i + 1 rejected.  One value a pair.
    Left out: label smoothing (`conservative_dpo`, `robust_dpo`) and length terms (`length_normalised_dpo`, `r_dpo`).

    Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv:2305.18290,
    equation 7.
    """

    rows: ClassVar[Literal["demonstrations", "pairs", "prompts"]] = "pairs"
    unit: ClassVar[Literal["row", "pair", "group"]] = "pair"

    beta: float = 0.1
    """Weight of the implicit KL to the reference; higher keeps the policy nearer.  Usual: 0.1 to 0.5."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; expected a number > 0")

    def views(self) -> dict[str, View]:
        """The policy at every step, the reference once."""
        return referenced_views()

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over pairs."""
        return {"loss": Term(pair_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[P]`: the cost of each pair."""
        reward = self.beta * sequence_sum(seen.policy.logprob - seen.reference.logprob, batch.mask)  # [B]
        chosen, rejected = pairs(reward)  # [B / 2] each
        return {"loss": logistic(chosen - rejected), **pair_metrics(reward, seen.policy.logprob, batch.mask)}
