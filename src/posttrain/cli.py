"""The command line: `posttrain demo | run | train | sample | evaluate | chat | report | methods | doctor | decontaminate | rank |
bench`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain import cli_feedback
from posttrain.cli_options import Count, Data, Map, Model, Options, Out, Quiet, Rewards, Seed, SkipInvalid, TaskOption, shown, table
from posttrain.errors import ConfigError, PosttrainError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Post-train language models: supervised fine-tuning, preferences, and reinforcement learning.\n\n"
    "Start with `posttrain demo`: a whole run, from a base model to a reasoner, in minutes on two cores.",
)


def _version(asked: bool) -> None:
    if asked:
        from posttrain import __version__

        print(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="The version, and nothing else.")
    ] = False,
) -> None:
    """What stands before every command."""


@app.command()
def demo(
    out: Out = None,
    seed: Seed = 0,
    small: Annotated[bool, typer.Option("--small", help="A few steps only: shows the way, proves nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Base model, cold start on 100 demonstrations, then GRPO with a verifier: minutes on two cores.

    Example: `posttrain demo --out runs/demo`, then open runs/demo/report.html.
    """
    _run("word-problems", out or Path("runs/demo"), small=small, changes={"seed": seed}, quiet=quiet)


@app.command("run")
def run_command(
    recipe: Annotated[str | None, typer.Argument(help="The name of a shipped recipe, or a YAML file.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="path=value changes, for instance stages.rl.run.steps=20.")] = None,
    out: Out = None,
    small: Annotated[
        bool, typer.Option("--small", help="The recipe's small form: minutes on two cores, too short for a claim.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="The recipes that ship.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list: as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: a pipeline of named stages. Running it again does what is not done yet.

    Examples: `posttrain run --list`, `posttrain run word-problems --out runs/wp`, `posttrain run my.yaml seed=1`.
    """
    from posttrain.catalogue import recipes

    if list_ or recipe is None:
        rows = recipes()
        print(json.dumps(rows, indent=1)) if as_json else table(rows, ("name", "shows", "minutes"))
        return
    from posttrain.options import parsed

    changes = parsed(settings or [])
    _run(recipe, out or Path("runs") / Path(recipe).stem, small=small, changes=changes, quiet=quiet)


def _speaks() -> bool:
    """Under torchrun one process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _run(recipe: str, out: Path, *, small: bool, changes: dict[str, Any], quiet: bool) -> None:
    from posttrain.pipeline import run_recipe
    from posttrain.recipe import load_recipe

    loaded = load_recipe(recipe, small=small, changes=changes)
    with _interruptible(out):
        report = run_recipe(loaded, out, quiet=quiet)
    if not quiet and _speaks():
        from posttrain.report.summary import read_summary

        numbers = read_summary(out)["evaluations"]
        if numbers:
            table(shown(numbers), ("model", "metric", "value", "interval", "n"))
        if small:
            print("This was the small form: it shows the way and is too short for a claim.")
        print(f"The report: {report}")
        models = [out / stage.name / "model" for stage in loaded.stages if stage.verb != "sample"]
        if models:
            _next(f"posttrain chat {models[-1]}")


@app.command()
def train(
    method: Annotated[str, typer.Argument(help="A method (see `posttrain methods`), or your own as file.py:Class.")],
    settings: Options = None,
    model: Model = "tiny",
    data: Data = None,
    task: TaskOption = None,
    count: Count = None,
    map_: Map = None,
    reward: Rewards = None,
    out: Out = None,
    skip_invalid: SkipInvalid = False,
    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter (extra 'peft'); lora.r=16 sets its fields.")] = False,
    own: Annotated[
        str | None,
        typer.Option("--method", help="Your own method as file.py:Class; METHOD is then its name in reports."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train one stage. key=value sets any field of the method, the run, its optimizer or its sampling.

    All of them with defaults and help: `posttrain methods grpo`.

    Examples: `posttrain train sft -m tiny -d rows.jsonl epochs=3`;
    `posttrain train grpo -m runs/sft/model -t word-problems steps=100`;
    `posttrain train dpo -m smollm2 -d pairs.jsonl beta=0.2 --lora`.
    """
    from posttrain.blame import own_code
    from posttrain.quick import next_commands, training_run
    from posttrain.run import train as begin

    run = training_run(
        own or method,
        settings=settings or [],
        model=model,
        data=data,
        task=task,
        count=count,
        rename=map_ or [],
        rewards=reward or [],
        out=out or Path("runs") / Path(method).stem,
        lora=lora,
        quiet=quiet,
        skip_invalid=skip_invalid,
    )
    with _interruptible(Path(run.out)), own_code(run.out):
        result = begin(run)
    if not quiet and _speaks():
        steps = f"{result.steps} step{'' if result.steps == 1 else 's'}"
        print(f"The model: {result.model}   ({steps}, {result.seconds:.0f} s)")
        _next(*next_commands(run, result.model, task=task, data=data))


@app.command()
def sample(
    model: Model = "tiny",
    data: Data = None,
    task: TaskOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One question in place of a file.")] = None,
    count: Count = None,
    samples: Annotated[int, typer.Option("--samples", "-k", min=1, help="Answers to each prompt.")] = 1,
    settings: Options = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .jsonl file; standard output when left out.")] = None,
    seed: Seed = 0,
    skip_invalid: SkipInvalid = False,
) -> None:
    """Write answers to prompts as JSONL, with log-probabilities and, for a task, the verdict.

    Examples: `posttrain sample -m runs/rl/model -p "What is 2 + 3?"`;
    `posttrain sample -t word-problems -n 20 -k 4 temperature=0.7`.
    """
    from posttrain.quick import write_samples

    write_samples(
        model=model,
        data=data,
        task=task,
        prompt=prompt,
        count=count,
        samples=samples,
        settings=settings or [],
        out=out,
        seed=seed,
        skip_invalid=skip_invalid,
    )


@app.command()
def evaluate(
    model: Model = "tiny",
    task: TaskOption = "word-problems",
    data: Data = None,
    count: Count = 200,
    samples: Annotated[int, typer.Option("--samples", "-k", min=0, help="Also mean@k and pass@k over k sampled answers.")] = 0,
    split: Annotated[str, typer.Option(help="Which of the task's splits: train, validation, test, ...")] = "test",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for evaluation.json and answers.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    seed: Seed = 0,
) -> None:
    """Accuracy of a model on a task with 95 % intervals.

    Examples: `posttrain evaluate -m runs/demo/rl/model -n 500 -k 8`; `posttrain evaluate -m smollm2 -t gsm8k -d test.jsonl`.
    """
    from posttrain.files import atomic_write, make_folders
    from posttrain.quick import evaluated

    if out is not None:
        make_folders(out)
    outcome = evaluated(model=model, task=task or "word-problems", data=data, count=count, samples=samples, split=split, seed=seed)
    if out is not None:
        atomic_write(out / "evaluation.json", json.dumps(outcome.numbers, indent=1))
        lines = [json.dumps(record, ensure_ascii=False) for record in outcome.records]
        atomic_write(out / "answers.jsonl", "\n".join(lines) + "\n")
    if as_json:
        print(json.dumps(outcome.numbers, indent=1))
        return
    table(shown(outcome.numbers), ("metric", "value", "interval", "n"))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="'tiny', 'smollm2', a model folder, a hub name, or a stage's output.")] = "tiny",
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token always.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seed: Seed = 0,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends.

    Example: `posttrain chat runs/demo/rl/model`.
    """
    from posttrain.quick import talk

    talk(model, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run folder again, from the files that lie there.

    Example: `posttrain report runs/demo`.
    """
    from posttrain.report.page import write_report

    print(write_report(folder))


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: name, kind, family, title, arXiv id, file.")] = False,
    name: Annotated[str | None, typer.Argument(help="One method: its docstring and its options.")] = None,
) -> None:
    """The methods, recipes and evaluations of this library with their sources.

    Examples: `posttrain methods`, `posttrain methods dpo`, `posttrain methods --json`.
    """
    from posttrain.catalogue import catalogue, described

    if name is not None:
        print(described(name))
        return
    rows = catalogue()
    print(json.dumps(rows, indent=1)) if as_json else table(rows, ("name", "kind", "family", "title", "arxiv"))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="'tiny', 'smollm2', a model folder or a hub name.")],
    data: Annotated[str | None, typer.Argument(help="A file of rows.")] = None,
    task: TaskOption = None,
    map_: Map = None,
    show: Annotated[int, typer.Option(min=0, help="How many rendered rows to show.")] = 3,
    skip_invalid: SkipInvalid = False,
) -> None:
    """Render examples in colour and say what is wrong before a run does.

    Example: `posttrain doctor smollm2 rows.jsonl`.
    """
    from posttrain.quick import examined

    found = examined(model, data=data, task=task, rename=map_ or [], show=show, skip_invalid=skip_invalid)
    raise typer.Exit(found)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: shows that everything runs, measures nothing.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write machine and rows to this file, row by row.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Measure this model in place of the usual shapes.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="A part: sft, dpo, grpo, decode ... (repeat for more).")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Paired rounds of each row, at least 5.")] = 5,
    device: Annotated[str, typer.Option("--device", help="'cpu', or 'cuda' for the rows of a GPU.")] = "cpu",
) -> None:
    """Speed and memory here and in TRL and transformers, on the same work, as ratios with their spread.

    Needs a quiet machine and half an hour; one thread. Examples: `posttrain bench --quick`,
    `posttrain bench --json bench.json`, `posttrain bench --only decode --only grpo`.
    """
    from posttrain.bench import Setting
    from posttrain.bench import bench as measure

    setting = Setting(quick=quick, rounds=rounds, model=model, device=device)
    measure(setting, parts=only or (), json_file=json_file)


app.command()(cli_feedback.rank)
app.command()(cli_feedback.decontaminate)


def _next(*commands: str) -> None:
    """What one would write now."""
    for number, command in enumerate(commands):
        print(f"{'' if number else 'Next:':5} {command}")


@contextlib.contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Ctrl-C says what is kept of the runs in a folder, and how they go on."""
    try:
        yield
    except KeyboardInterrupt:
        from posttrain.quick import newest_save

        found = newest_save(out)
        where = f" of '{found[0]}'" if found and found[0] else ""
        kept = f"saved up to step {found[1]}{where}; the same command goes on" if found else "nothing is saved yet"
        print(f"\nStopped: {kept}", file=sys.stderr)
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point: errors of this library, and of the disk, are one clear line, everything else is a traceback."""
    from posttrain.allocator import keep_freed_memory

    warnings.showwarning = _warning
    keep_freed_memory()
    try:
        app()
    except PosttrainError as error:
        kind = "option" if isinstance(error, ConfigError) else type(error).__name__.removesuffix("Error").lower()
        print(f"posttrain: {kind} error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"posttrain: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None


def _warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line, without the place in the code that gave it."""
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
