"""ssToken by hand: which tokens are kept, and what they cost."""

import pytest
import torch
from build import close, float64, make_batch, objective, spread

from posttrain import reads
from posttrain.formulas.reductions import sequence_mean
from posttrain.methods.sft.sft import SFT
from posttrain.methods.sft.sstoken import SsToken, normalised
from posttrain.types import Readings, State

HISTORY = [2, 1, 3, 0.5, 2.5]
CURRENT = [1, 0.9, 3.2, 0.4, 0.5]
ATTENTION = [0.2, 0.6, 0.5, 0.1, 0.3]


def selected(method: SsToken, history=HISTORY, current=CURRENT, state: State | None = None, padding: int = 0):
    batch = make_batch([5], padding=padding)
    seen = Readings.of(
        history={"logprob": -spread(batch, [history])},
        present={"logprob": -spread(batch, [current]), "attention_to_prompt": spread(batch, [ATTENTION])},
        policy={"logprob": -spread(batch, [current])},
    )
    credited = method.credit(batch, seen, state or State())
    kept = [t - 1 for t in credited.mask[0].nonzero().flatten().tolist()]
    return kept, objective(method, credited, seen)


def test_improvement_is_normalised_within_the_row() -> None:
    gain = float64([[h - c for h, c in zip(HISTORY, CURRENT, strict=True)]])
    close(gain, [[1, 0.1, -0.2, 0.1, 2]])
    close(normalised(gain, torch.ones(1, 5, dtype=torch.bool)), [[0.545455, 0.136364, 0, 0.136364, 1]])
    assert (normalised(torch.full((1, 4), 0.7), torch.ones(1, 4, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize(
    ("gamma", "rho", "kept", "loss"),
    [(1.0, 0.6, [0, 1, 4], 0.8), (0.5, 0.6, [0, 1, 4], 0.8), (0.0, 0.6, [1, 2, 4], 1.533333), (0.5, 1.0, [0, 1, 2, 3, 4], 1.2)],
)
def test_kept_tokens_and_their_mean(gamma, rho, kept, loss) -> None:
    for padding in (0, 3):
        found, value = selected(SsToken(gamma=gamma, rho=rho), padding=padding)
        assert found == kept
        close(value, loss)


def test_everything_kept_is_sft() -> None:
    batch = make_batch([5])
    sft = objective(SFT(reduce=sequence_mean), batch, Readings.of(policy={"logprob": -spread(batch, [CURRENT])}))
    for gamma in (0.0, 0.3, 1.0):
        close(selected(SsToken(gamma=gamma, rho=1.0))[1], sft, 0.0)


def test_without_improvement_attention_decides() -> None:
    for gamma in (0.0, 0.5, 0.9):
        assert selected(SsToken(gamma=gamma), history=CURRENT)[0] == [1, 2, 4]


def test_shift_and_scale_of_the_history_change_nothing() -> None:
    shifted = [h + 4.0 for h in HISTORY]
    scaled = [c + 3 * (h - c) for h, c in zip(HISTORY, CURRENT, strict=True)]
    for history in (shifted, scaled):
        assert selected(SsToken(gamma=0.7), history=history)[0] == selected(SsToken(gamma=0.7))[0]


@pytest.mark.parametrize(("tokens", "rho", "count"), [(5, 0.6, 3), (5, 0.61, 4), (1, 0.1, 1), (10, 0.3, 3), (7, 0.5, 4)])
def test_each_row_keeps_the_ceiling_of_its_share(tokens, rho, count) -> None:
    batch = make_batch([tokens, 2])
    zeros = {"logprob": torch.zeros_like(batch.logprobs), "attention_to_prompt": torch.zeros_like(batch.logprobs)}
    seen = Readings.of(history=zeros, present=zeros)
    mask = SsToken(rho=rho).credit(batch, seen, State()).mask
    assert int(mask[0].sum()) == count
    assert mask[0].nonzero().flatten().tolist() == list(range(1, count + 1))  # ties go to the earlier
    assert not (mask & ~batch.mask).any()


def test_attention_to_the_prompt() -> None:
    rows = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.1, 0.3, 0.5]]
    attention = torch.tensor([[rows, rows]], dtype=torch.float64)  # [B, H, T, T]
    found = reads.attention_to_prompt().fn(attention, make_batch([2], prompt=2))
    close(found, [[0, 0, 0.5, 0.2]])


def test_warm_up_rests_on_attention_and_counts_rows() -> None:
    method = SsToken(gamma=1.0, warmup_rows=2)
    assert selected(method, state=State(memory={"rows": 1}))[0] == [1, 2, 4]
    assert selected(method, state=State(memory={"rows": 2}))[0] == [0, 1, 4]
    assert method.remember(State(memory=method.begin()), make_batch([5, 5]), {}) == {"rows": 2}
