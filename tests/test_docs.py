"""The documents are true: their Python runs, their commands parse, their tables and their map of the house are as the code says."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import posttrain
from posttrain.cli import app
from posttrain.methods import METHODS
from posttrain.recipe import shipped

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHEAP = ("posttrain methods", "posttrain methods dpo", "posttrain run --list")
"""Commands that are run as well as parsed, where a page holds them."""


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    language: str
    text: str
    line: int  # of its first line in the page


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found, language, held, start = [], None, [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            held.append(line)
        elif language is None:
            language, held, start = line[3:].strip(), [], number + 1
        else:
            found.append(Block(language, "\n".join(held) + "\n", start))
            language = None
    assert language is None, f"{page.name}: the fence before line {start} is not closed"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every `posttrain ...` line of a page's plain blocks and of its prose, without comments."""
    lines = [line.strip() for block in blocks(page) if not block.language for line in block.text.splitlines()]
    lines += re.findall(r"`(posttrain [^`]+)`", prose(page))
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith("posttrain ")]


def helped() -> list[str]:
    """Every command that stands as an example in the command line's own help."""
    group: Any = typer.main.get_command(app)
    texts = [group.help or "", *(command.help or "" for command in group.commands.values())]
    return [line for text in texts for line in re.findall(r"`(posttrain [^`]+)`", text)]


def settings_of(words: list[str]) -> dict[str, Any]:
    """Parse a command without running it; the values that it would be called with.

    Raises:
        Exception: No such command or option, or a value that does not fit, in the words of the command line.
    """
    group: Any = typer.main.get_command(app)
    name, *rest = words
    assert name in group.commands, f"there is no command '{name}'"
    with group.commands[name].make_context(name, rest) as context:
        return {"command": name, **context.params}


def check(line: str) -> None:
    """A command parses, and what it names is there: the method, its options, the recipe (NAME in capitals stands for any)."""
    from posttrain.methods import method
    from posttrain.options import parsed
    from posttrain.quick import sorted_settings

    given = settings_of(shlex.split(line)[1:])
    if given["command"] == "train" and not given["own"] and ".py:" not in given["method"] and not given["method"].isupper():
        assert given["method"] in METHODS, line
        sorted_settings(parsed(given["settings"] or []), method(given["method"]))
    if given["command"] == "run" and given["recipe"] and not given["recipe"].endswith(".yaml") and not given["recipe"].isupper():
        assert given["recipe"] in shipped(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_parse(page: Path) -> None:
    for line in commands(page):
        try:
            check(line)
        except Exception as error:
            raise AssertionError(f"{page.name}: `{line}`: {error}") from error


def test_commands_in_the_help_parse() -> None:
    lines = helped()
    assert len(lines) > 8
    for line in lines:
        check(line)


WRONG = {
    "posttrain trane sft": "there is no command 'trane'",
    "posttrain train sft --modle x": "--modle",
    "posttrain train dpoo": "dpoo",
    "posttrain train sft gama=1": "there is no option 'gama'",
    "posttrain run gsm9k": "gsm9k",
}


@pytest.mark.parametrize("line", WRONG)
def test_the_check_itself_can_fail(line: str) -> None:
    with pytest.raises(Exception, match=WRONG[line]):
        check(line)


@pytest.mark.parametrize("line", CHEAP)
def test_cheap_commands_run(line: str) -> None:
    result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) > 2


def with_python() -> list[Path]:
    """The pages that hold Python."""
    return [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", with_python(), ids=lambda p: p.stem)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page share names and a folder; one that begins with `# name.py` is that file."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python":
            continue
        file = re.match(r"# ([\w.-]+\.py)\n", block.text)
        if file:
            Path(file[1]).write_text(block.text, encoding="utf-8")
            names |= runpy.run_path(file[1], run_name=Path(file[1]).stem)
        else:
            program = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's own line
            exec(compile(program, str(page), "exec"), names)


def test_files_of_a_page_are_what_the_command_line_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward and the methods that pages define as files are found by the names that their commands use."""
    from posttrain.method import Method
    from posttrain.pipeline import build_method
    from posttrain.rewards.named import named_rewards

    monkeypatch.chdir(tmp_path)
    defined = 0
    for page in PAGES:
        for block in blocks(page):
            file = re.match(r"# ([\w.-]+\.py)\n", block.text) if block.language == "python" else None
            if file:
                Path(file[1]).write_text(block.text, encoding="utf-8")
        for line in commands(page):
            given = settings_of(shlex.split(line)[1:])
            if given["command"] != "train":
                continue
            for name in [given["own"], *(r for r in given["reward"] or [] if ".py:" in r)]:
                if name and Path(name.split(":")[0]).is_file():
                    found = build_method(name, {}) if name == given["own"] else named_rewards([name], task=None)
                    assert isinstance(found, Method) or len(found) == 1
                    defined += 1
    assert defined >= 3


def test_tables_are_as_the_code_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert tables.main() == 0, capsys.readouterr().out
    for page in ("README.md", "docs/methods.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(f"| `{name}` |" in text for name in (*METHODS, *shipped())), page


def test_links_and_scripts_are_there() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"
        for script in re.findall(r"(?:python |`)((?:docs|benchmarks|examples|tests|src)/[\w./-]+\.(?:py|md|yaml))", text):
            assert (ROOT / script).exists(), f"{page.name} names {script}"


def test_the_map_of_the_house_names_every_room() -> None:
    """The design names every file and folder of the package once, and no other; entry points need no line."""
    package = Path(posttrain.__file__).parent
    house = next(block.text for block in blocks(ROOT / "docs" / "design.md") if "types.py" in block.text)
    named = [line.split()[0] for line in house.splitlines() if line.strip()]
    there = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    there |= {f"{path.parent.name}/" for kind in ("*/*.py", "*/*.yaml") for path in package.glob(kind)}
    assert sorted(named) == sorted(there)


def test_what_every_method_must_pass_is_listed() -> None:
    """As many points as there are kinds of test in the common list, so that neither grows alone."""
    source = (ROOT / "tests" / "test_every_method.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    asked = set(re.findall(r"^def test_(\w+)", source, flags=re.MULTILINE))
    expected = {
        "gradient_does_not_depend_on_cuts": "every cut into micro-batches",
        "gradient_does_not_depend_on_chunks_of_the_head": "cut of the head into chunks",
        "gradient_does_not_depend_on_padding": "padding",
        "gradient_does_not_depend_on_the_order_of_rows": "another order of rows",
        "gradients_of_two_ranks_add_up": "two ranks added up",
        "nothing_at_a_masked_position_matters": "nothing at a masked position matters",
        "a_row_without_trained_tokens_counts_nowhere": "a row without trained tokens counts nowhere",
        "nothing_trained_at_all_is_no_gradient": "where nothing at all is trained, the gradient is zero",
        "bfloat16_stays_finite_and_points_the_same_way": "in bfloat16 everything stays finite",
        "fast_modes_give_the_gradient_of_the_exact_one": "the precision `fast` gives the exact gradient",
        "fast_modes_do_not_depend_on_cuts": "both under another cut too",
        "a_step_moves_the_value_the_right_way": "moves what the method is for the right way",
        "on_policy_skips_the_old_pass_and_changes_nothing": "leaving out the pass for old log-probabilities",
        "its_docstring_has_a_source": "its docstring has a title, an arXiv number",
    }
    assert asked == set(expected), "a test came or went: change docs/adding-a-method.md and this list"
    words = " ".join(page.partition("<!-- tests -->")[2].partition("<!-- /tests -->")[0].split())
    for phrase in expected.values():
        assert phrase in words
