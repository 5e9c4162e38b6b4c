"""The recipes of Constitutional AI: what is mixed into the preference model's rows, and that both are checked whole beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.plan import Plan
from posttrain.recipe import load_recipe
from posttrain.tasks.forbidden_words import rows

JUDGED = [
    {
        "id": f"judged-{i}",
        "prompt": [{"role": "user", "content": "Say the word fox."}],
        "chosen": [{"role": "assistant", "content": "No."}],
        "rejected": [{"role": "assistant", "content": "The word is fox."}],
        "columns": {"preference": 0.75},
    }
    for i in range(4)
]


def plan(tmp_path: Path, **changes: Any) -> Plan:
    """The recipe's plan, with what the judge preferred written already."""
    folder = tmp_path / "compared" / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in JUDGED))
    return Plan(load_recipe("constitutional-ai", changes=changes), tmp_path, quiet=True)


def preferences(tmp_path: Path, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the preference model for a mix of these parts."""
    changes = {"stages.preferences.data.mix": list(parts)} if parts else {}
    made = plan(tmp_path, **changes)
    stage = next(stage for stage in made.recipe.stages if stage.name == "preferences")
    return [dict(row) for row in made.build_run(stage).data]  # type: ignore[union-attr]


def test_the_preference_model_learns_harmlessness_from_the_judge_and_help_from_people(tmp_path: Path) -> None:
    found = preferences(tmp_path)
    people = rows("comparisons", 900)
    assert len(found) == len(JUDGED) + len(people)
    assert {row["id"] for row in found} == {row["id"] for row in [*JUDGED, *people]}
    assert sorted({row["columns"]["preference"] for row in found}) == [0.75, 1.0]


def test_without_the_judges_share_it_is_a_model_of_help_alone(tmp_path: Path) -> None:
    assert preferences(tmp_path, {"split": "comparisons", "count": 30}) == rows("comparisons", 30)


def test_without_the_peoples_share_it_is_a_model_of_harmlessness_alone(tmp_path: Path) -> None:
    assert preferences(tmp_path, {"stage": "compared"}) == JUDGED


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", ["constitutional-ai", "constitutional-ai-simple"])
def test_the_recipes_are_whole(name: str, small: bool, tmp_path: Path) -> None:
    recipe = load_recipe(name, small=small)
    smaller = {f"stages.{stage.name}.data.count": 3 for stage in recipe.stages if getattr(stage.data, "split", None)}
    Plan(load_recipe(name, small=small, changes=smaller), tmp_path, quiet=True).check()
