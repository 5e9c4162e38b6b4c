"""`summary.json` has one form, and says which key breaks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import DataError
from posttrain.report.summary import read_summary, write_summary

STAGE: dict[str, Any] = {
    "name": "grpo",
    "kind": "train",
    "method": "GRPO",
    "artifact": "grpo/model",
    "seconds": 1.5,
    "metrics": {"reward": 0.5},
}
EVALUATION: dict[str, Any] = {
    "model": "grpo",
    "task": "word_problems",
    "split": "test",
    "n": 100,
    "metric": "accuracy",
    "value": 0.41,
    "low": 0.32,
    "high": 0.51,
}
WHOLE: dict[str, Any] = {
    "name": "run",
    "seed": 3,
    "versions": {"torch": "2.11"},
    "stages": [STAGE],
    "evaluations": [EVALUATION],
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_summary(tmp_path / "new", **WHOLE)
    assert path == tmp_path / "new" / "summary.json"
    assert read_summary(tmp_path / "new") == WHOLE
    assert list(json.loads(path.read_text())) == ["name", "seed", "versions", "stages", "evaluations"]


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    stage = STAGE | {"metrics": {"loss": float("nan")}}
    write_summary(tmp_path, **WHOLE | {"stages": [stage], "evaluations": [EVALUATION | {"low": float("nan")}]})
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    assert read_summary(tmp_path)["stages"][0]["metrics"] == {"loss": None}
    assert read_summary(tmp_path)["evaluations"][0]["low"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [STAGE | {"secnods": 1}]}, r"stages\[0\] has the key 'secnods'.*nearest: 'seconds'"),
        ({"stages": [{k: v for k, v in STAGE.items() if k != "method"}]}, "lacks 'method'"),
        ({"evaluations": [EVALUATION | {"n": 0.5}]}, r"\['n'\] is 0.5, expected a whole number"),
        ({"evaluations": [EVALUATION | {"value": "high"}]}, "expected a number or null"),
        ({"stages": ["grpo"]}, "expected a mapping"),
    ],
)
def test_another_form_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_summary(tmp_path, **WHOLE | change)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"name": 1}', "{", '{"stages": 3}'])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no summary\.json"):
        read_summary(tmp_path)
