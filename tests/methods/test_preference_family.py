"""The relatives of DPO by hand, all on one fixture: 10 chosen tokens, 20 rejected.

S = (-12, -15) under the policy, R = (-13, -14.5) under the reference: h = 1.5, in means over tokens 0.125.
"""

import math

import pytest
import torch
from build import close, make_batch, objective, spread

from posttrain.errors import ConfigError
from posttrain.formulas.preferences import logistic, unbiased
from posttrain.formulas.sequences import sequence_sum
from posttrain.methods.preference.conservative_dpo import ConservativeDPO
from posttrain.methods.preference.cpo import CPO
from posttrain.methods.preference.dpo import DPO
from posttrain.methods.preference.hinge_dpo import HingeDPO
from posttrain.methods.preference.ipo import IPO
from posttrain.methods.preference.kto import KTO, mismatched
from posttrain.methods.preference.length_normalised_dpo import LengthNormalisedDPO
from posttrain.methods.preference.orpo import ORPO
from posttrain.methods.preference.r_dpo import RDPO
from posttrain.methods.preference.robust_dpo import RobustDPO
from posttrain.methods.preference.simpo import SimPO
from posttrain.types import Readings, Sample, State

POLICY, REFERENCE, TOKENS = (-12.0, -15.0), (-13.0, -14.5), (10, 20)


def scalar(method, policy=POLICY, reference=REFERENCE, tokens=TOKENS, padding: int = 0):
    batch = make_batch(tokens, padding=padding)
    rows = [[[total / n] * n for total, n in zip(sums, tokens, strict=True)] for sums in (policy, reference)]
    logprob = spread(batch, rows[0], elsewhere=math.nan).requires_grad_()
    seen = Readings.of(policy={"logprob": logprob}, reference={"logprob": spread(batch, rows[1])})
    loss = objective(method, batch, seen)
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert torch.isfinite(gradient).all()
    return loss, gradient[:, 1]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (HingeDPO(), 0.85),
        (ConservativeDPO(flip=0.1), 0.635957),
        (RobustDPO(flip=0.1), 0.602207),
        (IPO(score=sequence_sum), 12.25),
        (IPO(), 23.765625),
        (RDPO(alpha=0.05), 0.883382),
        (CPO(), 1.754355),
        (LengthNormalisedDPO(), 0.428701),
        (SimPO(beta=2, gamma=1), 2.039387),
        (ORPO(), 1.312399),
    ],
)
def test_fixture(method, wanted) -> None:
    for padding in (0, 4):
        close(scalar(method, padding=padding)[0], wanted)


def test_gradients() -> None:
    close(scalar(IPO(score=sequence_sum))[1], [-7.0, 7.0])
    close(scalar(LengthNormalisedDPO())[1], [-0.174323, 0.174323 / 2])
    # Of the odds term alone, in the means over tokens: the whole less NLL's -1 / 10 a token, over lambda.
    gradient = scalar(ORPO(lam=0.1))[1]
    close([(gradient[0] + 0.1) * 10 / 0.1, gradient[1] * 20 / 0.1], [-0.965960, 1.279332], 1e-5)


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (ConservativeDPO(), 0.693147),
        (RobustDPO(), 0.693147),
        (LengthNormalisedDPO(), 0.693147),
        (IPO(), 25.0),
        (HingeDPO(), 1.0),
        (RDPO(), 0.974077),
    ],
)
def test_policy_at_the_reference(method, wanted) -> None:
    close(scalar(method, reference=POLICY)[0], wanted)
    if isinstance(method, RDPO):
        close(scalar(method, reference=POLICY, tokens=(20, 10))[0], 0.474077)


def test_one_becomes_another() -> None:
    dpo = scalar(DPO())[0]
    close(dpo, 0.620957)
    for method in (ConservativeDPO(flip=0.0), RobustDPO(flip=0.0), RDPO(alpha=0.0)):
        close(scalar(method)[0], dpo, 1e-12)
    equal = {"tokens": (10, 10)}
    close(scalar(LengthNormalisedDPO(beta=5), **equal)[0], 0.386871)
    close(scalar(DPO(beta=0.5), **equal)[0], 0.386871)
    close(scalar(SimPO(beta=2, gamma=0), **equal)[0], scalar(CPO(beta=0.2, alpha=0), **equal)[0], 1e-12)
    close(scalar(CPO(alpha=0))[0], scalar(DPO(), reference=(-7.0, -7.0))[0], 1e-12)
    close(scalar(ORPO(), policy=(-12.0, -24.0))[0], 1.2 + 0.1 * 0.693147)


@pytest.mark.parametrize(
    ("tokens", "alpha", "loss", "weight"),
    [
        ((10, 20), 0.05, 0.883382, 0.586618),
        ((20, 10), 0.05, 0.420055, 0.342990),  # what length explains is not learned
        ((15, 15), 0.05, 0.620957, 0.462570),
        ((10, 20), 0.0, 0.620957, 0.462570),
    ],
)
def test_length_changes_the_push(tokens, alpha, loss, weight) -> None:
    found, gradient = scalar(RDPO(alpha=alpha), tokens=tokens)
    close(found, loss)
    close(gradient, [-0.1 * weight, 0.1 * weight])


def test_a_flipped_label_flips_the_length_term_too() -> None:
    close(scalar(RDPO(alpha=0.05, flip=0.1))[0], 0.848382)  # 0.9 softplus(0.35) + 0.1 softplus(-0.35)
    only_the_margin = 0.9 * math.log1p(math.exp(0.35)) + 0.1 * math.log1p(math.exp(0.15 + 0.5))
    close(only_the_margin, 0.902049)  # what it would be with the length term as it was
    close(scalar(RDPO(alpha=0.05, flip=0.0))[0], scalar(RDPO(alpha=0.05))[0], 1e-12)
    close(scalar(RDPO(alpha=0.0, flip=0.1))[0], scalar(ConservativeDPO(flip=0.1))[0], 1e-12)
    with pytest.raises(ConfigError, match="flip"):
        RDPO(flip=0.5)


def test_tokens_said_twice_change_sums_and_not_means() -> None:
    twice = {"policy": (-24.0, -15.0), "reference": (-26.0, -14.5), "tokens": (20, 20)}
    close(scalar(LengthNormalisedDPO(beta=5), **twice)[0], 0.428701)
    assert abs(float(scalar(DPO(), **twice)[0].detach()) - 0.620957) > 0.01
    close(scalar(LengthNormalisedDPO(beta=5), reference=POLICY)[0], 0.693147)


def test_minima() -> None:
    best = math.log(0.9 / 0.1) / 0.1
    close(best, 21.972246)
    loss, gradient = scalar(ConservativeDPO(flip=0.1), policy=(best, 0.0), reference=(0.0, 0.0))
    close(loss, 0.325083)
    close(gradient, [0, 0])
    close(scalar(IPO(score=sequence_sum), policy=(5.0, 0.0), reference=(0.0, 0.0))[0], 0.0)
    share = [0.8 * a + 0.2 * b for a, b in zip(*(scalar(IPO(score=sequence_sum), policy=(s, 0.0), reference=(0.0, 0.0))[1]
                                                 * sign for s, sign in ((3.0, 1), (-3.0, -1))), strict=True)]
    close(share, [0, 0])  # preferred with probability 0.8: (2 * 0.8 - 1) / (2 * 0.1) = 3


def test_robust_loss_is_unbiased_under_flips() -> None:
    margin = torch.tensor([0.15], dtype=torch.float64)
    close(0.9 * unbiased(margin, 0.1) + 0.1 * unbiased(-margin, 0.1), logistic(margin), 1e-12)
    close(logistic(margin), [0.620957])


def kto_batch(u: list[float], good: list[float], twins: list[float]):
    batch = make_batch([1] * (len(u) + len(twins)))
    batch = batch.with_columns(
        good=torch.tensor(good + [0.0] * len(twins)), real=torch.tensor([1.0] * len(u) + [0.0] * len(twins))
    )
    logprob = spread(batch, [[x] for x in u + twins])
    zero = torch.zeros_like(logprob)
    seen = Readings.of(policy={"logprob": logprob}, start={"logprob": logprob}, reference={"logprob": zero})
    return KTO().credit(batch, seen, State()), seen


def test_kto() -> None:
    batch, seen = kto_batch([1.0, -0.5], [1.0, 0.0], [0.2, 0.4])
    close(KTO().loss(batch, seen, State())["loss"][:2], [0.482507, 0.480011])
    close(objective(KTO(), batch, seen), 0.481259)
    home, seen = kto_batch([0.0, 0.0], [1.0, 0.0], [0.0, 0.0])
    close(objective(KTO(), home, seen), 0.5)


@pytest.mark.parametrize(("twins", "wanted"), [([-0.4, 0.2, 0.5], 0.1), ([-1.4, -0.8, -0.5], 0.0), ([], 0.0)])
def test_kto_reference_point(twins, wanted) -> None:
    batch, _ = kto_batch([1.0, -0.5], [1.0, 0.0], twins)
    close(batch.columns["z"][0], wanted)
    assert batch.mask.any(-1).tolist() == [True, True] + [False] * len(twins)  # measured, never trained


def test_kto_gives_each_prompt_the_next_answer() -> None:
    first = Sample(tokens=[5, 6, 7], origin=[3, 3, 6], trained=[False, False, True])
    second = Sample(tokens=[8, 9, 2], origin=[3, 6, 6], trained=[False, True, True])
    twin = mismatched(first, second)
    assert (twin.tokens, twin.trained) == ([5, 6, 9, 2], [False, False, True, True])

    class Desk:
        def replay(self, rows):
            return [first, second.with_(index=1)]

    samples = KTO().experience(Desk(), [{"label": True}, {"label": False}], State())
    assert [s.columns for s in samples] == [
        {"good": 1.0, "real": 1.0},
        {"good": 0.0, "real": 1.0},
        {"good": 0.0, "real": 0.0},
        {"good": 0.0, "real": 0.0},
    ]
    assert [s.tokens for s in samples[2:]] == [[5, 6, 9, 2], [8, 7]]
    assert [s.index for s in samples] == [0, 1, 2, 3]
