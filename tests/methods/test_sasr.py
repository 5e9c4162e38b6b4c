"""SASR by hand: the probability to study, the trace of a few draws, and what each step leaves behind."""

import pytest
from build import close, float64, make_batch

from posttrain.methods.hybrid import sasr
from posttrain.methods.hybrid.sasr import SASR, practice_norm, shared_draw, study_probability
from posttrain.types import State

BATCH = make_batch([1])


@pytest.mark.parametrize(
    ("last", "warm", "gamma", "wanted"),
    [
        (2, 1, 1, 0.666667),
        (2, 1, 0.5, 0.8),
        (1, 1, 1, 0.5),
        (0.5, 2, 1, 0.2),
        (0.25, 2, 2, 0.058824),
        (0, 1, 1, 0),
        (1, 1, 0, 1),
        (0, 0, 1, 0),
        (3, 7, 0, 1),
    ],
)
def test_probability(last, warm, gamma, wanted) -> None:
    close(study_probability(last, warm, gamma), wanted)
    close(study_probability(9 * last, 9 * warm, gamma), wanted)  # scale of the gradients cancels


def test_trace(monkeypatch) -> None:
    draws, norms = [0.3, 0.6, 0.45, 0.2, 0.9, 0.1], iter([1.5, 1.0, 0.5])
    method = SASR(warmup=1)
    memory = {"last": 2.0, "warm": 2.0, "practice": 0.0, "norms": [2.0]}
    modes, chances, lasts = [], [], []
    for step, draw in enumerate(draws, start=1):
        monkeypatch.setattr(sasr, "shared_draw", lambda state, draw=draw: draw)
        state = State(step=step, memory=memory)
        chances.append(method.probability(state))
        weights = {name: part.weight_at(state) for name, part in method.parts().items()}
        assert sorted(weights.values()) == [0.0, 1.0]
        modes.append("SFT" if weights["sft"] else "GRPO")
        metrics = {"sft/gradient_norm": next(norms)} if weights["sft"] else {"rl/gradient_norm": 7.0}
        memory = method.remember(state, BATCH, metrics)
        lasts.append(memory["last"])
    assert modes == ["SFT", "GRPO", "GRPO", "SFT", "GRPO", "SFT"]
    close(chances, [0.5, 0.428571, 0.428571, 0.428571, 0.333333, 0.333333])
    assert lasts == [1.5, 1.5, 1.5, 1.0, 1.0, 0.5]
    assert memory["warm"] == 2.0


def test_warm_up_studies_and_keeps_the_mean_of_its_last_norms() -> None:
    method, memory = SASR(warmup=4, warmup_norms=2), SASR().begin()
    for step, norm in enumerate([9.0, 5.0, 3.0, 1.0]):
        state = State(step=step, memory=memory)
        assert method.parts()["sft"].weight_at(state) == 1
        memory = method.remember(state, BATCH, {"sft/gradient_norm": norm})
    assert (memory["warm"], memory["last"]) == (2.0, 1.0)


def test_limits() -> None:
    memory = {"last": 0.3, "warm": 2.0}
    for step in range(1, 60):
        state = State(step=step, memory=memory)
        assert SASR(warmup=1, gamma=0.0).studies(state)
        assert not SASR(warmup=1, gamma=1e12).studies(state)
        assert not SASR(warmup=1).studies(State(step=step, memory={"last": 0.0, "warm": 2.0}))


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    assert shared_draw(State(seed=3, step=5)) == shared_draw(State(seed=3, step=5, memory={"last": 1}, update=99))
    assert len({shared_draw(State(seed=s, step=t)) for s in range(5) for t in range(20)}) == 100


def test_practice_norm_is_the_other_denominator() -> None:
    memory = {"last": 1.0, "warm": 100.0, "practice": 3.0}
    close(SASR(warmup=1, against=practice_norm).probability(State(step=5, memory=memory)), 0.25)


def test_gradient_norm_stands_for_distance() -> None:
    for logits, wanted in (([0.0] * 4, 0.866025), ([3.0, 0, 0, 0], 0.150055)):
        z = float64(logits)
        (-z.log_softmax(-1)[0]).backward()
        close(z.grad.norm(), wanted)
