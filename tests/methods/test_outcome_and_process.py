"""Verdicts on answers and on steps, by hand: which tokens carry a label, what they cost, and what never gets a gradient."""

import math

import pytest
import torch
from build import close, float64, make_batch, objective
from torch.nn.functional import binary_cross_entropy_with_logits

from posttrain import reads
from posttrain.distributed.world import World
from posttrain.errors import DataError
from posttrain.formulas.sequences import sequence_average
from posttrain.formulas.steps import every_step
from posttrain.forward import read
from posttrain.methods import KTO, OutcomeReward, OutcomeRewardLast, ProcessReward
from posttrain.methods.reward.outcome import with_labels
from posttrain.models.random import random_model
from posttrain.pack import pack
from posttrain.score import prepare
from posttrain.types import Origin, Readings, Sample, State, View

NAN = math.nan


def credited(method, batch):
    return method.credit(batch, Readings(), State())


def outcome(method, logits, labels):
    batch = make_batch([3] * len(labels), columns={"label": labels})
    whole = torch.zeros(len(labels), 4, dtype=torch.float64)
    whole[:, 1:] = logits
    return objective(method, credited(method, batch), Readings.of(policy={"token_reward": whole}))


def test_an_outcome_is_told_from_every_token_or_from_the_last() -> None:
    logits = float64([[0.0, 1.0, 2.0]])
    close(outcome(OutcomeReward(), logits, [1.0]), 0.377779)  # (0.693147 + 0.313262 + 0.126928) / 3
    close(outcome(OutcomeRewardLast(), logits, [1.0]), 0.126928)
    mean = sequence_average(logits, torch.ones(1, 3, dtype=torch.bool))
    close(binary_cross_entropy_with_logits(mean, torch.ones(1, dtype=torch.float64)), 0.313262)  # a third loss, of the mean logit


def test_soft_outcomes_and_answers_without_one() -> None:
    logits = float64([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    value = outcome(OutcomeRewardLast(), logits, [0.25, NAN])
    close(value, -0.25 * math.log(torch.sigmoid(torch.tensor(2.0))) - 0.75 * math.log(torch.sigmoid(torch.tensor(-2.0))), 1e-6)
    value.backward()
    close(logits.grad, [[0, 0, torch.sigmoid(torch.tensor(2.0)) - 0.25], [0, 0, 0]])


def test_an_answer_is_judged_at_its_last_token() -> None:
    batch = credited(OutcomeReward(), make_batch([3, 2], columns={"label": [1.0, 1.0]}))
    logits = torch.tensor([[9.0, -1.0, -1.0, 2.0], [9.0, 3.0, -0.5, 9.0]])
    found = OutcomeReward().loss(batch, Readings.of(policy={"token_reward": logits}), None)
    close(found["score"], torch.tensor([2.0, -0.5]).sigmoid())
    assert found["accuracy"].tolist() == [1.0, 0.0]


def test_labels_of_answers() -> None:
    sample = Sample(tokens=[1, 2], origin=[3, 6], trained=[False, True], query="q7")
    given = [sample.with_(info={"label": True}), sample.with_(columns={"label": 0.3}), sample.with_(info={"label": None})]
    assert [s.columns["label"] for s in with_labels(given)[:2]] == [1.0, 0.3]
    assert math.isnan(with_labels(given)[2].columns["label"])
    with pytest.raises(DataError, match="rows with a 'label'"):
        with_labels([sample])
    with pytest.raises(DataError, match=r"label of q7 is 1\.5"):
        with_labels([sample.with_(info={"label": 1.5})])
    with pytest.raises(DataError, match=r"KTO needs labels that are true or false; found 0\.5"):
        KTO().experience(None, [{"label": True}, {"label": 0.5}], State())


def process(method, logits, labels, steps=None):
    """One row of one prompt token, with a step at every token."""
    batch = make_batch([len(labels)], columns={"step_label": [[NAN, *labels]]})
    return credited(method, batch), Readings.of(policy={"token_reward": torch.cat([logits.new_zeros(1, 1), logits], 1)})


def test_cost_of_steps() -> None:
    logits = torch.tensor([[0.9, 0.8, 0.95]], dtype=torch.float64).logit()
    batch, seen = process(ProcessReward(), logits, [1.0, 1.0, 0.0])
    close(ProcessReward().loss(batch, seen, None)["loss"][batch.mask], [0.105361, 0.223144, 2.995732])
    close(objective(ProcessReward(), batch, seen), 1.108079)
    assert ProcessReward().loss(batch, seen, None)["accuracy"][batch.mask].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("method", "learnt"), [(ProcessReward(), [1, 2, 3]), (ProcessReward(supervise=every_step), [1, 2, 3, 4, 5])]
)
def test_steps_behind_the_first_wrong_one_are_not_learnt_from(method, learnt) -> None:
    logits = float64([[0.1, 0.2, 0.3, 0.4, 0.5]])
    batch, seen = process(method, logits, [1.0, 1.0, 0.0, 1.0, 0.0])
    assert batch.mask[0].nonzero().flatten().tolist() == learnt
    objective(method, batch, seen).backward()
    assert [t + 1 for t in logits.grad[0].nonzero().flatten().tolist()] == learnt


def test_a_soft_label_that_is_not_0_is_no_wrong_step() -> None:
    batch, _ = process(ProcessReward(), float64([[0.0] * 4]), [0.25, NAN, 0.0, 1.0])
    assert batch.mask.tolist() == [[False, True, False, True, False]]


def stepped_samples() -> list[Sample]:
    """Five steps, the third wrong; in the second row nobody labelled anything."""
    tokens, ends = list(range(3, 17)), {5: 1.0, 7: 1.0, 9: 0.0, 11: 1.0, 13: 1.0}
    origin = [int(Origin.USER)] * 3 + [int(Origin.DEMONSTRATION)] * 11
    label = [ends.get(t, NAN) for t in range(14)]
    rows = (label, [NAN] * 14)
    trained = [False] * 3 + [True] * 11
    return [Sample(tokens=tokens, origin=origin, trained=trained, columns={"step_label": row}) for row in rows]


def test_only_ends_of_supervised_steps_get_a_gradient_through_the_engine() -> None:
    models = {"policy": random_model("llama", dtype="float64")}
    models["policy"].add_reward_head(seed=0)
    batch = pack(stepped_samples(), dtype=torch.float64)
    ready, _, _ = prepare(models, ProcessReward(), batch, State(), token_budget=1000, world=World(), on_policy=True)
    assert ready.mask.nonzero().tolist() == [[0, 5], [0, 7], [0, 9]]
    seen = read(models, ready, ProcessReward().views())
    logits = seen.policy.token_reward
    grad = torch.autograd.grad(objective(ProcessReward(), ready, seen), logits, retain_graph=True)[0]
    assert grad.nonzero().tolist() == [[0, 5], [0, 7], [0, 9]]


def test_a_verdict_at_a_token_has_read_that_token_and_none_behind_it() -> None:
    model = random_model("llama", dtype="float64")
    model.add_reward_head(seed=0)
    views = {"policy": View(reads=(reads.token_reward, reads.reward), once=True)}

    def verdicts(tokens):
        sample = Sample(tokens=tokens, origin=[3] + [6] * 4, trained=[False] + [True] * 4)
        return read({"policy": model}, pack([sample], dtype=torch.float64), views).policy

    before, after = verdicts([3, 4, 5, 6, 7]), verdicts([3, 4, 9, 6, 7])
    changed = (before.token_reward != after.token_reward)[0].tolist()
    assert changed == [False, False, True, True, True]  # from the changed token on
    assert before.token_reward[0, 0] == 0.0
    close(before.token_reward[0, 4], before.reward[0], 1e-12)  # at the last token: the reward of the row


def test_a_shared_prompt_gives_the_same_verdicts() -> None:
    model = random_model("llama", dtype="float64")
    model.add_reward_head(seed=0)
    views = {"policy": View(reads=(reads.token_reward,), once=True)}
    prompt = list(range(3, 15))
    answers = [[20, 21, 22], [20, 30], [40]]
    samples = [
        Sample(tokens=prompt + a, origin=[3] * 12 + [6] * len(a), trained=[False] * 12 + [True] * len(a), group="g")
        for a in answers
    ]
    together = read({"policy": model}, pack(samples, dtype=torch.float64), views).policy.token_reward
    for row, sample in enumerate(samples):
        alone = read({"policy": model}, pack([sample], dtype=torch.float64), views).policy.token_reward
        close(together[row, : len(sample)], alone[0], 1e-10)
