"""Outcome reward models: the chance that an answer is right, learnt from answers that were judged as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from posttrain import reads
from posttrain.data.steps import as_label
from posttrain.errors import DataError
from posttrain.formulas.sequences import last_trained
from posttrain.method import Method
from posttrain.types import Batch, Readings, Row, Sample, State, View, Writer


def with_labels(samples: Sequence[Sample]) -> list[Sample]:
    """Samples with the column `label` in [0, 1], from it or from the row's `label`; null is NaN, no label.

    Raises:
        DataError: A row has none.
    """
    made = []
    for number, sample in enumerate(samples):
        if "label" not in {*sample.columns, *sample.info}:
            raise DataError("an outcome reward model needs rows with a 'label' from 0 (wrong) to 1 (right); this one has none")
        label = as_label(sample.columns.get("label", sample.info.get("label")), sample.query or f"row {number}")
        made.append(sample.with_(columns={**sample.columns, "label": label}))
    return made


def labelled(batch: Batch) -> Batch:
    """The batch without the rows that have no label."""
    return batch.with_(mask=batch.mask & ~batch.columns["label"].isnan().unsqueeze(-1))


def verdicts(batch: Batch, logit: Tensor) -> dict[str, Tensor]:
    """Each token's cost `[B, T]`, and of each row `[B]` its score at the last token and whether that is on the label's side."""
    label = batch.columns["label"].to(logit.dtype).nan_to_num()  # [B]
    cost = binary_cross_entropy_with_logits(logit, label.unsqueeze(-1).expand_as(logit), reduction="none")
    score = torch.where(last_trained(batch.mask), logit.detach(), 0).sum(-1).sigmoid()  # [B, T] -> [B]
    right = (score > 0.5) == (label > 0.5)
    return {"loss": cost, "accuracy": right.to(logit.dtype), "score": score}


@dataclass(frozen=True, kw_only=True)
class OutcomeReward(Method):
    """Every token of an answer predicts whether the whole answer is right.

        L = mean over completion tokens of -[y log sigmoid(z_t) + (1 - y) log sigmoid(-z_t)]

    z_t is the reward head at token t, which it has read; a finished answer scores sigmoid(z) at its last token.  Rows are
    demonstrations with a `label` y in [0, 1], of the row or among its columns; null is no label.  All completion tokens of an
    update weigh the same, whatever their answer.  The source adds the loss of a language model on the same tokens; here that
    is a `Sum` with `sft`.

    Source: "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168, section 4.2 (token-level verifiers; the
    section is from memory).
    """

    imitates: ClassVar[bool] = False

    def views(self) -> dict[str, View]:
        """The reward head at every token."""
        return {"policy": View(reads=(reads.token_reward,))}

    def experience(self, writer: Writer, rows: Sequence[Row], state: State) -> list[Sample]:
        """Answers as they stand, with their labels."""
        return with_labels(writer.replay(rows))

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """Rows without a label leave the mask."""
        return labelled(batch)

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the cost of each token's verdict; `accuracy` and `score` are those of the last token."""
        return verdicts(batch, seen.policy.token_reward)


@dataclass(frozen=True, kw_only=True)
class OutcomeRewardLast(Method):
    """The last token of an answer, and no other, predicts whether it is right.

        L = mean over answers of -[y log sigmoid(z) + (1 - y) log sigmoid(-z)],   z the reward head at the last trained token

    Rows are as those of `outcome_reward`, and so is the score; an answer weighs the same whatever its length.

    Source: "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168, section 4.3 (solution-level verifiers; the
    section is from memory).
    """

    imitates: ClassVar[bool] = False

    def views(self) -> dict[str, View]:
        """The reward head at the last token."""
        return {"policy": View(reads=(reads.token_reward,))}

    def experience(self, writer: Writer, rows: Sequence[Row], state: State) -> list[Sample]:
        """Answers as they stand, with their labels."""
        return with_labels(writer.replay(rows))

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """The last token of each row with a label stays in the mask."""
        known = labelled(batch)
        return known.with_(mask=last_trained(known.mask))

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """`[B, T]`: the cost of the verdict at the last token."""
        return verdicts(batch, seen.policy.token_reward)
