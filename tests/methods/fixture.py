"""Two answers of one group, of 2 and 3 tokens, with advantages +1 and -1: what the group methods are worked out on."""

from __future__ import annotations

import math

import torch
from build import make_batch, spread
from torch import Tensor

from posttrain.types import Batch, Readings

LOGPROB = [[-0.5, -1.0], [-0.7, -0.2, -1.5]]
OLD = [[-0.7, -0.9], [-0.7, -0.5, -1.4]]
REFERENCE = [[-0.6, -1.1], [-0.8, -0.3, -1.2]]


def two_answers(*, padding: int = 0, first_update: bool = False) -> tuple[Batch, Readings, Tensor]:
    """The credited batch, its readings, and the log-probabilities to differentiate by."""
    batch = make_batch([2, 3], group=[0, 0], rewards=[1.0, 0.0], padding=padding)
    batch = batch.with_(advantages=spread(batch, [[1.0] * 2, [-1.0] * 3]))
    logprob = spread(batch, LOGPROB, elsewhere=math.nan).requires_grad_()
    old = spread(batch, LOGPROB if first_update else OLD, elsewhere=math.inf)
    entropy = torch.zeros_like(old)
    seen = Readings.of(
        policy={"logprob": logprob, "entropy": entropy},
        old={"logprob": old},
        reference={"logprob": spread(batch, REFERENCE)},
    )
    return batch, seen, logprob
