"""What the charts' axes and the page's colours say."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from posttrain.report.charts import Bar, bars, curve
from posttrain.report.names import BY_NAME
from posttrain.report.page import write_report


def texts(image: str) -> list[str]:
    """The texts of a chart."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", base64.b64decode(image.split(",", 1)[1]).decode())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_steps_are_whole_and_counted_from_one(count: int) -> None:
    """The values lie far from any step, so a fraction would be one of a step."""
    chart = curve(BY_NAME["tokens_per_second"], range(count), [20_000.0 + step for step in range(count)])
    ticks = [text for text in texts(chart.light) if re.fullmatch(r"[\d.]+", text) and float(text) <= count]
    assert ticks
    assert all(text.isdecimal() for text in ticks)
    if count <= 3:
        assert [tick for tick in ticks if tick != "0"] == [str(step + 1) for step in range(count)]
    assert f"over {count} step{'s' if count > 1 else ''}:" in chart.alt


def test_a_chart_of_results_says_what_they_are() -> None:
    assert bars("Pass@8", [Bar("base", 0.1, None, None)], unit="share", caption="chance").caption == "chance"


def test_a_phase_has_one_colour_in_all_stages(tmp_path: Path) -> None:
    for stage, phases in (("a", ("render", "update", "other")), ("b", ("sample", "render", "score", "update", "other"))):
        (tmp_path / stage).mkdir()
        line = {"step": 0, "loss": 1.0} | {f"time/{name}": 1.0 for name in phases}
        (tmp_path / stage / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    html = write_report(tmp_path).read_text("utf-8")
    found = re.findall(r'<li><i class="(p\d)"></i>(\w+)', html)
    colours = {name: {colour for colour, other in found if other == name} for _, name in found}
    assert set(colours) == {"render", "update", "other", "sample", "score"}
    assert all(len(some) == 1 for some in colours.values()), colours
    assert len({some.pop() for some in colours.values()}) == 5, "and no two have the same"


def test_bars_below_zero_have_room_up_to_zero() -> None:
    drawn = bars("Correlation", [Bar("a", -0.11, None, None), Bar("b", -0.42, None, None)], unit="number")
    svg = base64.b64decode(drawn.light.split(",", 1)[1]).decode()
    assert re.search(r">0[.0]*<", svg), "the axis ends at 0"
    assert "−0.11" in svg or "-0.11" in svg
