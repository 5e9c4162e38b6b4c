"""The native sampler: right against transformers and the trainer's forward, whatever is written beside a row."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from posttrain.errors import ConfigError, DataError, NumericsError
from posttrain.layout import Layout
from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model
from posttrain.samplers import NativeSampler
from posttrain.samplers.cache import CachedStepper, RereadingStepper
from posttrain.types import Origin, Sample, Sampling

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "mistral": {"sliding_window": 7},
    "gpt_neox": {},  # no forward of our own
}
STOP = (2, 5, 9)


def make(name: str, dtype: str = "float32") -> LanguageModel:
    return random_model(name, dtype=dtype, **MODELS[name])


def prompt(tokens: Sequence[int], index: int = 0, **fields: Any) -> Sample:
    return Sample(tokens=list(tokens), origin=[Origin.USER] * len(tokens), trained=[False] * len(tokens), index=index, **fields)


def ragged(count: int = 9, copies: int = 2, *, longest: int = 13) -> list[Sample]:
    """`count` different prompts, each `copies` times."""
    chance = random.Random(1)
    texts = [[chance.randrange(3, 61) for _ in range(chance.randint(1, longest))] for _ in range(count)]
    return [prompt(texts[i // copies], i) for i in range(count * copies)]


def sampler(model: LanguageModel, **settings: Any) -> NativeSampler:
    return NativeSampler(model, None, **{"stop_tokens": STOP, **settings})


def trainer_logprobs(model: LanguageModel, sample: Sample, temperature: float) -> torch.Tensor:
    """`[A]`: the answer's log-probabilities by the full forward."""
    with torch.no_grad():
        logits = model.logits(model.trunk(Layout.of_rows([sample.tokens])).hidden) / temperature
    logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(sample.tokens)[1:, None])[:, 0]
    return logprobs[sample.prompt_length - 1 :]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model, prompts = make(name, "float64"), ragged(6, 1)
    answers = sampler(model, max_batch=4).sample(prompts, sampling=Sampling(greedy=True, max_tokens=24), seed=0, step=0)
    for start, answer in zip(prompts, answers, strict=True):
        given = torch.tensor([start.tokens])
        wanted = model.module.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=list(STOP),
            pad_token_id=0,
        )
        assert answer.tokens == wanted[0].tolist()
        assert answer.finish == ("stop" if answer.tokens[-1] in STOP else "length")
        assert answer.temperature == 1.0


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_the_trainer(name: str, dtype: str, bound: float) -> None:
    model = make(name, dtype)
    settings = Sampling(temperature=0.9, max_tokens=40)
    for answer in sampler(model, max_batch=5).sample(ragged(), sampling=settings, seed=3, step=1):
        start = answer.prompt_length
        own = torch.tensor(answer.logprobs, dtype=torch.float64)
        gap = (own[start:] - trainer_logprobs(model, answer, 0.9)).abs().max()
        assert gap < bound
        assert own[:start].abs().sum() == 0
        assert answer.sampled_logprobs == answer.logprobs


def test_a_bfloat16_model_stays_near_its_trainer() -> None:
    model = random_model(dtype="bfloat16")
    for answer in sampler(model).sample(ragged(4), sampling=Sampling(max_tokens=16), seed=0, step=0):
        own = torch.tensor(answer.logprobs[answer.prompt_length :])
        assert (own - trainer_logprobs(model, answer, 1.0)).abs().mean() < 0.1


@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_every_precision_agrees_with_the_trainer(precision: Any) -> None:
    model = make("qwen2")
    model.use_precision(precision)
    bound = 1e-5 if precision == "fast" else 0.3
    for answer in sampler(model).sample(ragged(4), sampling=Sampling(max_tokens=16), seed=0, step=0):
        own = torch.tensor(answer.logprobs[answer.prompt_length :])
        assert (own - trainer_logprobs(model, answer, 1.0)).abs().max() < bound


def compositions(model: LanguageModel, *, exact: bool) -> list[dict[int, Sample]]:
    """The same prompts in several orders, numbers and widths, by index."""
    prompts, settings = ragged(9, 3), Sampling(temperature=1.1, max_tokens=40)
    shuffled = random.Random(0).sample(prompts, len(prompts))
    found = []
    several = [(prompts, 64), (prompts, 5), (shuffled, 7), (prompts[:4], 64), (prompts[-1:], 1), (shuffled, 1)]
    for some, width in several:
        made = sampler(model, max_batch=width, exact=exact, max_context=64)
        answers = made.sample(some, sampling=settings, seed=7, step=2)
        assert [answer.index for answer in answers] == [start.index for start in some]
        found.append({answer.index: answer for answer in answers})
    return found


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_samples_do_not_depend_on_what_is_written_beside_them(name: str) -> None:
    first, *others = compositions(make(name, "float64"), exact=False)
    for other in others:
        for index, answer in other.items():
            assert answer.tokens == first[index].tokens
            assert answer.logprobs == pytest.approx(first[index].logprobs, abs=1e-11)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_exact_samples_are_bit_equal_in_every_composition(name: str) -> None:
    first, *others = compositions(make(name, "float32"), exact=True)
    for other in others:
        for index, answer in other.items():
            assert answer == first[index]


def test_the_same_call_writes_the_same_and_another_key_does_not() -> None:
    made, prompts, settings = sampler(make("llama")), ragged(4), Sampling(max_tokens=20)
    first = made.sample(prompts, sampling=settings, seed=1, step=5)
    assert made.sample(prompts, sampling=settings, seed=1, step=5) == first
    assert sampler(make("llama")).sample(prompts, sampling=settings, seed=1, step=5) == first
    assert made.sample(prompts, sampling=settings, seed=2, step=5) != first
    assert made.sample(prompts, sampling=settings, seed=1, step=6) != first


def test_the_samples_of_a_group_differ_and_follow_the_model() -> None:
    """4,000 first tokens of one prompt against the trainer's distribution."""
    model, count = make("llama"), 4000
    answers = sampler(model, max_batch=500).sample(
        [prompt([1, 4], i) for i in range(count)], sampling=Sampling(max_tokens=1), seed=0, step=0
    )
    with torch.no_grad():
        wanted = model.logits(model.trunk(Layout.of_rows([[1, 4]])).hidden[-1:]).softmax(-1)[0] * count
    counts = torch.bincount(torch.tensor([answer.tokens[-1] for answer in answers]), minlength=len(wanted))
    likely = wanted > 5
    rest = float((counts[~likely].sum() - wanted[~likely].sum()) ** 2 / wanted[~likely].sum())
    statistic = float(((counts - wanted) ** 2 / wanted)[likely].sum()) + rest
    freedom = int(likely.sum())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def counting(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[list[tuple[int, ...]]]:
    """What each prefill read."""
    calls: list[list[tuple[int, ...]]] = []
    original = kind.prefill  # type: ignore[attr-defined]

    def prefill(self: Any, prompts: Any) -> Any:
        calls.append(list(prompts))
        return original(self, prompts)

    monkeypatch.setattr(kind, "prefill", prefill)
    return calls


@pytest.mark.parametrize(("name", "kind"), [("llama", CachedStepper), ("gpt_neox", RereadingStepper)])
def test_a_prompt_is_read_once_for_its_group_and_together_with_others(
    name: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = make(name, "float64"), ragged(9, 4)
    prompts = [*prompts[::2], *prompts[1::2]]  # the members of a group do not stand together
    calls = counting(monkeypatch, kind)
    grouped = sampler(model, max_batch=6).sample(prompts, sampling=Sampling(max_tokens=12), seed=0, step=0)
    read = [key for call in calls for key in call]
    assert sorted(read) == sorted({tuple(p.tokens) for p in prompts})
    assert len(calls) <= 3
    alone = [sampler(model).sample([p], sampling=Sampling(max_tokens=12), seed=0, step=0)[0] for p in prompts]
    assert [answer.tokens for answer in grouped] == [answer.tokens for answer in alone]


@pytest.mark.parametrize(("width", "exact", "passes"), [(64, False, 1), (2, False, 2), (64, True, 12)])
def test_different_prompts_are_read_in_one_pass(width: int, exact: bool, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2 slots the queue is looked through 8 rows ahead; when exact, every prompt is read alone."""
    calls = counting(monkeypatch, CachedStepper)
    made = sampler(make("llama"), max_batch=width, exact=exact)
    made.sample(ragged(12, 1), sampling=Sampling(max_tokens=4), seed=0, step=0)
    assert len(calls) == passes


def test_long_answers_and_long_prompts_grow_the_cache() -> None:
    model = random_model(dtype="float64", max_position_embeddings=400)
    prompts = [*ragged(5, 1), prompt([3 + i % 50 for i in range(150)], 90), prompt([4] * 33, 91)]
    made = sampler(model, stop_tokens=(), max_batch=3)
    for answer in made.sample(prompts, sampling=Sampling(max_tokens=140), seed=0, step=0):
        assert len(answer.completion) == 140
        own = torch.tensor(answer.logprobs[answer.prompt_length :], dtype=torch.float64)
        assert (own - trainer_logprobs(model, answer, 1.0)).abs().max() < 1e-10


def test_max_tokens_and_the_context_end_an_answer() -> None:
    model = make("llama")  # a context of 128
    prompts = [prompt([1] * 3, 0), prompt([1] * 120, 1), prompt([1] * 127, 2)]
    answers = sampler(model, stop_tokens=()).sample(prompts, sampling=Sampling(max_tokens=20), seed=0, step=0)
    assert [len(answer.completion) for answer in answers] == [20, 8, 1]
    assert {answer.finish for answer in answers} == {"length"}
    narrow = sampler(model, stop_tokens=(), max_context=10)
    assert len(narrow.sample(prompts[:1], sampling=Sampling(), seed=0, step=0)[0]) == 10


@pytest.mark.filterwarnings("error")
def test_a_prompt_that_fills_the_context_comes_back_with_a_warning() -> None:
    made, prompts = sampler(make("llama"), max_context=8), [prompt([1, 3]), prompt([1] * 8), prompt([1] * 9)]
    with pytest.warns(UserWarning, match="2 of 3 prompts fill the context of 8 tokens"):
        answers = made.sample(prompts, sampling=Sampling(max_tokens=3), seed=0, step=0)
    assert [len(answer) for answer in answers][1:] == [8, 9]
    assert answers[1].finish == "length"
    assert not any(answers[1].trained)
    assert answers[0].completion


def test_a_stop_token_may_come_first_and_is_kept_and_trained() -> None:
    model = make("llama")
    made = sampler(model, stop_tokens=tuple(range(61)), max_batch=2)
    for answer in made.sample(ragged(5), sampling=Sampling(max_tokens=9), seed=0, step=0):
        assert len(answer.completion) == 1
        assert answer.finish == "stop"
        assert answer.trained[-1]
        assert answer.origin[-1] == Origin.POLICY


def test_stop_strings_end_an_answer() -> None:
    class Letters:
        def decode(self, tokens: list[int], **_: object) -> str:
            return "".join("abc"[token % 3] for token in tokens)

    made = NativeSampler(make("llama"), Letters(), stop_tokens=(), max_batch=4)
    answers = made.sample(ragged(8), sampling=Sampling(max_tokens=60, stop=("abc", "cc")), seed=0, step=0)
    assert sum(answer.finish == "stop" for answer in answers) > 10
    for answer in answers:
        text = Letters().decode(answer.completion)
        assert not any(stop in text[:-1] for stop in ("abc", "cc"))
        assert (answer.finish == "stop") == text.endswith(("abc", "cc"))


def test_truncated_answers_carry_both_logprobs() -> None:
    model = make("llama", "float64")
    settings = Sampling(top_k=5, top_p=0.8, temperature=1.2, max_tokens=10)
    for answer in sampler(model).sample(ragged(4), sampling=settings, seed=0, step=0):
        start = answer.prompt_length
        with torch.no_grad():
            logits = model.logits(model.trunk(Layout.of_rows([answer.tokens])).hidden)[:-1] / 1.2
        for place in range(start, len(answer)):
            probabilities = logits[place - 1].softmax(-1)
            best = probabilities.sort(descending=True)
            kept = best.indices[:5][best.values[:5].cumsum(0) - best.values[:5] < 0.8 * best.values[:5].sum()]
            token = answer.tokens[place]
            assert token in kept
            share = probabilities[token] / probabilities[kept].sum()
            assert answer.sampled_logprobs[place] == pytest.approx(float(share.log()))
            assert answer.logprobs[place] == pytest.approx(float(probabilities[token].log()))


def test_a_prefix_of_the_answer_is_continued() -> None:
    made = sampler(make("llama", "float64"), stop_tokens=())
    start = prompt([1, 7], 3, turn=[0, 0])
    (whole,) = made.sample([start], sampling=Sampling(max_tokens=12), seed=0, step=0)
    lists = ("tokens", "origin", "trained", "turn", "logprobs", "sampled_logprobs")
    part = whole.with_(policy_version=8, **{name: getattr(whole, name)[:6] for name in lists})
    (again,) = made.sample([part], sampling=Sampling(max_tokens=8), seed=0, step=0)
    assert again.tokens == whole.tokens
    assert again.turn == whole.turn == [0, 0] + [1] * 12
    assert again.logprobs == pytest.approx(whole.logprobs, abs=1e-11)


def test_new_weights_are_used_at_once_and_no_graph_is_kept() -> None:
    model = make("llama")
    made = sampler(model, policy_version=4)
    before = made.sample(ragged(3), sampling=Sampling(max_tokens=8), seed=0, step=0)
    assert {answer.policy_version for answer in before} == {4}
    with torch.no_grad():
        for weight in model.parameters().values():
            weight.mul_(0.5)
    made.policy_version = 5
    after = made.sample(ragged(3), sampling=Sampling(max_tokens=8), seed=0, step=0)
    assert {answer.policy_version for answer in after} == {5}
    for answer in after:
        own = torch.tensor(answer.logprobs[answer.prompt_length :])
        assert (own - trainer_logprobs(model, answer, 1.0)).abs().max() < 1e-5
    assert before != after
    hidden = model.trunk(Layout.of_rows([[1, 2, 3]])).hidden  # the trainer's own pass still has gradients
    hidden.sum().backward()


def test_dropout_is_off_while_sampling_and_back_afterwards() -> None:
    model = random_model("gpt_neox", hidden_dropout=0.5, attention_dropout=0.5)
    settings = Sampling(max_tokens=6)
    wanted = sampler(model).sample(ragged(3), sampling=settings, seed=0, step=0)
    model.dropout(True)
    assert sampler(model).sample(ragged(3), sampling=settings, seed=0, step=0) == wanted
    assert model.module.training


def test_progress_counts_every_answer() -> None:
    seen: list[tuple[int, int]] = []
    made = sampler(make("llama"), max_batch=3, progress=lambda done, total: seen.append((done, total)))
    made.sample(ragged(4), sampling=Sampling(max_tokens=5), seed=0, step=0)
    assert seen == [(done, 8) for done in range(1, 9)]


def test_every_answer_is_told_when_it_ends_and_before_the_next_is_written() -> None:
    """With one slot the answers end one by one: the first is told before the second has a token."""
    told: list[Sample] = []
    made = sampler(make("llama"), max_batch=1, max_context=16)
    asked = [prompt([1, 3], 0), prompt([1, 4], 1), prompt([1] * 16, 2)]  # the last has no room
    counts: list[int] = []
    made.progress = lambda done, total: counts.append(len(told))
    with pytest.warns(UserWarning, match="fill the context"):
        answers = made.sample(asked, sampling=Sampling(max_tokens=5), seed=0, step=0, done=told.append)
    assert sorted(told, key=lambda sample: sample.index) == answers
    assert told[0].index == 2
    assert counts == [1, 2, 3]


def test_no_prompts_give_no_samples() -> None:
    assert sampler(make("llama")).sample([], sampling=Sampling(), seed=0, step=0) == []


def test_what_cannot_be_done_is_refused() -> None:
    model = make("llama")
    with pytest.raises(DataError, match="no tokens"):
        sampler(model).sample([prompt([])], sampling=Sampling(), seed=0, step=0)
    with pytest.raises(ConfigError, match="max_batch"):
        sampler(model, max_batch=0)
    with pytest.raises(ConfigError, match="made for 128"):
        sampler(model, max_context=129)
    with pytest.raises(ConfigError, match="max_context"):
        sampler(random_model(max_position_embeddings=8192), exact=True)
    with pytest.raises(ConfigError, match="tokenizer"):
        sampler(model).sample([prompt([1])], sampling=Sampling(stop=("x",)), seed=0, step=0)
    with torch.no_grad():
        next(iter(model.parameters().values())).fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite at token 1"):
        sampler(model).sample([prompt([1])], sampling=Sampling(), seed=0, step=0)
