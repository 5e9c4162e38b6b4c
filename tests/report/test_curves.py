"""Lines to look at: what evaluations left, and a proxy reward beside the gold one."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.report.curves import curves_in, drawn, over_optimisation


def steps(count: int = 20) -> list[dict[str, float]]:
    """A proxy that rises while the gold reward rises first and then falls."""
    return [
        {"step": i, "kl": 0.01 * i, "length": 50.0, "reward/model": 0.1 * i, "reward/right": 0.5 + 0.02 * i - 0.0012 * i * i}
        for i in range(count)
    ]


def test_proxy_and_gold_against_kl() -> None:
    curve = over_optimisation(steps())
    assert curve is not None
    proxy, gold = curve["lines"]["model"], curve["lines"]["right"]
    assert [point[0] for point in proxy] == sorted(point[0] for point in proxy)
    assert proxy[-1][1] == max(point[1] for point in proxy) == 1.0
    assert gold[-1][1] < max(point[1] for point in gold)
    assert max(point[0] for point in proxy) <= 0.19 * 50
    assert "Proxy and gold" in drawn(curve).alt


def test_one_reward_or_few_steps_are_no_curve() -> None:
    assert over_optimisation([{k: v for k, v in row.items() if k != "reward/right"} for row in steps()]) is None
    assert over_optimisation(steps(5)) is None
    assert over_optimisation([{**row, "kl": None} for row in steps()]) is None


def test_torn_curves_are_noted_and_others_kept(tmp_path: Path) -> None:
    curve = {"title": "T", "x": "x", "y": "y", "lines": {"a": [[0, 1], [1, 2]]}, "caption": ""}
    (tmp_path / "a.json").write_text(json.dumps({"curves": [curve, {**curve, "lines": {}}]}))
    (tmp_path / "b.json").write_text('{"curves": [')
    (tmp_path / "c.json").write_text('{"numbers": []}')
    notes: list[str] = []
    assert curves_in(tmp_path, notes) == [curve]
    assert len(notes) == 1
    assert "b.json" in notes[0]
    assert drawn(curve).light.startswith("data:image/svg+xml")
