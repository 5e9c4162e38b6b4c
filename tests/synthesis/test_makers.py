"""The scripted annotator and the sieve of answers: what is ordered how, how often it errs, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small import demonstrations

from posttrain.errors import ConfigError
from posttrain.rewards import Answer, Reward
from posttrain.synthesis import MAKERS, maker_named
from posttrain.synthesis.answers import Answers, best_of_each
from posttrain.synthesis.maker import Maker, Workshop
from posttrain.synthesis.rankings import Rankings
from posttrain.types import Sample, Sampling


def parity(answer: Answer) -> float:
    """A score that differs between answers."""
    return float(answer.num_tokens % 2)


def shop_of(small_model: Path, folder: Path, *, samples: int = 4, rewards: bool = True) -> Workshop:
    return Workshop(
        {"data": demonstrations(6)},
        {"start": small_model},
        folder,
        samples=samples,
        sampling=Sampling(max_tokens=8, temperature=1.5),
        rewards=(Reward("parity", parity, where="inline"),) if rewards else (),
        quiet=True,
    )


def test_every_maker_has_a_class_and_a_source() -> None:
    for name in MAKERS:
        cls = maker_named(name)
        assert issubclass(cls, Maker)
        assert cls.__doc__
    assert list(MAKERS) == sorted(MAKERS)
    with pytest.raises(ConfigError, match=r"no 'rankngs'.*'rankings'"):
        maker_named("rankngs")


def test_better_first_then_shorter(small_model: Path, tmp_path: Path) -> None:
    made = Rankings(noise=0.0).make(shop_of(small_model, tmp_path))
    assert made.metrics["swapped"] == 0.0
    for row in made.rows:
        lengths = [sum(record["origin"][i] >= 5 for i in range(len(record["tokens"]))) for record in row["samples"]]
        keys = [(-row["scores"][place], lengths[place]) for place in row["ranking"]]
        assert keys == sorted(keys)
        assert sorted(row["ranking"]) == list(range(len(row["responses"])))
        assert len({tuple(record["tokens"]) for record in row["samples"]}) == len(row["samples"])


def test_the_annotator_errs_as_often_as_it_says_and_always_alike() -> None:
    annotator = Rankings(noise=0.1)
    swaps = [annotator.noisy([0, 1], seed=5, number=number) for number in range(4000)]
    share = sum(count for _, count in swaps) / 4000
    assert share == pytest.approx(0.1, abs=0.015)
    assert all((order == [1, 0]) == (count == 1) for order, count in swaps)
    assert swaps == [annotator.noisy([0, 1], seed=5, number=number) for number in range(4000)]
    assert Rankings(noise=0.0).noisy([2, 0, 1], seed=0, number=0) == ([2, 0, 1], 0)


def test_what_cannot_be_is_refused(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"noise is 0\.7"):
        Rankings(noise=0.7)
    with pytest.raises(ConfigError, match="samples is 1"):
        Rankings().make(shop_of(small_model, tmp_path, samples=1))
    with pytest.raises(ConfigError, match="most is -1"):
        Answers(most=-1)


def written(group: str, reward: float | None, text: int, index: int) -> Sample:
    return Sample(tokens=[1, text], origin=[3, 5], trained=[False, True], group=group, reward=reward, index=index)


def test_the_sieve() -> None:
    samples = [
        written("a", 1.0, 7, 0),
        written("a", 1.0, 7, 1),
        written("a", 1.0, 8, 2),
        written("a", 0.0, 9, 3),
        written("b", 0.0, 7, 4),
        written("b", 0.5, 8, 5),
    ]

    def kept(**options: object) -> list[int]:
        return [sample.index for sample in Answers(**options).sieved(samples)]  # type: ignore[arg-type]

    assert kept() == [0, 1, 2, 3, 4, 5]
    assert kept(keep="passed") == [0, 1, 2]
    assert kept(keep="passed", distinct=True) == [0, 2]
    assert kept(keep="passed", most=1) == [0]
    assert kept(keep="best") == [0, 5]
    assert best_of_each([replace(samples[0], reward=None)]) == []


def test_another_step_draws_other_answers_and_the_same_step_the_same(small_model: Path, tmp_path: Path) -> None:
    shop = shop_of(small_model, tmp_path, rewards=False)
    first, again, other = (shop.answers(shop.rows, step=step) for step in (0, 0, 1))
    assert [s.tokens for s in first] == [s.tokens for s in again]
    assert [s.tokens for s in first] != [s.tokens for s in other]
    with pytest.raises(ConfigError, match="no model 'judge'"):
        shop.model("judge")
