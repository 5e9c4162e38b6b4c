"""The small form of every recipe that ships runs whole on the embedded model: `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.pipeline import run_recipe
from posttrain.recipe import load_recipe, shipped
from posttrain.report.summary import read_summary

EMBEDDED = sorted(name for name in shipped() if load_recipe(name).model == "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_small_form_runs_whole(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, small=True)
    report = run_recipe(recipe, tmp_path / name, quiet=True)
    summary = read_summary(tmp_path / name)
    assert report.is_file()
    assert [stage["name"] for stage in summary["stages"]] == [stage.name for stage in recipe.stages]
    assert {number["model"] for number in summary["evaluations"]} == {name for spec in recipe.evaluate for name in spec.of}
