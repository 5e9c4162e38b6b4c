"""Decontamination by n-grams: what overlaps, what is too little, the source rule, and the command."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.data.decontaminate import clean_name, decontaminate, questions, rows_of, tokens_of, write_clean
from posttrain.errors import ConfigError


def words(name: str, count: int) -> list[str]:
    return [f"{name}{i}" for i in range(count)]


def asked(*turns: str) -> dict:
    """A row that asks in so many turns."""
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "yes"}]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


QUESTION = words("q", 20)


def coverage(*turns: list[str], share: float = 0.0) -> float:
    """How much of the 20 words of the question is found in a row with these turns."""
    result = decontaminate([asked(*(" ".join(turn) for turn in turns))], {"test": [asked(" ".join(QUESTION))]}, share=share)
    return result.removed[0].coverage if result.removed else 0.0


@pytest.mark.parametrize(("shared", "covered"), [(7, 0.0), (8, 0.4), (10, 0.5), (11, 0.55), (20, 1.0)])
def test_a_shared_beginning(shared, covered) -> None:
    train = [*QUESTION[:shared], *words("x", 9)]
    assert coverage(train) == pytest.approx(covered)
    assert bool(coverage(train, share=0.5)) == (shared > 10)  # exactly half is no overlap


def test_two_runs_count_together_in_one_document_only() -> None:
    first, second = QUESTION[:9], QUESTION[10:19]
    assert coverage([*first, *words("x", 3), *second]) == pytest.approx(0.9)
    assert coverage(first, second) == pytest.approx(0.45)  # every turn is a document of its own
    assert not coverage(first, second, share=0.5)
    rows = [asked(" ".join(first)), asked(" ".join(second))]
    assert not decontaminate(rows, {"test": [asked(" ".join(QUESTION))]}).removed


def test_case_and_punctuation_do_not_matter() -> None:
    assert tokens_of("Hello, World") == tokens_of("hello world") == ["hello", "world"]
    assert tokens_of('a,b.c?d!e:f;g(h)"i"-j\nk\\l\tm') == list("abcdefghijklm")
    assert coverage([word.upper() + "," for word in QUESTION]) == 1.0


@pytest.mark.parametrize(("overlapping", "contaminated"), [(20, False), (21, True)])
def test_source_rule(overlapping, contaminated) -> None:
    evaluation = [asked(" ".join(words(f"e{i}-", 12))) for i in range(1000)]
    train = [*evaluation[:overlapping], asked(" ".join(words("own", 30)))]
    result = decontaminate(train, {"test": evaluation})
    assert result.evaluations["test"]["overlapping"] == overlapping
    assert result.evaluations["test"]["contaminated"] == contaminated
    assert [overlap.row for overlap in result.removed] == list(range(overlapping))


def test_a_second_time_removes_nothing() -> None:
    train = [asked(" ".join([*QUESTION[:cut], *words("x", 20 - cut)])) for cut in range(21)]
    against = {"test": [asked(" ".join(QUESTION))]}
    gone = {overlap.row for overlap in decontaminate(train, against).removed}
    assert gone == set(range(11, 21))
    assert not decontaminate([row for number, row in enumerate(train) if number not in gone], against).removed


def test_what_is_said_of_a_row_that_goes() -> None:
    train = [asked("something else altogether " * 4, " ".join([*QUESTION[2:13], "and", "more"]))]
    (overlap,) = decontaminate(train, {"a": [asked("no")], "b": [asked("yes"), asked(" ".join(QUESTION))]}).removed
    assert (overlap.turn, overlap.evaluation, overlap.evaluation_row) == (1, "b", 1)
    assert overlap.shared == " ".join(QUESTION[2:13])
    assert overlap.coverage == pytest.approx(0.55)


def test_a_question_in_two_turns_has_the_mean_of_their_shares() -> None:
    test = [asked(" ".join(QUESTION), " ".join(words("r", 20)))]
    (overlap,) = decontaminate([asked(" ".join(QUESTION))], {"test": test}, share=0.4).removed
    assert overlap.coverage == pytest.approx(0.5)
    assert not decontaminate([asked(" ".join(QUESTION))], {"test": test}).removed


def test_questions_too_short_to_be_found_are_counted() -> None:
    result = decontaminate([asked("how are you")], {"test": [asked("how are you"), asked(" ".join(QUESTION))]})
    assert result.evaluations["test"]["too_short"] == 1
    assert not result.removed


def test_only_user_turns_are_read() -> None:
    system = {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]}
    assert questions(system) == ["hello"]
    assert questions({"messages": asked("one", "two")["prompt"]}) == ["one", "two"]
    assert questions({"prompt": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]}) == ["parts"]
    assert questions({"text": "raw"}) == ["raw"]


@pytest.mark.parametrize("wrong", [{"ngram": 0}, {"share": 1.0}, {"share": -0.1}, {"source_limit": 2.0}])
def test_numbers_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match="expected"):
        decontaminate([asked("a")], {"test": [asked("a")]}, **wrong)
    with pytest.raises(ConfigError, match="no evaluation"):
        decontaminate([asked("a")], {})


def test_sources_by_name(tmp_path: Path) -> None:
    raw, rows = rows_of("task:word-problems:test", count=3)
    assert len(raw) == len(rows) == 3
    with pytest.raises(ConfigError, match="task:NAME:SPLIT"):
        rows_of("task:word-problems")
    with pytest.raises(ConfigError, match="no file"):
        rows_of(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.csv.gz").touch()
    assert clean_name(str(tmp_path / "a.csv.gz")) == tmp_path / "a.clean.jsonl"
    assert clean_name("task:word-problems:train") == Path("train.clean.jsonl")
    assert clean_name("owner/name") == Path("owner-name.clean.jsonl")


def test_ten_thousand_rows_take_seconds() -> None:
    train, test = rows_of("task:word-problems:train", count=10_000)[1], rows_of("task:word-problems:test", count=1000)[1]
    began = time.process_time()
    decontaminate(train, {"test": test})
    assert time.process_time() - began < 10


def files(tmp_path: Path) -> tuple[Path, Path]:
    """Alpaca rows of which two overlap the one evaluation row, and that row."""
    question = "If a train leaves the station at noon and another one at two, when do they meet?"
    train = [
        {"instruction": question, "output": "At four."},
        {"instruction": "What is the capital of France?", "output": "Paris."},
        {"instruction": question.upper(), "output": "Late."},
    ]
    for name, rows in (("train", train), ("test", [{"prompt": question, "id": "t1"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "train.jsonl", tmp_path / "test.jsonl"


def test_the_command_writes_clean_rows_as_they_were_and_the_others_with_reasons(tmp_path: Path) -> None:
    train, test = files(tmp_path)
    shown = CliRunner().invoke(app, ["decontaminate", str(train), "--against", str(test)])
    assert shown.exit_code == 0, shown.output
    assert "1 of 3 rows are kept" in shown.output
    assert "is contaminated" in shown.output
    clean = (tmp_path / "train.clean.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in clean] == [{"instruction": "What is the capital of France?", "output": "Paris."}]
    gone = [json.loads(line) for line in (tmp_path / "train.clean.removed.jsonl").read_text().splitlines()]
    assert [(r["row"], r["source"], r["evaluation_source"], r["coverage"]) for r in gone] == [
        (0, "train.jsonl:1", "test.jsonl:1", 1.0),
        (2, "train.jsonl:3", "test.jsonl:1", 1.0),
    ]
    assert gone[1]["removed"]["output"] == "Late."
    assert gone[0]["shared"].startswith("if a train leaves the station")


def test_the_command_as_json_and_the_source_dropped(tmp_path: Path) -> None:
    train, test = files(tmp_path)
    out = tmp_path / "kept.jsonl"
    call = ["decontaminate", str(train), "-a", str(test), "-o", str(out), "--drop-source", "--json"]
    found = json.loads(CliRunner().invoke(app, call).stdout)
    assert (found["rows"], found["kept"], found["source_dropped"]) == (3, 0, True)
    assert found["evaluations"][str(test)] == {
        "rows": 1,
        "too_short": 0,
        "overlapping": 1,
        "share": 1.0,
        "contaminated": True,
    }
    assert out.read_text() == ""
    gone = [json.loads(line)["reason"] for line in (tmp_path / "kept.removed.jsonl").read_text().splitlines()]
    assert gone == ["overlap", f"contaminated source: {test}", "overlap"]


def test_what_the_command_refuses(tmp_path: Path) -> None:
    train, test = files(tmp_path)
    before = train.read_text()
    for more, word in (
        (["-o", str(train)], "is read"),
        (["-o", str(tmp_path / "clean.csv")], ".jsonl"),
        (["--share", "1.5"], "share"),
        (["-a", "task:nothing:test"], "no task"),
        (["-a", str(tmp_path / "tset.jsonl")], "test.jsonl"),
    ):
        found = CliRunner().invoke(app, ["decontaminate", str(train), "-a", str(test), *more])
        assert isinstance(found.exception, ConfigError)
        assert word in str(found.exception)
    assert train.read_text() == before
    with pytest.raises(ConfigError, match="jsonl"):
        write_clean([], decontaminate([asked("a")], {"t": [asked("a")]}), tmp_path / "x.txt")
