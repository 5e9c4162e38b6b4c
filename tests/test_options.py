"""Options are read once, from fields: texts become values, unknown keys name the nearest, wrong values say what was found."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from small import PARITY, demonstrations

from posttrain.errors import ConfigError
from posttrain.formulas.reductions import sequence_mean
from posttrain.method import Optimizer
from posttrain.methods import DPO, GRPO
from posttrain.options import build, field_help, function_named, parsed
from posttrain.quick import sorted_settings
from posttrain.run import Run
from posttrain.types import Sampling


def test_pairs_are_read_as_yaml() -> None:
    found = parsed(["beta=0.2", "lr=1e-4", "steps=3", "quiet=true", "writers=[wandb]", "name=a=b", "system="])
    assert found == {
        "beta": 0.2,
        "lr": 1e-4,
        "steps": 3,
        "quiet": True,
        "writers": ["wandb"],
        "name": "a=b",
        "system": "",
    }
    assert isinstance(found["lr"], float)


@pytest.mark.parametrize("pair", ["beta", "=3", "--beta", "x=[1"])
def test_what_is_no_pair_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match=r"key=value|cannot be read"):
        parsed([pair])


def test_values_become_what_fields_are() -> None:
    assert build(Optimizer, {"lr": "0.001", "schedule": "cosine"}) == Optimizer(lr=1e-3, schedule="cosine")
    assert build(Sampling, {"stop": ["a"], "max_tokens": 3}).stop == ("a",)
    assert build(GRPO, {"reduce": "sequence_mean"}).reduce is sequence_mean


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (DPO, {"betta": 0.2}, "DPO has no option 'betta'.*'beta'"),
        (DPO, {"beta": "much"}, "DPO.beta is 'much'"),
        (Optimizer, {"schedule": "cosin"}, "schedule is 'cosin'.*'cosine'"),
        (GRPO, {"reduce": "sequence_men"}, "no formula 'sequence_men'.*'sequence_mean'"),
        (Sampling, {"max_tokens": 1.5}, "max_tokens is 1.5"),
    ],
)
def test_wrong_ones_are_refused(cls: type, values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(cls, values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": "many"}, "steps is 'many'"),
        ({"save_every": 2.5}, "save_every is 2.5"),
        ({"dtype": "float31"}, "dtype is 'float31'"),
        ({"max_failure_rate": "x"}, "max_failure_rate is 'x'"),
        ({"quiet": "perhaps"}, "quiet is 'perhaps'"),
    ],
)
def test_a_runs_own_fields_are_checked_too(changes: dict[str, object], words: str) -> None:
    """Although some of its types are imported for type checking only."""
    common = {"method": GRPO(), "data": demonstrations(2), "out": "x", "rewards": (PARITY,)}
    with pytest.raises(ConfigError, match=words):
        build(Run, {**common, **changes})
    run = build(Run, {**common, "steps": "3", "models": {"reference": "tiny"}})
    assert run.steps == 3
    assert run.data == demonstrations(2)
    assert run.rewards == (PARITY,)
    assert run.method == GRPO()


@pytest.mark.parametrize(
    ("given", "read"),
    [("tensorboard", ("tensorboard",)), ("tensorboard, wandb", ("tensorboard", "wandb")), (["wandb"], ("wandb",))],
)
def test_one_value_stands_for_a_list_of_one_and_commas_for_more(given: object, read: tuple[str, ...]) -> None:
    common = {"method": DPO(), "data": demonstrations(2), "out": "x"}
    assert build(Run, {**common, "writers": given}).writers == read


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": "two"}, "expected a whole number, for instance steps=100"),
        ({"steps": 1.5}, "expected a whole number"),
        ({"epochs": "two"}, "expected a number, for instance epochs=0.1"),
        ({"quiet": "perhaps"}, "expected true or false"),
        ({"dtype": "float31"}, "expected 'float32', 'float64' or 'bfloat16'"),
        ({"models": "tiny"}, "expected names and values"),
        ({"writers": {"a": 1}}, "expected a list, for instance writers=a,b"),
    ],
)
def test_wrong_values_are_told_in_words(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        build(Run, {"method": DPO(), "data": demonstrations(2), "out": "x", **values})
    assert "input should" not in str(error.value)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="Run needs 'data'"):
        build(Run, {"method": DPO(), "out": "x"})


def test_settings_find_their_section() -> None:
    found = sorted_settings({"beta": 1, "steps": 2, "top_p": 0.9, "lr": 1e-3, "lora.r": 8, "optimizer.clip": 0}, GRPO)
    assert found == {
        "method": {"beta": 1},
        "run": {"steps": 2},
        "sampling": {"top_p": 0.9},
        "optimizer": {"lr": 1e-3, "clip": 0},
        "lora": {"r": 8},
    }
    for key in ("stpes", "optimizer.lrr", "sampling.beta"):
        with pytest.raises(ConfigError, match="option"):
            sorted_settings({key: 1}, GRPO)


def test_help_is_the_docstring_under_the_field() -> None:
    assert field_help(DPO)["beta"].startswith("Weight of the implicit KL")
    assert field_help(Run)["seed"] == "Of everything that is drawn."


def test_formulas_are_found_by_name() -> None:
    assert function_named("sequence_mean") is sequence_mean


@dataclass(frozen=True)
class Parent:
    """A base with a field."""

    first: int = 1


@dataclass(frozen=True)
class Child(Parent):
    """A class whose base has fields too."""

    second: float | None = None


def test_fields_of_bases_are_checked() -> None:
    assert build(Child, {"first": "2", "second": 1}) == Child(2, 1.0)
    with pytest.raises(ConfigError, match=r"Child\.first is 'x'"):
        build(Child, {"first": "x"})
