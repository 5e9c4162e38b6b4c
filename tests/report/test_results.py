"""What the page says of stages that made a model worse, of answers in another format, and of few questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from posttrain.report.comparison import compare, lineage, path_to, state
from posttrain.report.folder import read_folder, starts_of
from posttrain.report.page import write_report
from posttrain.report.results import Results, lede, points, results_in_words, results_of
from posttrain.report.statistics import Interval, paired_difference, proportion_interval
from posttrain.report.summary import write_summary
from posttrain.report.templates import marked

RIGHT = {"reward": 1.0, "right": True, "parsed": True, "completion": "<answer>4</answer>"}
WRONG = {"reward": 0.0, "right": False, "parsed": True, "completion": "<answer>5</answer>"}
OTHER = {"reward": 0.0, "right": False, "parsed": False, "completion": "The answer is 4.<|end|>"}
CUT = OTHER | {"finish": "length"}
RECIPE = "stages: [{name: cold-start, train: sft}, {name: rl, train: grpo, start: cold-start}]"


def entries(spelled: str) -> list[dict[str, object]]:
    """One a letter: r(ight), w(rong), o(ther format), c(ut off)."""
    return [{"r": RIGHT, "w": WRONG, "o": OTHER, "c": CUT}[letter] for letter in spelled]


def write(folder: Path, models: Mapping[str, str], *, recipe: str = RECIPE, old: bool = False) -> Path:
    """A run folder with evaluations alone; `old`: records that do not say whether an answer could be read."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    numbers: list[dict[str, object]] = []
    for model, spelled in models.items():
        answers = entries(spelled)
        for metric, key in (("accuracy", "right"), ("parsed", "parsed")):
            found = proportion_interval(sum(bool(answer[key]) for answer in answers), len(answers))
            about = {"model": model, "task": "sums", "split": "test", "n": len(answers), "metric": metric}
            numbers.append(about | {"value": found.value, "low": found.low, "high": found.high})
        rows = [{"kind": "evaluation", "model": model, "id": str(i), "prompt": "2 + 2", **a} for i, a in enumerate(answers)]
        kept = [{key: value for key, value in row.items() if not old or key != "parsed"} for row in rows]
        (folder / "evaluations" / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    stages = [
        {"name": name, "kind": "train", "method": None, "artifact": None, "seconds": 1.0, "metrics": {}}
        for name in models
        if name != "base"
    ]
    write_summary(folder, name="run", seed=0, versions={}, stages=stages, evaluations=numbers)
    return folder


@pytest.fixture
def worse(tmp_path: Path) -> Path:
    """base 0 of 20 right and none in the format, cold-start 13, rl 7 of those and none else."""
    return write(tmp_path / "run", {"base": "o" * 20, "cold-start": "r" * 13 + "w" * 7, "rl": "r" * 7 + "w" * 9 + "c" * 4})


def results(folder: Path) -> list[Results]:
    return results_of(read_folder(folder))


def test_the_headline_names_the_way(worse: Path) -> None:
    said = lede(results(worse))
    assert "0.0 % (base) → 65.0 % (cold-start) → 35.0 % (rl)" in said
    assert said in write_report(worse).read_text("utf-8").replace("&#39;", "'")


def test_a_stage_that_made_things_worse_is_warned_of(worse: Path) -> None:
    (warning,) = results_in_words(results(worse))
    change = paired_difference({str(i): float(i < 13) for i in range(20)}, {str(i): float(i < 7) for i in range(20)})
    assert warning.startswith(f"rl is worse than cold-start, the model it started from: {points(change, 'share')}")
    assert "\u221230.0 pts" in warning
    html = write_report(worse).read_text("utf-8")
    assert warning in html
    assert "no reason for a warning" not in html
    card = html[html.index('<span class="model">rl</span>') :]
    assert "\u221230.0 pts" in card[: card.index("from cold-start")]
    assert "+35.0 pts" in card[: card.index("from base")]


def test_before_is_the_start_of_the_last_stage(worse: Path) -> None:
    run = read_folder(worse)
    found = compare(run.answers, run.starts)
    assert found is not None
    assert (found.first, found.start, found.last) == ("base", "cold-start", "rl")
    assert found.counts == {"newly right": 0, "newly wrong": 6, "right before and after": 7, "wrong before and after": 7}
    assert found.since_first == {
        "newly right": 7,
        "newly wrong": 0,
        "right before and after": 0,
        "wrong before and after": 13,
    }
    for problem in found.problems:
        assert [answer.model for answer in problem.answers] == ["base", "cold-start", "rl"]
    lost = next(problem for problem in found.problems if problem.kind == "newly wrong")
    assert [answer.state for answer in lost.answers] == ["not in the asked format", "right", "wrong"]
    html = write_report(worse).read_text("utf-8")
    assert "rl against cold-start, the model it started from, on 20 problems: <b>0</b> newly right, <b>6</b> newly wrong" in html


def test_what_may_be_chance_is_not_called_a_gain(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"base": "w" * 20, "cold-start": "r" * 10 + "w" * 10, "rl": "w" + "r" * 11 + "w" * 8})
    (warning,) = results_in_words(results(folder))
    assert warning.startswith("rl cannot be told from cold-start, the model it started from: +5.0 pts")
    assert results_in_words(results(write(tmp_path / "better", {"base": "w" * 20, "rl": "r" * 15 + "w" * 5}))) == []


def test_a_control_arm_is_no_step_of_the_way(tmp_path: Path) -> None:
    arms = "stages: [{name: cold-start}, {name: longer, start: base}, {name: drawn, sample: base}, {name: rl, start: cold-start}]"
    models = {"base": "w" * 20, "cold-start": "r" * 5 + "w" * 15, "longer": "r" * 19 + "w", "rl": "r" * 12 + "w" * 8}
    folder = write(tmp_path / "run", models, recipe=arms)
    head = results(folder)[0]
    assert [card.entry["model"] for card in head.path] == ["base", "cold-start", "rl"]
    assert [card.start for card in head.entries] == [None, "base", "base", "cold-start"]
    assert results_in_words([head]) == [], "rl is below the control arm, from which it did not start"


def test_a_model_comes_from_the_nearest_that_was_evaluated() -> None:
    starts = {"a": "base", "b": "a", "c": "b"}
    assert lineage(["base", "c"], starts) == {"base": None, "c": "base"}
    assert lineage(["b", "c"], starts) == {"b": None, "c": "b"}
    assert lineage(["base", "a", "b"], {}) == {"base": None, "a": "base", "b": "a"}
    assert lineage(["a", "b"], {"a": "b", "b": "a"}) == {"a": "b", "b": "a"}
    assert path_to("b", {"a": "b", "b": "a"}) == ["a", "b"], "a circle ends"
    assert lineage(["a"], {"a": "x", "x": "a"}) == {"a": None}
    for other in ("", "[1", "- a", "stages: 3", "stages: [3, {train: sft}]", "a: &a [*a]"):
        assert starts_of(other) == {}


def test_an_answer_in_another_format_is_not_called_wrong(worse: Path) -> None:
    assert [state(entry) for entry in entries("rwoc")] == ["right", "wrong", "not in the asked format", "cut off"]
    assert state(OTHER | {"reward": None}) == "not judged"
    run = read_folder(worse)
    found = compare(run.answers, run.starts)
    assert found is not None
    assert found.states == {
        "base": {"right": 0, "wrong": 0, "not in the asked format": 20, "cut off": 0},
        "cold-start": {"right": 13, "wrong": 7, "not in the asked format": 0, "cut off": 0},
        "rl": {"right": 7, "wrong": 9, "not in the asked format": 0, "cut off": 4},
    }
    html = write_report(worse).read_text("utf-8")
    assert '<span class="unread">not in the asked format</span>' in html


def test_the_headline_says_what_the_format_has_to_do_with_it(worse: Path, tmp_path: Path) -> None:
    said = lede(results(worse))
    assert "Parsed: 0.0 % → 100.0 % → 80.0 %." in said
    assert "counts as wrong, so where few parse, as those of base, accuracy speaks of the format too." in said
    assert "Parsed" not in lede(results(write(tmp_path / "all", {"base": "w" * 20, "rl": "r" * 20})))


def test_records_that_do_not_say_whether_they_parse(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"base": "o" * 20, "rl": "r" * 13 + "w" * 7}, old=True)
    html = write_report(folder).read_text("utf-8")
    assert '<span class="wrong">wrong</span>' in html
    assert "unread\">" not in html


def test_a_change_on_few_questions_has_no_interval(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"base": "wwww", "rl": "rrww"})
    change = results(folder)[0].entries[-1].since_start
    assert change is not None
    assert (change.value, change.known) == (0.5, False)
    assert points(change, "share") == "+50.0 pts"
    assert points(Interval(0.5, 0.25, 0.75, 20), "share") == "+50.0 pts (+25.0 to +75.0)"
    write_report(folder)


def test_models_stand_in_the_order_of_their_making(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"base": "w" * 20, "cold-start": "r" * 5 + "w" * 15, "rl": "r" * 12 + "w" * 8})
    summary = json.loads((folder / "summary.json").read_text())
    summary["evaluations"].reverse()
    (folder / "summary.json").write_text(json.dumps(summary))
    assert all([card.entry["model"] for card in found.entries] == ["base", "cold-start", "rl"] for found in results(folder))


def test_special_tokens_are_set_apart_and_all_else_is_text() -> None:
    assert str(marked("<b>7<|end|>")) == '&lt;b&gt;7<span class="mark">&lt;|end|&gt;</span>'
    assert str(marked('<|"><script>|>')) == "&lt;|&#34;&gt;&lt;script&gt;|&gt;"
