"""The command line: every command's help, each command once, errors in one line, and how soon it is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small import demonstrations, jsonl, lines, pairs, weights
from typer.main import get_command
from typer.testing import CliRunner, Result

from posttrain.cli import app, main

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def call(*arguments: str | Path, given: str | None = None) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of demonstrations."""
    return jsonl(tmp_path / "rows.jsonl", demonstrations())


# --------------------------------------------------------------------------------------------------------------
# Help and lists.


def test_the_commands_are_those_of_the_manual() -> None:
    assert {"demo", "run", "train", "sample", "evaluate", "chat", "report", "methods", "doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str) -> None:
    text = call(command, "--help").output
    assert "Example" in text
    assert f"posttrain {command}" in " ".join(text.replace("│", " ").split())


def test_methods_as_json() -> None:
    found = json.loads(call("methods", "--json").stdout)
    assert all(row.keys() == {"name", "kind", "family", "title", "arxiv", "file"} for row in found)
    assert {row["kind"] for row in found} == {"method", "maker", "recipe", "evaluation"}
    names = [row["name"] for row in found if row["kind"] == "method"]
    assert names == sorted(names)
    assert {"sft", "dpo", "grpo", "ppo"} <= set(names)
    assert next(row["arxiv"] for row in found if row["name"] == "dpo") == "2305.18290"


def test_one_method_with_its_options() -> None:
    text = call("methods", "dpo").output
    assert "beta=0.1" in text
    assert "2305.18290" in text
    assert "dpo" in call("methods").output


def test_the_options_of_every_run_are_listed_with_a_method() -> None:
    """With the words that stand under the fields; `train --help` says where."""
    text = call("methods", "grpo").output
    lines_ = ("steps=None    Rollout steps", "temperature=1.0    What logits", "lr=None    Peak learning", "lora.r=16    The rank")
    for line in lines_:
        assert line in text
    assert "  quiet=" not in text, "what has an option of its own is not set by key=value"
    assert "posttrain methods grpo" in call("train", "--help").output


def test_version() -> None:
    import posttrain

    assert call("--version").stdout.strip() == f"posttrain {posttrain.__version__}"


def test_the_help_says_what_every_option_is() -> None:
    group: Any = get_command(app)
    for name, command in group.commands.items():
        for parameter in command.params:
            assert parameter.help or parameter.name == "help", f"{name}: {parameter.name} has no help"
    assert "gym:NAME" in call("evaluate", "--help").output


def test_recipes_as_json() -> None:
    found = json.loads(call("run", "--list", "--json").stdout)
    recipe = next(row for row in found if row["name"] == "word-problems")
    assert recipe["shows"]
    assert recipe["minutes"] > 0
    assert "word-problems" in call("run", "--list").output


# --------------------------------------------------------------------------------------------------------------
# Each command once.

OWN = '''
from dataclasses import dataclass
from posttrain.method import Method
from posttrain.reads import logprob
from posttrain.types import View

@dataclass(frozen=True, kw_only=True)
class Scaled(Method):
    """Imitation, times a number."""

    scale: float = 1.0
    """The number."""

    def views(self):
        return {"policy": View(reads=(logprob,))}

    def loss(self, batch, seen, state):
        return {"loss": -self.scale * seen.policy.logprob}
'''

REWARD = '''
def vowels(answer):
    """The share of vowels."""
    return sum(letter in "aeiou" for letter in answer.text) / max(1, len(answer.text))
'''

SHORT = ["steps=2", "prompts_per_step=2", "optimizer.lr=0.01"]


def test_train_with_a_shipped_method(small_model: Path, rows: Path, tmp_path: Path) -> None:
    result = call("train", "sft", *SHORT, "-m", small_model, "-d", rows, "-o", tmp_path / "run")
    assert f"The model: {tmp_path / 'run/model'}" in result.stdout
    assert len(lines(tmp_path / "run")) == 2
    settings = json.loads((tmp_path / "run/run.json").read_text())
    assert (settings["steps"], settings["optimizer"]["lr"], settings["rows"]["data"]["count"]) == (2, 0.01, 8)


def test_train_on_pairs_with_options_of_the_method(small_model: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", pairs())
    call("train", "dpo", *SHORT, "beta=0.5", "-m", small_model, "-d", path, "-o", tmp_path / "run", "-n", "4", "-q")
    settings = json.loads((tmp_path / "run/run.json").read_text())
    assert (settings["method"]["is"], settings["method"]["beta"], settings["rows"]["data"]["count"]) == ("DPO", 0.5, 4)


def test_train_with_renamed_columns(small_model: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"question": f"What is {i}?", "response": "It."} for i in range(4)])
    renames = ["--map", "prompt=question", "--map", "completion=response"]
    call("train", "sft", *SHORT, "-m", small_model, "-d", path, *renames, "-o", tmp_path / "run", "-q")
    assert len(lines(tmp_path / "run")) == 2


def test_own_reward(small_model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    spec = f"{tmp_path / 'mine.py'}:vowels"
    call("train", "grpo", *SHORT, "samples_per_prompt=2", "max_tokens=6", "-m", small_model, "-d", rows, "-r", spec,
         "-o", tmp_path / "run", "-q")  # fmt: skip
    samples = lines(tmp_path / "run", "samples.jsonl")
    assert samples
    assert all(0 <= sample["reward"] <= 1 for sample in samples)
    assert {len(sample["completion"]) > 0 for sample in samples} == {True}


def test_own_method(small_model: Path, rows: Path, tmp_path: Path) -> None:
    """`scale=2` doubles the loss of the same step."""
    (tmp_path / "mine.py").write_text(OWN)
    spec = f"{tmp_path / 'mine.py'}:Scaled"
    common = [*SHORT, "-m", small_model, "-d", rows, "-q"]
    call("train", spec, *common, "-o", tmp_path / "one")
    call("train", "mine", "--method", spec, "scale=2", *common, "-o", tmp_path / "two")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert two[0]["loss"] == pytest.approx(2 * one[0]["loss"])
    assert weights(tmp_path / "two/model").keys() == weights(small_model).keys()


def test_sample(small_model: Path, rows: Path, tmp_path: Path) -> None:
    command = ["sample", "max_tokens=5", "-m", small_model]
    found = [json.loads(line) for line in call(*command, "-p", "What is 1?", "-k", "3").stdout.splitlines()]
    assert len(found) == 3
    assert all(len(row["sample"]["tokens"]) <= len(found[0]["sample"]["tokens"]) + 5 for row in found)
    call(*command, "-d", rows, "-n", "2", "-o", tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    call(*command, "-t", "word-problems", "-n", "2", "-o", tmp_path / "task.jsonl")
    judged = [json.loads(line)["sample"] for line in (tmp_path / "task.jsonl").read_text().splitlines()]
    assert all("right" in sample["verdicts"] for sample in judged)


def test_what_was_sampled_can_be_imitated(small_model: Path, tmp_path: Path) -> None:
    """The tokens are kept, never written and read again as text."""
    call("sample", "max_tokens=5", "-m", small_model, "-t", "word-problems", "-n", "4", "-o", tmp_path / "rows.jsonl")
    call("train", "sft", *SHORT, "-m", small_model, "-d", tmp_path / "rows.jsonl", "-o", tmp_path / "run", "-q")
    assert len(lines(tmp_path / "run")) == 2


def test_evaluate(small_model: Path, tmp_path: Path) -> None:
    command = ["evaluate", "-m", small_model, "-n", "3"]
    found = json.loads(call(*command, "-k", "2", "--json", "-o", tmp_path / "out").stdout)
    assert [row["metric"] for row in found][:2] == ["accuracy", "parsed"]
    assert {"mean@2", "pass@2"} <= {row["metric"] for row in found}
    assert all(row["low"] <= row["value"] <= row["high"] for row in found)
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == found
    assert len((tmp_path / "out/answers.jsonl").read_text().splitlines()) == 3
    assert "accuracy" in call(*command).output


def test_evaluate_every_with_a_task_watches_its_validation_split(small_model: Path, tmp_path: Path) -> None:
    call("train", "sft", *SHORT, "evaluate_every=2", "-t", "word-problems", "-m", small_model, "-o", tmp_path / "run", "-q")
    assert (tmp_path / "run/best/model.safetensors").is_file()
    assert [row["step"] for row in lines(tmp_path / "run") if "evaluation" in row] == [1]


def test_doctor(small_model: Path, rows: Path, tmp_path: Path) -> None:
    text = call("doctor", small_model, rows).output
    assert "What is 0 + 1?" in text
    empty = jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b<|end|>"}])
    result = CliRunner().invoke(app, ["doctor", str(small_model), str(empty)])
    assert result.exit_code == 1
    assert "stop token" in result.output


def test_report(small_model: Path, rows: Path, tmp_path: Path) -> None:
    call("train", "sft", *SHORT, "-m", small_model, "-d", rows, "-o", tmp_path / "run", "-q")
    call("report", tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")


def test_chat(small_model: Path) -> None:
    result = call("chat", small_model, "--max-tokens", "4", given="Hello\nAnd now?\n\n")
    assert result.output.count("model: ") == 2
    ended = call("chat", small_model, "--max-tokens", "4", "--temperature", "0", "--system", "Be brief.", given="Hello\n")
    assert ended.output.count("model: ") == 1


def test_chat_from_a_pipe_has_no_prompt(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "you: " not in call("chat", small_model, "--max-tokens", "4", given="Hello\n\n").output
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "")
    monkeypatch.setattr("posttrain.quick.sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    from posttrain.quick import talk

    talk(str(small_model), system="", temperature=0.7, max_tokens=4, seed=0)
    assert asked == ["you: "]


def test_train_says_what_to_do_next(small_model: Path, rows: Path, tmp_path: Path) -> None:
    command = ["train", "sft", "steps=1", "prompts_per_step=2", "-m", small_model, "-d", rows]
    said = call(*command, "-o", tmp_path / "run").stdout
    assert "(1 step, " in said
    chat, report = said.splitlines()[-2:]
    assert chat == f"Next: posttrain chat {tmp_path / 'run/model'}"
    assert report == f"      posttrain report {tmp_path / 'run'}"
    assert "was finished before, nothing to do" in call(*command, "-o", tmp_path / "run").stdout
    judged = call("train", "sft", "steps=1", "-m", small_model, "-t", "word-problems", "-n", "2", "-o", tmp_path / "task").stdout
    assert f"Next: posttrain evaluate -m {tmp_path / 'task/model'} -t word-problems\n" in judged


def test_a_reward_model_is_not_talked_to(small_model: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", pairs())
    said = call("train", "bradley_terry", *SHORT, "-m", small_model, "-d", path, "-o", tmp_path / "run").stdout
    assert "posttrain chat" not in said
    assert "| loss " in said
    assert "| reward " not in said
    with pytest.warns(UserWarning, match="is a reward model"):
        call("sample", "max_tokens=3", "-m", tmp_path / "run/model", "-p", "Hello")


def test_a_recipe_says_what_to_do_next(small_model: Path, rows: Path, tmp_path: Path) -> None:
    stage = f"{{name: a, train: sft, data: {{file: {rows}}}, run: {{steps: 1, prompts_per_step: 2}}}}"
    (tmp_path / "mine.yaml").write_text(f"name: mine\nmodel: {small_model}\nstages:\n- {stage}\n")
    said = call("run", tmp_path / "mine.yaml", "-o", tmp_path / "out").stdout
    assert said.splitlines()[-1] == f"Next: posttrain chat {tmp_path / 'out/a/model'}"


def test_an_interrupted_run_says_what_is_kept(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.session import Session

    show = Session.show

    def interrupted(self: Session, *arguments: Any) -> None:
        show(self, *arguments)
        if self.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "show", interrupted)
    common = ["train", "sft", "steps=5", "prompts_per_step=2", "-m", small_model, "-d", rows, "-q"]
    for every, words in ((2, "saved up to step 2; the same command goes on"), (0, "nothing is saved yet")):
        words_ = [str(w) for w in (*common, f"save_every={every}", "-o", tmp_path / f"run-{every}")]
        result = CliRunner().invoke(app, words_)
        assert result.exit_code == 130
        assert f"Stopped: {words}" in result.stderr


def test_a_file_beside_a_task_is_told(small_model: Path, rows: Path, tmp_path: Path) -> None:
    common = ["steps=1", "prompts_per_step=2", "-m", small_model, "-d", rows, "-t", "word-problems"]
    said = call("train", "grpo", "samples_per_prompt=2", "max_tokens=4", *common, "-o", tmp_path / "rl").stderr
    assert f"rows from {rows}, rewards from word-problems" in said
    said = call("train", "sft", *common, "-o", tmp_path / "sft").stderr
    assert f"rows from {rows}; word-problems gives nothing else here" in said


def test_rows_that_are_not_well_formed_can_be_left_out(small_model: Path, tmp_path: Path) -> None:
    empty = {"prompt": "x", "completion": ""}
    path = jsonl(tmp_path / "rows.jsonl", [*demonstrations(4), empty, empty])
    for command in (["train", "sft", *SHORT, "-q", "-o", tmp_path / "run"], ["sample", "max_tokens=2"]):
        given = [*command, "-m", small_model, "-d", path]
        result = CliRunner().invoke(app, [str(word) for word in given])
        assert "--skip-invalid" in str(result.exception)
        with pytest.warns(UserWarning, match="2 of 6 rows of .* were left out"):
            call(*given, "--skip-invalid")
    with pytest.warns(UserWarning, match="2 of 6 rows of .* were left out"):
        call("doctor", small_model, path, "--skip-invalid")


def test_rendered_rows_have_a_head_and_pairs_are_told_apart(small_model: Path, tmp_path: Path) -> None:
    long = {**pairs(1)[0], "chosen": "yes " * 400}
    path = jsonl(tmp_path / "pairs.jsonl", [*pairs(3), long])
    common = ["-m", small_model, "-n", "3", "-d", path, "-o", tmp_path / "run"]
    said = call("train", "dpo", "steps=1", "show=2", *common)
    lines_ = said.stderr.splitlines()
    assert "2 of 3 pairs as the model sees them:" in lines_
    assert [line.split(":")[0] for line in lines_ if line.startswith(("chosen", "rejected"))] == ["chosen", "rejected"] * 2
    result = CliRunner().invoke(app, ["doctor", str(small_model), str(jsonl(path, [*pairs(1), long])), "--show", "5"])
    text = "".join(result.stdout.splitlines())
    assert "2 of 2 pairs as the model sees them:" in text
    assert " tokens ... " in text
    assert text.count("yes ") < 400


# --------------------------------------------------------------------------------------------------------------
# Errors.


def said(arguments: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of the program."""
    monkeypatch.setattr(sys, "argv", ["posttrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "sft", "stpes=3", "-t", "word-problems"], ["option error", "'stpes'", "'steps'"]),
        (["train", "sft", "steps", "-t", "word-problems"], ["key=value"]),
        (["train", "sft", "steps=many", "-t", "word-problems"], ["steps", "'many'"]),
        (["train", "sft"], ["--data", "--task"]),
        (["train", "grpp", "-t", "word-problems"], ["'grpo'"]),
        (["train", "none.py:Mine", "-t", "word-problems"], ["none.py", "Mine"]),
        (["run", "word-problem"], ["'word-problems'"]),
        (["methods", "dpoo"], ["'dpo'"]),
        (["evaluate", "-t", "word-problem"], ["'word-problems'"]),
        (["sample"], ["--prompt"]),
        (["train", "sft", "r=8", "-t", "word-problems"], ["'r'"]),
        (["train", "sft", "steps=two", "-t", "word-problems"], ["steps=100"]),
        (["train", "dpo", "-t", "word-problems"], ["pairs", "word-problems gives demonstrations", "--data pairs.jsonl"]),
        (["methods", "word-problems"], ["recipe", "posttrain run word-problems"]),
        (["evaluate", "-d", "qa.jsonl"], ["reads no file", "leave out --data"]),
        (["doctor", "tiny", "qa.jsonl", "-t", "word-problems"], ["reads no file"]),
        (["sample", "-p", "hi", "-d", "rows.jsonl"], ["--prompt and --data"]),
        (["sample", "-d", "rows.jsonl", "-t", "word-problems"], ["--data and --task"]),
        (["run", "word-problems", "--small", "stages.rl.run.stps=2"], ["stage 'rl'", "'steps'"]),
    ],
)
def test_errors_are_one_line_with_the_nearest_name(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(arguments, monkeypatch, capsys)
    assert code == 2
    assert text.startswith("posttrain: ")
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1
    for word in words:
        assert word in text, text


COMMANDS_WITH_OUT = (
    ["train", "sft", "steps=1", "-t", "word-problems"],
    ["evaluate", "-n", "2"],
    ["run", "word-problems", "--small"],
    ["sample", "-p", "hi"],
)


@pytest.mark.parametrize("command", COMMANDS_WITH_OUT, ids=lambda c: c[0])
def test_an_output_that_cannot_be_made_is_one_line_and_no_work(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("posttrain.models.load.load", never)
    (tmp_path / "afile").write_text("")
    for out in (tmp_path / "afile" / "below", Path("/proc/foo/bar")):
        code, text = said([*command, "-o", out], monkeypatch, capsys)
        assert code == 2
        assert len(text.strip().splitlines()) == 1
        assert str(out).split("/bar")[0].split("/below")[0] in text


def test_what_the_disk_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("posttrain.cli.app", full)
    code, text = said([], monkeypatch, capsys)
    assert (code, text) == (2, "posttrain: error: [Errno 28] No space left on device: 'somewhere'\n")


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    def warn() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning("slow today", UserWarning, "file.py", 3)
        raise SystemExit(0)

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # what main sets is taken back
    monkeypatch.setattr("posttrain.cli.app", warn)
    assert said([], monkeypatch, capsys) == (0, "warning: slow today\n")


RAISES = OWN.replace("-self.scale * seen", "self.over(0) * seen") + """
    def over(self, what):
        return self.scale / what
"""


def test_an_error_of_ones_own_method_is_its_line(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(RAISES)
    spec, line = f"{tmp_path / 'mine.py'}:Scaled", RAISES.splitlines().index("        return self.scale / what") + 1
    command = ["train", spec, *SHORT, "-m", small_model, "-d", rows, "-q", "-o", tmp_path / "run"]
    code, text = said(command, monkeypatch, capsys)
    assert code == 2
    assert text.startswith(f"posttrain: method error: method Scaled (mine.py:{line}, in over): ZeroDivisionError: ")
    assert len(text.strip().splitlines()) == 1
    trace = (tmp_path / "run/error.txt").read_text()
    assert "mine.py" in trace
    assert "Traceback" in trace
    stage = f"{{name: a, train: '{spec}', data: {{file: {rows}}}, run: {{steps: 1, prompts_per_step: 2}}}}"
    (tmp_path / "mine.yaml").write_text(f"name: mine\nmodel: {small_model}\nstages:\n- {stage}\n")
    code, text = said(["run", tmp_path / "mine.yaml", "-o", tmp_path / "out", "-q"], monkeypatch, capsys)
    assert f"(mine.py:{line}, in over)" in text
    assert (tmp_path / "out/a/error.txt").is_file()


@pytest.mark.parametrize("count", ["0", "-3"])
def test_a_count_below_one_is_refused_by_its_own_name(
    count: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(["evaluate", "-n", count], monkeypatch, capsys)
    assert code == 2
    assert "--count" in text


def test_unknown_flag_and_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(["train", "sft", "--dta", "x"], monkeypatch, capsys)
    assert code == 2
    assert "--data" in text
    code, text = said(["tran"], monkeypatch, capsys)
    assert code == 2
    assert "tran" in text


# --------------------------------------------------------------------------------------------------------------
# How soon it is there, in seconds of processor time.

IMPORT = "import time; began = time.process_time(); import posttrain; print(time.process_time() - began)"
HELP = """
import sys, time, io
began = time.process_time()
sys.argv = ["posttrain", "--help"]
from posttrain.cli import main
shown, sys.stdout = sys.stdout, io.StringIO()
try:
    main()
except SystemExit:
    pass
print(time.process_time() - began, "torch" in sys.modules, file=shown)
"""


def least(code: str) -> list[list[str]]:
    """What three fresh processes printed."""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    return [run.stdout.split() for run in runs]


def test_import_is_light() -> None:
    assert min(float(found[0]) for found in least(IMPORT)) < 0.3


def test_help_is_quick() -> None:
    found = least(HELP)
    assert {row[1] for row in found} == {"False"}, "posttrain --help imports torch"
    assert min(float(row[0]) for row in found) < 1.0
