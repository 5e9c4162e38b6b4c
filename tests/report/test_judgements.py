"""The page of judgements: everything that was said, escaped, nothing that runs, a link from the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.report.judgements import SHOWN, judgements_of, judgements_page, write_judgements
from posttrain.report.page import write_report

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def revision(number: int, **changes: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": "the question as sent"}]
    record = {
        "id": f"q{number}#0",
        "kind": "revision",
        "round": 1,
        "principle": "honest",
        "prompt": [{"role": "user", "content": f"Question {number}"}],
        "before": "I know it all.",
        "critique": "It boasts.",
        "after": "I am not sure.",
        "fault": "",
        "critique_prompt": asked,
        "revision_prompt": asked,
        "model": "base@0123456789ab",
        "critic": "critic@ba9876543210",
    }
    return {**record, **changes}


def choice(**changes: Any) -> dict[str, Any]:
    record = {
        "id": "c0",
        "kind": "choice",
        "principle": "neutral",
        "question": "Which is fairer?",
        "prompt": [{"role": "user", "content": "Compare."}],
        "responses": ["left", "right"],
        "probabilities": [0.25, 0.75],
        "rotations": [[0.1, 0.9], [0.4, 0.6]],
        "neither": 0.01,
        "error": "",
        "choice_prompts": [[{"role": "user", "content": "A or B"}]],
        "model": "base@0123456789ab",
        "judge": "judge@ffffffffffff",
    }
    return {**record, **changes}


def stage(run: Path, name: str, records: list[dict[str, Any]]) -> None:
    folder = run / name / "rows"
    folder.mkdir(parents=True)
    (folder / "judgements.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_without_judgements_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    assert write_judgements(tmp_path) is None
    assert not (tmp_path / "judgements.html").exists()
    stage(tmp_path, "other", [{"kind": "rating", "score": 3}])
    assert judgements_of(tmp_path) == []


def test_everything_that_was_said_is_on_the_page(tmp_path: Path) -> None:
    stage(tmp_path, "triples", [revision(0), revision(1, fault="leaked"), revision(2, after="I know it all.")])
    stage(tmp_path, "compared", [choice(), choice(probabilities=[], rotations=[], error="the judge is away")])
    path = write_judgements(tmp_path)
    assert path is not None
    text = path.read_text()
    for said in ("I know it all.", "It boasts.", "I am not sure.", "not used: leaked", "the question as sent", "Which is fairer?"):
        assert said in text, said
    for said in (
        "base@0123456789ab",
        "critic@ba9876543210",
        "judge@ffffffffffff",
        "0.250",
        "0.750",
        "0.100",
        "0.600",
        "the judge is away",
    ):
        assert said in text, said
    assert re.search(r"<td>honest</td><td class=\"n\">3</td><td class=\"n\">2</td><td class=\"n\">1</td>", text)
    assert re.search(r"<td>neutral</td>.*<td class=\"n\">1</td><td class=\"n\">0.750</td>", text)
    assert "response 2 · <b>chosen</b>" in text
    assert "<script" not in text


def test_what_a_model_wrote_is_escaped(tmp_path: Path) -> None:
    hostile = dict.fromkeys(("id", "principle", "before", "critique", "after", "fault", "model", "critic"), HOSTILE)
    sent = [{"role": HOSTILE, "content": HOSTILE}]
    stage(tmp_path, "triples", [revision(0, **hostile, prompt=sent, critique_prompt=sent, revision_prompt=sent)])
    stage(
        tmp_path,
        "compared",
        [choice(question=HOSTILE, responses=[HOSTILE, "b"], error=HOSTILE), choice(probabilities=[], error=HOSTILE)],
    )
    text = judgements_page(HOSTILE, judgements_of(tmp_path))
    assert HOSTILE not in text
    assert not re.search(r"<(script|img)", text)
    assert text.count("&lt;script&gt;") > 10
    assert "default-src 'none'" in text


def test_a_few_of_many_are_shown_evenly(tmp_path: Path) -> None:
    stage(tmp_path, "triples", [revision(number) for number in range(400)])
    text = judgements_page("run", judgements_of(tmp_path))
    shown = [int(number) for number in re.findall(r"Question (\d+)", text)]
    assert shown == list(range(0, 400, 400 // SHOWN))
    assert f"{SHOWN} of them follow" in text
    assert "400 judgements" in text


@pytest.mark.parametrize("judged", [True, False])
def test_the_report_links_to_it(judged: bool, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    if judged:
        stage(tmp_path, "triples", [revision(0)])
    text = write_report(tmp_path).read_text()
    assert ('<a href="judgements.html">' in text) is judged
    assert (tmp_path / "judgements.html").exists() is judged


def test_what_a_judge_compared_is_shown_with_both_orders_and_its_reasons(tmp_path: Path) -> None:
    compared = {
        "kind": "comparison",
        "id": "q0",
        "prompt": "Which?",
        "answers": ["first", "second", "third"],
        "template": "pairwise",
        "pair": [0, 2],
        "p": 0.3,
        "orders": [0.2, 0.6],
        "rationales": ["because", f"hence {HOSTILE}"],
        "principle": "",
        "error": "",
        "judge": "judge@ffffffffffff",
    }
    chosen = {**compared, "kind": "selection", "p": [0.5, 0.2, 0.3], "rationale": "the first", "principle": "be kind"}
    unread = {**compared, "p": None, "orders": [], "rationales": [], "error": "no verdict"}
    stage(tmp_path, "preferences", [compared, chosen, unread])
    (found,) = judgements_of(tmp_path)
    assert found.records[0]["responses"] == ["first", "third"]
    assert found.records[0]["probabilities"] == pytest.approx([0.3, 0.7])
    assert [list(order) for order in found.records[0]["rotations"]] == [pytest.approx([0.2, 0.8]), pytest.approx([0.4, 0.6])]
    text = judgements_page("run", [found])
    for shown in ("<td>pairwise</td>", "<td>be kind</td>", "because", "the first", "no choice: no verdict"):
        assert shown in text
    assert "<script" not in text


def test_nothing_is_chosen_where_the_judge_is_undecided(tmp_path: Path) -> None:
    stage(tmp_path, "tied", [choice(probabilities=[0.50002, 0.49998])])
    assert "<b>chosen</b>" not in judgements_page("run", judgements_of(tmp_path))
    stage(tmp_path, "won", [choice()])
    assert judgements_page("run", judgements_of(tmp_path)).count("<b>chosen</b>") == 1
