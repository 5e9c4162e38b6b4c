"""ReLIFT by hand: who is hardest, the buffer's two orders, and what each part costs."""

import pytest
import torch
from build import at, close, float64, make_batch, objective

from posttrain import reads
from posttrain.errors import ConfigError, DataError
from posttrain.methods.hybrid.relift import Practice, ReLIFT, Study, first_in_first_out, hardest, newest_first
from posttrain.types import GroupStats, Readings, State


def stats(*groups: list[float]) -> GroupStats:
    rewards = [torch.tensor(g, dtype=torch.float64) for g in groups]
    return GroupStats(
        group=torch.arange(len(groups)),
        count=torch.tensor([len(g) for g in groups]),
        passed=torch.tensor([int((r >= 1).sum()) for r in rewards]),
        mean=torch.stack([r.mean() if len(r) else torch.zeros((), dtype=torch.float64) for r in rewards]),
        std=torch.stack([r.std(unbiased=False) if len(r) else torch.zeros((), dtype=torch.float64) for r in rewards]),
        truncated=torch.zeros(len(groups), dtype=torch.int64),
    )


def test_only_groups_that_failed_outright_are_hardest() -> None:
    groups = stats([0, 0, 0], [1, 1, 1], [0, 1, 0], [-1, -1, -1], [])
    assert hardest(groups, 0.0) == [0]  # -1 is a failed format, [] was not scored


def row(name: str) -> dict:
    return {"prompt": name, "completion": name.upper()}


def fed(order, steps: list[str]) -> list[tuple[str, str]]:
    """What falls due and what waits after each step, whose hardest rows are named by letters."""
    method, memory, trace = ReLIFT(buffer_size=3, order=order), {"buffer": [], "due": []}, []
    for names in steps:
        rows = tuple(row(name) for name in names)
        state = State(memory=memory, rows=rows, groups=stats(*[[0, 0]] * len(rows)) if rows else stats([1, 0]))
        memory = method.remember(state, make_batch([1]), {})
        trace.append(tuple("".join(r["prompt"] for r in memory[key]) for key in ("due", "buffer")))
    return trace


def test_newest_first() -> None:
    assert fed(newest_first, ["ab", "cd", "", "e"]) == [("", "ab"), ("cda", "b"), ("", "b"), ("", "eb")]


def test_first_in_first_out() -> None:
    assert fed(first_in_first_out, ["ab", "cd", "", "e"]) == [("", "ab"), ("abc", "d"), ("", "d"), ("", "de")]


def test_imitation_is_asked_for_exactly_when_rows_are_due() -> None:
    part = ReLIFT(buffer_size=3).parts()["sft"]
    idle, busy = State(memory={"buffer": [row("a")], "due": []}), State(memory={"buffer": [], "due": [row("b")]})
    assert part.weight_at(idle) == 0
    assert part.weight_at(busy) == 1
    assert part.supply is not None
    assert part.supply(busy) == [row("b")]
    assert part.alone
    assert part.optimizer is not None  # moments of its own


def test_without_a_buffer_it_is_rl() -> None:
    assert set(ReLIFT(buffer_size=-1).parts()) == {"rl"}
    with pytest.raises(ConfigError, match="buffer_size"):
        ReLIFT(buffer_size=0)


def test_a_hardest_row_without_a_demonstration_is_refused() -> None:
    state = State(memory=ReLIFT().begin(), rows=({"prompt": "a"},), groups=stats([0, 0]))
    with pytest.raises(DataError, match="completion"):
        ReLIFT().remember(state, make_batch([1]), {})


def test_advantages_of_one_success_in_eight() -> None:
    batch = make_batch([1] * 8, group=[0] * 8, rewards=[1] + [0] * 7)
    close(Practice().credit(batch, Readings(), State()).advantages[:, 1], [0.875] + [-0.125] * 7)
    for reward in (0.0, 1.0):
        equal = make_batch([1] * 8, group=[0] * 8, rewards=[reward] * 8)
        assert (Practice().credit(equal, Readings(), State()).advantages == 0).all()


def test_divisor() -> None:
    # A = [.75, -.25, -.25, -.25] over 2, 4, 4, 2 tokens at ratio 1: the sum of costs is 1, over L_max 8 it is 0.125.
    batch = make_batch([2, 4, 4, 2], group=[0] * 4, rewards=[1, 0, 0, 0])
    batch = Practice().credit(batch, Readings(), State())
    flat = torch.full_like(batch.logprobs, -1.0)
    seen = Readings.of(policy={"logprob": flat, "entropy": flat * 0}, old={"logprob": flat})
    cost = Practice().loss(batch, seen, State())["loss"]
    close(cost[batch.mask].sum() / 8, 0.125)
    close(cost[batch.mask].mean(), 0.083333)
    close(objective(Practice(max_tokens=8), batch, seen), 0.125 / 4)  # the mean over answers


@pytest.mark.parametrize(("entropy", "wanted"), [(0.0, 0.895495), (1e-4, 0.895413), (1e-3, 0.894674), (0.1, 0.813450)])
def test_imitation_with_entropy(entropy, wanted) -> None:
    logits = float64([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    place = at([0, 2])
    close(-reads.logprob.fn(logits, place), [0.239545, 1.551445])
    close(reads.entropy.fn(logits, place), [0.665573, 0.975328])
    values = {r.name: torch.nn.functional.pad(r.fn(logits, place), (1, 0))[None] for r in (reads.logprob, reads.entropy)}
    loss = objective(Study(entropy=entropy), make_batch([2]), Readings.of(policy=values))
    close(loss, wanted)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
