"""`posttrain rank`: what it prints, what it refuses, and the export."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import httpx
import pytest
from ranked import all_rows, filled, person, rank_next, rows, server
from small import jsonl
from typer.testing import CliRunner

from posttrain.annotate import serve, tables
from posttrain.cli import app
from posttrain.data.rows import load_rows
from posttrain.errors import ConfigError, MissingExtraError


def call(*arguments: str | Path) -> str:
    """Run the command in this process; what it prints."""
    result = CliRunner().invoke(app, ["rank", *(str(argument) for argument in arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_serving_prints_a_link_for_everyone_and_again_at_the_next_start(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", rows(3))
    with server(tmp_path / "r.db", ["ada", "ben"], "--data", str(data)) as running:
        assert running.said[0] == "3 new items and 0 comparisons; 3 items in all\n"
        assert running.address.startswith("http://127.0.0.1:")
        client = running.client("ada")
        assert "Question 0?" in client.get("/").text
        old = running.links
    with server(tmp_path / "r.db", [], "--revoke", "ben") as running:  # for this machine alone there is always a link
        assert list(running.links) == ["me"]
        assert "1 links of ben are worthless now\n" in running.said
        for name, status in (("ada", 303), ("ben", 403)):
            token = old[name].partition("#")[2]
            answer = httpx.post(f"{running.address}/enter", data={"token": token}, headers={"Origin": running.address})
            assert answer.status_code == status


def test_export(tmp_path: Path) -> None:
    engine = filled(tmp_path / "r.db", 2)
    rank_next(engine, person(engine, "ada"), [0, 1, 2])
    out = tmp_path / "pairs.jsonl"
    said = call("export", "--database", tmp_path / "r.db", "--as", "pairs", "--out", out)
    assert said.splitlines() == [f"3 rows in {out}", f"Next: posttrain train bradley_terry --data {out}"]
    assert len(load_rows(out)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export",), "nothing to write to; give --out FILE"),
        (("export", "--out", "p.jsonl"), "there is no database"),
        (("export", "--out", "p.jsonl", "--data", "x.jsonl"), "--data has no effect on an export"),
        (("exprt",), "nearest: 'export'"),
        (("--out", "p.jsonl"), "is for exports"),
        (("--task", "word-problems"), "nobody answers them; give --model"),
        (("--set", "temperature=1"), "nothing is sampled"),
        (("--model", "tiny"), "nothing to answer; give --data prompts.jsonl or --task NAME"),
        (("--model", "tiny", "--data", "x.jsonl", "--task", "word-problems"), "give one of them"),
        (("--host", "0.0.0.0"), "nobody can sign in; give --annotator NAME"),
        (("--revoke", "ben"), "no such annotator"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        call(*arguments)


def test_an_address_that_is_taken_is_said(tmp_path: Path) -> None:
    with server(tmp_path / "r.db", ["ada"]) as running, pytest.raises(OSError, match="choose another --port"):
        serve.serve(tables.opened(tmp_path / "r.db"), annotators=[], host="127.0.0.1", port=int(running.address.rpartition(":")[2]))


def test_models_answer_a_task_now(small_model: Path) -> None:
    found = serve.items_to_rank(
        data=None,
        task="word-problems",
        models=[str(small_model)],
        samples=3,
        count=2,
        rename=[],
        settings=["max_tokens=5"],
        seed=0,
        skip_invalid=False,
    )
    assert len(found) == 2
    assert all(set(item.models) == {str(small_model)} for item in found)
    assert all("answer" in item.info for item in found)


def test_without_the_extra_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "starlette":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'posttrain\[annotate\]'"):
        call()


def test_ranking_alone_does_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom posttrain.annotate import items, tables, web, exports, serve\n"
        f"items.add(tables.opened({str(tmp_path / 'r.db')!r}), items.read_items({str(jsonl(tmp_path / 'r.jsonl', rows(2)))!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(all_rows(tables.opened(tmp_path / "r.db"), "items")) == 2
