"""Files and row formats: what is read, what it becomes, and what every bad input says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.comparisons import ranked_pairs
from posttrain.data.formats import need, normalise
from posttrain.data.rows import load_rows
from posttrain.errors import ConfigError, DataError, MissingExtraError

SHARED = Path("/work/shared/data")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def one(row: dict[str, Any]) -> dict[str, Any]:
    made, wrong = normalise([row])
    assert not wrong
    return made[0]


PROMPT, GOOD, BAD = [user("1 + 1")], [assistant("2")], [assistant("3")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*PROMPT, *GOOD]}, {"messages": [*PROMPT, *GOOD]}),
        (
            {"conversations": [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}],
             "system": "Be brief."},
            {"messages": [{"role": "system", "content": "Be brief."}, *PROMPT, *GOOD]},
        ),
        (
            {"conversations": [{"from": "human", "value": "1 + 1"}], "chosen": {"from": "gpt", "value": "2"},
             "rejected": {"from": "gpt", "value": "3"}},
            {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        ),
        (
            {"instruction": "Add", "input": "1 1", "output": "2"},
            {"prompt": [user("Add\n\n1 1")], "completion": GOOD},
        ),
        ({"instruction": "1 + 1", "input": "", "output": "2"}, {"prompt": PROMPT, "completion": GOOD}),
        ({"prompt": "1 + 1", "completion": "2"}, {"prompt": PROMPT, "completion": GOOD}),
        ({"prompt": PROMPT, "completion": GOOD}, {"prompt": PROMPT, "completion": GOOD}),
        ({"prompt": "1 + 1", "answer": "2"}, {"prompt": PROMPT, "answer": "2"}),
        ({"prompt": "1 + 1", "chosen": "2", "rejected": "3"}, {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}),
        (
            {"chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD]},
            {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        ),
        (
            {"chosen": "\n\nHuman: 1 + 1\n\nAssistant: 2", "rejected": "\n\nHuman: 1 + 1\n\nAssistant: 3"},
            {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        ),
        (  # the same on both sides: the last answer stays an answer
            {"chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *GOOD]},
            {"prompt": PROMPT, "chosen": GOOD, "rejected": GOOD},
        ),
        (  # they part at the second answer
            {"chosen": [*PROMPT, *GOOD, user("sure?"), assistant("yes")],
             "rejected": [*PROMPT, *GOOD, user("sure?"), assistant("no")]},
            {"prompt": [*PROMPT, *GOOD, user("sure?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        ),
        (
            {"prompt": "1 + 1", "completion": "2", "label": "True"},
            {"prompt": PROMPT, "completion": GOOD, "label": True},
        ),
        ({"completion": [*PROMPT, *GOOD], "label": 0}, {"prompt": PROMPT, "completion": GOOD, "label": False}),
        (
            {"prompt": "1 + 1", "responses": ["3", "2"], "ranking": [1, 0]},
            {"prompt": PROMPT, "responses": [BAD, GOOD], "ranking": [1, 0]},
        ),
        (
            {"prompt": "1 + 1", "completions": ["so", "2"], "labels": [True, False]},
            {"prompt": PROMPT, "completion": [assistant("so\n2")], "steps": ["so", "2"], "labels": [True, False]},
        ),
        (
            {"question": "1 + 1", "answer": "It is <<1+1=2>>2.\n#### 1,002"},
            {"prompt": PROMPT, "completion": [assistant("It is <<1+1=2>>2.\n#### 1,002")], "answer": "1002",
             "solution": "It is <<1+1=2>>2.\n#### 1,002"},
        ),
        ({"text": "once upon"}, {"text": "once upon"}),
    ],
)  # fmt: skip
def test_every_format_becomes_messages_and_other_keys_ride_along(row: dict[str, Any], expected: dict[str, Any]) -> None:
    rest = {"id": 7, "tools": [{"name": "add"}], "_source": "a:1", "extra": None}
    assert one({**row, **rest}) == {**expected, **rest}


def test_ranked_pairs() -> None:
    row = one({"prompt": "x", "responses": ["a", "b", "c"], "ranking": [2, 0, 1], "id": 1})
    pairs = ranked_pairs([row])
    contents = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]
    assert contents == [("c", "a"), ("c", "b"), ("a", "b")]
    need(pairs, "pairs", "DPO")


ROWS = [{"prompt": "1 + 1", "completion": "2", "id": 1}, {"prompt": "2 + 2", "completion": "4", "id": 2}]


def expected(name: str) -> list[dict[str, Any]]:
    return [
        {"prompt": [user("1 + 1")], "completion": [assistant("2")], "id": 1, "_source": f"{name}:1"},
        {"prompt": [user("2 + 2")], "completion": [assistant("4")], "id": 2, "_source": f"{name}:2"},
    ]


def test_files(tmp_path: Path) -> None:
    assert load_rows(lines(tmp_path / "a.jsonl", *ROWS)) == expected("a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert load_rows(tmp_path / "a.jsonl.gz") == expected("a.jsonl.gz")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    assert load_rows(tmp_path / "bom.jsonl") == expected("bom.jsonl")
    for name, whole in {
        "list.json": ROWS,
        "wrapped.json": {"data": ROWS},
        "columns.json": {key: [row[key] for row in ROWS] for key in ROWS[0]},
    }.items():
        (tmp_path / name).write_text(json.dumps(whole))
        assert load_rows(tmp_path / name) == expected(name)
    lines(tmp_path / "lines.json", *ROWS)
    assert load_rows(tmp_path / "lines.json") == expected("lines.json")
    (tmp_path / "single.json").write_text(json.dumps({"messages": [*PROMPT, *GOOD]}))
    assert load_rows(tmp_path / "single.json")[0]["messages"] == [*PROMPT, *GOOD]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"1, then\n2",3\n2 + 2,4\n')
    rows = load_rows(path)
    assert rows[0]["prompt"] == [user("1, then\n2")]
    assert [row["_source"] for row in rows] == ["a.csv:3", "a.csv:4"]  # the line a row ends on
    talk = json.dumps([*PROMPT, *GOOD]).replace('"', '""')
    path.write_text(f'messages\n"{talk}"\n')
    assert load_rows(path)[0]["messages"] == [*PROMPT, *GOOD]
    path.write_text("prompt,completion\n1,2,3\n")
    with pytest.raises(DataError, match=r"a.csv:2: not 2 fields"):
        load_rows(path)
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\n1 + 1\t2\n")
    assert load_rows(tmp_path / "a.tsv")[0]["completion"] == GOOD


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    rows = [{"messages": [*PROMPT, {**GOOD[0], "name": "it"}], "id": 1}]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert load_rows(tmp_path / "a.parquet") == [{**rows[0], "_source": "a.parquet:1"}]
    table.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(tmp_path / "saved") == [{**rows[0], "_source": "saved:1"}]
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "splits"))
    assert load_rows(tmp_path / "splits", split="test")[0]["id"] == 1
    with pytest.raises(ConfigError, match=r"has no split 'tset' \(nearest: 'test'\)"):
        load_rows(tmp_path / "splits", split="tset")
    (tmp_path / "broken.parquet").write_text("PAR1 not really")
    with pytest.raises(DataError, match="not a whole Parquet file"):
        load_rows(tmp_path / "broken.parquet")


def test_a_folder_of_files(tmp_path: Path) -> None:
    lines(tmp_path / "train-00.jsonl", ROWS[0])
    lines(tmp_path / "train-01.jsonl", ROWS[1])
    lines(tmp_path / "test.jsonl", ROWS[1])
    lines(tmp_path / "training-notes.jsonl", {"text": "no"})
    assert [row["id"] for row in load_rows(tmp_path)] == [1, 2]
    assert [row["id"] for row in load_rows(tmp_path, limit=1)] == [1]
    assert [row["_source"] for row in load_rows(tmp_path, split="test")] == ["test.jsonl:1"]
    with pytest.raises(ConfigError, match=r"no file for the split 'validation'.*found \['test.jsonl'"):
        load_rows(tmp_path, split="validation")


def test_rename_and_limit(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"q": "1 + 1", "response": "2", "prompt": "old"}, {"q": "2", "response": "3"})
    rows = load_rows(path, rename={"prompt": "q", "completion": "response"}, limit=1)
    assert rows == [{"prompt": PROMPT, "completion": GOOD, "_source": "a.jsonl:1"}]
    with pytest.raises(ConfigError, match=r"'respones' is to be renamed to 'completion'.*nearest: 'response'"):
        load_rows(path, rename={"completion": "respones"})
    with pytest.raises(ConfigError, match="limit is 0"):
        load_rows(path, limit=0)


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"pip install 'posttrain\[hub\]'"):
        load_rows(tmp_path / "a.parquet")


def test_a_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="no file 'nobody/nothing-here', and the hub's data set"):
        load_rows("nobody/nothing-here")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", *ROWS)
    with pytest.raises(ConfigError, match=r"no file .*trian.jsonl' \(nearest: 'train.jsonl'\)"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(ConfigError, match=r"the folder .* does not exist"):
        load_rows(tmp_path / "no" / "train.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="is empty"):
        load_rows(tmp_path / "empty.jsonl")
    (tmp_path / "zero.csv").write_text("")
    with pytest.raises(DataError, match="is empty"):
        load_rows(tmp_path / "zero.csv")
    (tmp_path / "head.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(tmp_path / "head.csv")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ConfigError, match=r"unknown suffix; expected one of .jsonl"):
        load_rows(tmp_path / "a.docx")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{'prompt': 1}", r"a.jsonl:2: not JSON .* expected one JSON object a line, found \"\{'prompt': 1\}\""),
        ("[1, 2]", r"a.jsonl:2: list; expected one JSON object a line; a file that is one JSON list is named .json"),
        ("[" * 100_000, r"a.jsonl:2: (JSON nested too deeply|not JSON)"),
        ({"prompt": 3, "completion": "2"}, r"a.jsonl:2: 'prompt' is int 3; expected a string or a list of messages"),
        ({"prompt": "x", "completion": " "}, r"a.jsonl:2: 'completion' has an empty assistant message"),
        ({"prompt": "x", "completion": []}, r"a.jsonl:2: 'completion' is an empty list"),
        ({"prompt": " ", "completion": "2"}, r"a.jsonl:2: 'prompt' is empty"),
        ({"prompt": "x", "completion": [user("2")]}, r"a.jsonl:2: 'completion' has no assistant message"),
        ({"prompt": "x", "completion": ["2"]}, r"a.jsonl:2: 'completion'\[0\] is str '2'; expected an object"),
        ({"prompt": "x", "completion": [{"role": 1, "content": "2"}]}, r"'completion'\[0\] has the role int 1"),
        ({"prompt": "x", "completion": [{"role": "assistant", "content": 2}]}, r"has the content int 2"),
        ({"messages": [user("x")]}, r"a.jsonl:2: a row in the format 'conversation' .* among rows in the format"),
        ({"promt": "x", "completion": "2"}, r"a.jsonl:2: .*'promt' \(nearest: 'prompt'\).*--map new=old"),
    ],
)
def test_bad_rows(tmp_path: Path, bad: Any, message: str) -> None:
    path = lines(tmp_path / "a.jsonl", ROWS[0], bad)
    with pytest.raises(DataError, match=message):
        load_rows(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "humna", "value": "x"}]}, "from 'humna' .nearest: 'human'"),
        ({"conversations": [{"from": "human", "value": 1}]}, "the value int 1"),
        ({"chosen": "yes", "rejected": "no"}, "a text without a prompt beside it"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "share no first message"),
        ({"prompt": "x", "responses": ["a"], "ranking": [0]}, "expected a list of at least two"),
        ({"prompt": "x", "responses": ["a", "b"], "ranking": [1, 2]}, "the numbers 0 to 1"),
        ({"prompt": "x", "completions": ["a"], "labels": [1, 0]}, "a list of 1 labels"),
        ({"prompt": "x", "completions": [1], "labels": [1]}, "a list of strings"),
        ({"prompt": "x", "completion": "a", "label": "good"}, "expected true .wanted., false .not wanted., or a number"),
        ({"completion": "a", "label": True}, "a text without a prompt"),
        ({"instruction": 1, "output": "a"}, "'instruction' is int 1"),
        ({"question": "x", "answer": []}, "'answer' is list"),
        ({"text": " "}, "'text' is empty"),
        ({"text": 5}, "'text' is int 5"),
        ({"messages": "hello"}, "expected a list of messages"),
        ({"messages": []}, "empty list"),
    ],
)
def test_bad_values(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        normalise([row])


def test_bad_encodings(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: byte 0xe9 is not UTF-8"):
        load_rows(tmp_path / "latin.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:30])
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(tmp_path / "cut.jsonl.gz")
    (tmp_path / "cut.json").write_text('[{"text": "a"}, {"te')
    with pytest.raises(DataError, match="not JSON"):
        load_rows(tmp_path / "cut.json")
    (tmp_path / "uneven.json").write_text('{"prompt": ["a", "b"], "completion": ["c"]}')
    with pytest.raises(DataError, match="the columns have different lengths"):
        load_rows(tmp_path / "uneven.json")


def test_half_surrogates_and_nul_are_repaired_and_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude42"}\n{"text": "half \\ud83d x", "id": ["\\u0000"]}\n')
    with pytest.warns(UserWarning, match=r"1 rows hold NUL or half of a surrogate pair \(the first: a.jsonl:2\)"):
        rows = load_rows(path)
    assert [row["text"] for row in rows] == ["fine 🙂", "half \ufffd x"]
    assert rows[1]["id"] == ["\ufffd"]


def test_bad_rows_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    empty = {"prompt": "x", "completion": ""}
    path = lines(tmp_path / "a.jsonl", ROWS[0], *[empty] * 7)
    with pytest.raises(DataError, match=r"(?s)a.jsonl:2: .*a.jsonl:6: .*and 2 more rows.*--skip-invalid"):
        load_rows(path)
    with pytest.warns(UserWarning, match="7 of 8 rows of .* were left out"):
        assert len(load_rows(path, skip_invalid=True)) == 1


def test_a_row_that_lacks_a_column_of_the_others_is_told_so(tmp_path: Path) -> None:
    path = lines(tmp_path / "missing.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a"})
    with pytest.raises(DataError, match=r"missing.jsonl:2 has no 'completion' \(found: prompt\)"):
        load_rows(path)


def test_need() -> None:
    need([one(ROWS[0])], "demonstrations", "SFT")
    need([one(ROWS[0])], "prompts", "GRPO")
    with pytest.raises(DataError, match=r"DPO learns from a better .*: expected prompt \+ chosen \+ rejected"):
        need([one(ROWS[0])], "pairs", "DPO")
    with pytest.raises(DataError, match=r"a:9: SFT learns from answers.*found .*\['prompt', 'response'\].*--map"):
        need([{"prompt": PROMPT, "response": "2", "_source": "a:9"}], "demonstrations", "SFT")
    with pytest.raises(DataError, match="no assistant message"):
        need([{"messages": PROMPT}], "demonstrations", "SFT")
    for kind in ("pairs", "rankings"):
        need([one({"prompt": "x", "responses": ["a", "b"], "ranking": [1, 0]})], kind, "a method")
    with pytest.raises(DataError, match=r"PRM learns from worked answers.*steps \+ labels or sample \+ columns, found"):
        need([one(ROWS[0])], "steps", "PRM")
    with pytest.raises(DataError, match="there are no rows"):
        need([], "prompts", "GRPO")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not on this machine")
def test_real_files() -> None:
    gsm = load_rows(SHARED / "gsm8k" / "test.jsonl")
    assert len(gsm) == 1319
    assert gsm[0]["answer"] == "18"
    assert all(row["answer"].lstrip("-").isdigit() for row in gsm)
    with pytest.warns(UserWarning, match="were left out"):
        pairs = load_rows(SHARED / "hh-rlhf" / "harmless-base-test.jsonl.gz", skip_invalid=True)
    assert 2300 < len(pairs) < 2312
    assert all(row["prompt"][-1]["role"] == "user" and row["chosen"][-1]["role"] == "assistant" for row in pairs)
    need(pairs, "pairs", "DPO")
