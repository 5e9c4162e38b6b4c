"""The page: whole, alone, escaped, and with the numbers of the files."""

from __future__ import annotations

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from posttrain.errors import DataError
from posttrain.report.comparison import compare
from posttrain.report.folder import read_folder
from posttrain.report.page import redacted, write_report
from posttrain.report.statistics import paired_difference
from posttrain.report.summary import read_summary
from posttrain.report.templates import clean

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags with their attributes, texts by tag, and a complaint when tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.data: list[tuple[str, str]] = []  # value, text of <data>
        self.texts: dict[str, list[str]] = defaultdict(list)
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
            self.texts[tag].append("")
        if tag == "data":
            self.data.append((found["value"], ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if self.open and self.open[-1] == "data":
            value, text = self.data[-1]
            self.data[-1] = (value, text + data)


@pytest.fixture(scope="module")
def html(finished_run: Path) -> str:
    return write_report(finished_run).read_text("utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def changed(finished_run: Path, tmp_path: Path) -> Path:
    """A copy without the large metrics, to be changed by a test."""
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    shutil.rmtree(tmp_path / "run" / "grpo")
    return tmp_path / "run"


def test_the_page_is_whole(html: str, page: Page) -> None:
    assert html.startswith("<!doctype html>")
    assert {"html", "head", "title", "main", "table", "figure"} <= {tag for tag, _ in page.tags}
    assert page.texts["title"] == ["word-problems · posttrain report"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in html


def test_nothing_comes_from_elsewhere_and_nothing_runs(html: str, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "srcset", "href", "action", "data", "poster"}:
                assert value.startswith("data:image/svg+xml;base64,"), value[:60]
    assert re.search(r"url\(|@import|javascript:", html) is None
    policy = [found["content"] for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_images_are_whole_and_refer_to_nothing(page: Page) -> None:
    images = [v for tag, found in page.tags for name, v in found.items() if name in {"src", "srcset"}]
    assert len(images) >= 30
    for image in images:
        root = ElementTree.fromstring(base64.b64decode(image.split(",", 1)[1]))
        for element in root.iter():
            assert not element.tag.endswith("script")
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith("#")
    assert all(found["alt"] for tag, found in page.tags if tag == "img")


def test_what_a_model_wrote_is_text(html: str, page: Page) -> None:
    shown = [text for text in page.texts["pre"] if "alert('x')" in text]
    assert shown
    assert all("<script>alert('x')</script><img src=\"https://evil.example/p.png\"" in text for text in shown)
    assert "<script" not in html
    assert '<img src="https' not in html


def test_hostile_names_are_text(finished_run: Path, tmp_path: Path) -> None:
    folder = changed(finished_run, tmp_path)
    bad = "</title><script>x</script>$a$ & <b>"
    summary = json.loads((folder / "summary.json").read_text())
    summary["name"] = bad
    summary["evaluations"][0]["model"] = bad
    summary["stages"][0]["method"] = bad
    summary["versions"][bad] = bad
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text(bad)
    text = write_report(folder).read_text("utf-8")
    assert "<script" not in text
    assert Page(text).texts["h1"] == [bad]


def test_numbers_are_those_of_the_summary(finished_run: Path, page: Page) -> None:
    summary = read_summary(finished_run)
    shown = [float(value) for value, _ in page.data if value]
    for entry in summary["evaluations"]:
        for number in (entry["value"], entry["low"], entry["high"]):
            assert number in shown
    for stage in summary["stages"]:
        assert stage["seconds"] in shown
    for value, text in page.data:
        if text.endswith(" %"):
            assert text == f"{100 * float(value):.1f} %"
    cards = [text for text in page.texts["span"] if re.fullmatch(r"[\d.]+ %", text)]
    accuracy = [entry["value"] for entry in summary["evaluations"] if entry["metric"] == "accuracy"]
    assert cards == [f"{100 * (value or 0):.1f} %" for value in accuracy]


def test_the_change_is_that_of_the_same_problems(finished_run: Path, html: str) -> None:
    run = read_folder(finished_run)
    scores = {model: {q: entry["reward"] for q, entry in found.items()} for model, found in run.answers.items()}
    change = paired_difference(scores["base"], scores["grpo"])
    assert f"+{100 * change.value:.1f} pts (+{100 * change.low:.1f} to +{100 * change.high:.1f})" in html


def test_a_change_is_left_out_when_answers_are_not_those_of_the_number(finished_run: Path, tmp_path: Path) -> None:
    folder = changed(finished_run, tmp_path)
    lines = (folder / "evaluations" / "grpo.jsonl").read_text().splitlines()
    (folder / "evaluations" / "grpo.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    text = write_report(folder).read_text("utf-8")
    assert text.count('<div class="change">') == 1, "that of the stage in between stays"


def test_time_by_phase_adds_up_to_100(page: Page) -> None:
    lists = [text for text in page.texts["ul"] if "other" in text and "%" in text]
    assert len(lists) == 2
    for text in lists:
        assert sum(int(share) for share in re.findall(r"(\d+) %", text)) == 100


def test_warnings_are_said(page: Page) -> None:
    assert any("1 update was skipped in 240 steps" in text for text in page.texts["li"])


def test_the_same_problems_are_side_by_side(finished_run: Path, page: Page) -> None:
    found = compare(read_folder(finished_run).answers)
    assert found is not None
    assert sum(found.counts.values()) == found.total == 200
    kinds = [problem.kind for problem in found.problems]
    assert "newly wrong" in kinds, "what was lost is shown beside what was gained"
    for problem in found.problems:
        assert [answer.model for answer in problem.answers] == ["base", "cold-start", "grpo"]
        right = [answer.right for answer in problem.answers]
        assert (
            problem.kind
            == {
                (False, True): "newly right",
                (True, False): "newly wrong",
                (True, True): "right before and after",
                (False, False): "wrong before and after",
            }[right[-2], right[-1]]
        )
    assert len(page.texts["article"]) == len(found.problems)


def test_a_secret_of_the_recipe_is_not_shown(html: str) -> None:
    assert "do-not-show-me" not in html
    assert "api_key: •••" in html
    kept = "stop_token: <|end|>\nmax_tokens: 64\n"
    assert redacted(kept) == kept
    assert redacted("hub: hf_abcdefghijklmnopqrst") == "hub: •••"


def test_the_same_files_give_the_same_page(finished_run: Path, tmp_path: Path) -> None:
    folder = changed(finished_run, tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_torn_lines_are_skipped_with_a_note(finished_run: Path, tmp_path: Path) -> None:
    folder = changed(finished_run, tmp_path)
    with (folder / "cold-start" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 60, "lo')
    text = write_report(folder).read_text("utf-8")
    assert "metrics.jsonl of &#39;cold-start&#39;: 1 unreadable line skipped" in text


@pytest.mark.parametrize("missing", ["summary.json", "recipe.yaml", "evaluations", "cold-start", "all but one stage"])
def test_missing_pieces_are_left_out(finished_run: Path, tmp_path: Path, missing: str) -> None:
    folder = changed(finished_run, tmp_path)
    gone = ["summary.json", "recipe.yaml", "evaluations"] if missing == "all but one stage" else [missing]
    for name in gone:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(folder).read_text("utf-8"))
    assert page.texts["h1"] == ["run" if "summary.json" in gone else "word-problems"]


@pytest.mark.parametrize(
    "form",
    ["null", "3", '"x"', "[1]", '{"step": 1, "loss": "high", "reward": [1]}', '{"step": 1, "reward_counts": [[1]]}'],
)
def test_lines_of_another_form_do_not_break_the_page(finished_run: Path, tmp_path: Path, form: str) -> None:
    folder = changed(finished_run, tmp_path)
    for name in ("cold-start/metrics.jsonl", "cold-start/samples.jsonl", "evaluations/base.jsonl"):
        (folder / name).write_text(form + "\n" + '{"step": 2, "loss": 1.0, "reward_counts": 3}\n')
    Page(write_report(folder).read_text("utf-8"))


def test_a_stage_cannot_lead_out_of_the_folder(finished_run: Path, tmp_path: Path) -> None:
    folder = changed(finished_run, tmp_path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "metrics.jsonl").write_text('{"step": 0, "outside_metric": 1.0}\n')
    summary = json.loads((folder / "summary.json").read_text())
    summary["stages"][1]["name"] = "../outside"
    (folder / "summary.json").write_text(json.dumps(summary))
    text = write_report(folder).read_text("utf-8")
    assert "outside_metric" not in text
    assert "is not a folder of this run" in text


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="summary"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        write_report(tmp_path / "nowhere")


def test_an_evaluation_beside_training_has_a_curve(finished_run: Path, tmp_path: Path) -> None:
    folder = changed(finished_run, tmp_path)
    with (folder / "cold-start" / "metrics.jsonl").open("a") as file:
        for step in (0, 30):
            file.write(json.dumps({"step": step, "stage": "cold-start", "evaluation": 0.1 + step / 100}) + "\n")
    text = write_report(folder).read_text("utf-8")
    assert "Curve of evaluation over 2 steps: 10.0 % at first, 40.0 % at last" in text
    assert "Curve of loss over 60 steps" in text


def test_text_is_made_fit_for_a_page() -> None:
    assert clean("a\x00b\r\nc\x1b[31m\u202ed\ud800") == "a\ufffdb\nc\ufffd[31m\ufffdd\ufffd"
    assert clean("x" * 10, 4) == "xxxx\n… 6 more characters"
    assert clean(17) == "17"
