"""KTO: learn from answers that are marked good or bad, without pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from posttrain import reads
from posttrain.errors import ConfigError, DataError
from posttrain.formulas.divergences import difference
from posttrain.formulas.preferences import kto_value
from posttrain.formulas.reductions import row_mean
from posttrain.formulas.sequences import sequence_sum
from posttrain.method import Method
from posttrain.types import Batch, Readings, Row, Sample, State, Term, View, Writer


def mismatched(prompt: Sample, answer: Sample) -> Sample:
    """The prompt of one sample with the answer of another, token by token; both keep their origins."""
    cut, start = prompt.prompt_length, answer.prompt_length
    return answer.with_(
        tokens=prompt.tokens[:cut] + answer.tokens[start:],
        origin=prompt.origin[:cut] + answer.origin[start:],
        trained=prompt.trained[:cut] + answer.trained[start:],
        turn=prompt.turn[:cut] + answer.turn[start:] if prompt.turn and answer.turn else [],
        logprobs=None,
        sampled_logprobs=None,
    )


def marked(batch: Batch, name: str) -> Tensor:
    """`[B]` bool: a mark that `experience` wrote; a batch made without it holds good rows only."""
    return batch.columns[name] > 0 if name in batch.columns else torch.ones_like(batch.truncated)


@dataclass(frozen=True, kw_only=True)
class KTO(Method):
    """A good answer should gain on the reference by more than the policy has moved on the whole, a bad one by less.

        good: w_good (1 - sigmoid(beta (u - z))),   bad: w_bad (1 - sigmoid(beta (z - u))),   u = sum_t log pi - log ref

    z is the mean of u over answers given to the wrong prompt, at least 0, worked out once a batch and without gradient.
    Rows are demonstrations with a `label` (true: good).  Every row is read a second time with the next row's answer; those rows are
    measured and never trained.

    Source: "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306, equation 8.
    """

    imitates: ClassVar[bool] = False

    beta: float = 0.1
    """How risk-averse: weight of the implicit KL to the reference."""
    good: float = 1.0
    """Weight of good answers; keep (number of good times it) / (bad times theirs) between 1 and 4/3."""
    bad: float = 1.0
    """Weight of bad answers."""

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.good < 0 or self.bad < 0:
            raise ConfigError(f"beta is {self.beta}, good {self.good}, bad {self.bad}; expected > 0, >= 0, >= 0")

    def views(self) -> dict[str, View]:
        """The policy at every step and at the start of the batch, the reference once."""
        return {
            "start": View(reads=(reads.logprob,), once=True),
            "policy": View(reads=(reads.logprob,)),
            "reference": View("reference", (reads.logprob,), once=True),
        }

    def experience(self, writer: Writer, rows: Sequence[Row], state: State) -> list[Sample]:
        """The rows as they stand, then each prompt with the next row's answer."""
        if any("label" not in row for row in rows):
            raise DataError("KTO needs rows with a 'label' (true: good, false: bad); this one has none")
        soft = next((row["label"] for row in rows if row["label"] not in (0, 1)), None)
        if soft is not None:
            raise DataError(f"KTO needs labels that are true or false; found {soft!r}: decide which side it is on")
        samples = writer.replay(rows)
        labels = [float(bool(row["label"])) for row in rows]
        real = [s.with_(columns={**s.columns, "good": g, "real": 1.0}) for s, g in zip(samples, labels, strict=True)]
        twins = [
            mismatched(s, other).with_(index=len(samples) + s.index, columns={**s.columns, "good": 0.0, "real": 0.0})
            for s, other in zip(samples, samples[1:] + samples[:1], strict=True)
        ]
        return real + twins if len(rows) > 1 else real  # one row has no other's answer: z is 0

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """The reference point from the mismatched rows, which then leave the mask."""
        real = marked(batch, "real")
        u = sequence_sum(difference(seen.start.logprob, seen.reference.logprob, batch.mask), batch.mask)  # [B]
        measured = ~real & batch.mask.any(-1)
        z = torch.where(measured, u, 0).sum() / measured.sum().clamp(min=1)
        return batch.with_(mask=batch.mask & real.unsqueeze(-1)).with_columns(z=z.clamp(min=0).expand(batch.num_rows))

    def terms(self, state: State) -> dict[str, Term]:
        """The mean over answers."""
        return {"loss": Term(row_mean)}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B]`: the cost of each answer."""
        u = sequence_sum(difference(seen.policy.logprob, seen.reference.logprob, batch.mask), batch.mask)  # [B]
        good, z = marked(batch, "good"), batch.columns["z"]
        weight = torch.where(good, torch.full_like(u, self.good), self.bad)
        loss = weight * kto_value(self.beta * u, self.beta * z, good)
        return {"loss": loss, "reward": self.beta * u, "reference_point": self.beta * z}
