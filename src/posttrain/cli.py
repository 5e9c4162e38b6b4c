"""The command line: `posttrain demo | run | train | sample | evaluate | chat | report | methods | doctor | decontaminate | rank |
bench`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.errors import ConfigError, PosttrainError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Post-train language models: supervised fine-tuning, preferences, and reinforcement learning.\n\n"
    "Start with `posttrain demo`: a whole run, from a base model to a reasoner, in minutes on two cores.",
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="'tiny', 'smollm2', a model folder, a hub name, or a stage's output.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Rows: a file (JSONL, JSON, CSV, Parquet), a datasets folder or hub name."),
]
TaskOption = Annotated[str | None, typer.Option("--task", "-t", help="A task: word-problems, gsm8k, gym:NAME.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; running again continues there.")]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, help="How many rows or questions.")]
Map = Annotated[list[str] | None, typer.Option("--map", help="Rename a column: new=old (repeat for more).")]
Rewards = Annotated[
    list[str] | None,
    typer.Option("--reward", "-r", help="A reward: file.py:function, its deadline as @5s, its weight as *0.5 (repeat for more)."),
]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Leave rows that are not well formed out, and count them.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
Options = Annotated[
    list[str] | None, typer.Argument(help="key=value settings, for instance steps=100 optimizer.lr=1e-4 beta=0.2.")
]


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
    settings: Annotated[
        list[str] | None, typer.Argument(help="path=value changes, for instance stages.rl.run.steps=20.")
    ] = None,
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
        print(json.dumps(rows, indent=1)) if as_json else _table(rows, ("name", "shows", "minutes"))
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
            _table(_shown(numbers), ("model", "metric", "value", "interval", "n"))
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
    lora: Annotated[
        bool, typer.Option("--lora", help="Train an adapter (extra 'peft'); lora.r=16 sets its fields.")
    ] = False,
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
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .jsonl file; standard output when left out.")
    ] = None,
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
    samples: Annotated[
        int, typer.Option("--samples", "-k", min=0, help="Also mean@k and pass@k over k sampled answers.")
    ] = 0,
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
    outcome = evaluated(
        model=model, task=task or "word-problems", data=data, count=count, samples=samples, split=split, seed=seed
    )
    if out is not None:
        atomic_write(out / "evaluation.json", json.dumps(outcome.numbers, indent=1))
        lines = [json.dumps(record, ensure_ascii=False) for record in outcome.records]
        atomic_write(out / "answers.jsonl", "\n".join(lines) + "\n")
    if as_json:
        print(json.dumps(outcome.numbers, indent=1))
        return
    _table(_shown(outcome.numbers), ("metric", "value", "interval", "n"))


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="'tiny', 'smollm2', a model folder, a hub name, or a stage's output.")
    ] = "tiny",
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
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON: name, kind, family, title, arXiv id, file.")
    ] = False,
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
    print(json.dumps(rows, indent=1)) if as_json else _table(rows, ("name", "kind", "family", "title", "arxiv"))


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
def decontaminate(
    train: Annotated[str, typer.Argument(help="Training rows: a file (JSONL, JSON, CSV, Parquet), a folder or hub name.")],
    against: Annotated[
        list[str], typer.Option("--against", "-a", help="Evaluation rows: the same, or task:NAME:SPLIT (repeat for more).")
    ],
    ngram: Annotated[int, typer.Option("--ngram", min=1, help="Words of an n-gram.")] = 8,
    share: Annotated[
        float, typer.Option("--share", help="A row overlaps when more than this share of an evaluation row is covered.")
    ] = 0.5,
    source_limit: Annotated[
        float, typer.Option("--source-limit", help="TRAIN is contaminated when it overlaps more than this share of an evaluation.")
    ] = 0.02,
    drop_source: Annotated[bool, typer.Option("--drop-source", help="Keep no row of TRAIN where it is contaminated.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many rows of a task's split.")] = 1000,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The clean rows, JSONL; TRAIN.clean.jsonl when left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Remove training rows whose questions share long n-grams with evaluations, and say which and why.

    The reasons lie in OUT.removed.jsonl: both rows, the shared words, the coverage.

    Examples: `posttrain decontaminate train.jsonl --against test.jsonl`;
    `posttrain decontaminate train.jsonl -a test.jsonl -a task:word-problems:test --out clean.jsonl`.
    """
    from dataclasses import asdict

    from posttrain.data import decontaminate as home

    target = out or home.clean_name(train)
    if any(Path(name).exists() and target.exists() and target.samefile(name) for name in (train, *against)):
        raise ConfigError(f"--out is {str(target)!r}, which is read; write the clean rows into another file")
    raw, rows = home.rows_of(train, count=count)
    sets = {name: home.rows_of(name, count=count)[1] for name in against}
    result = home.decontaminate(rows, sets, ngram=ngram, share=share, source_limit=source_limit)
    removed = home.write_clean(raw, result, target, drop_source=drop_source)
    dropped = drop_source and bool(result.contaminated)
    kept = 0 if dropped else result.rows - len(result.removed)
    if as_json:
        numbers = {"rows": result.rows, "kept": kept, "evaluations": result.evaluations, "out": str(target)}
        overlaps = [asdict(overlap) for overlap in result.removed]
        print(json.dumps({**numbers, "removed": str(removed), "source_dropped": dropped, "overlaps": overlaps}, indent=1))
        return
    shown = [{"evaluation": n, **f, "share": _percent(f["share"])} for n, f in result.evaluations.items()]
    _table(shown, ("evaluation", "rows", "too_short", "overlapping", "share", "contaminated"))
    for overlap in result.removed[:5]:
        place = f"{overlap.source} ({overlap.evaluation}, {overlap.evaluation_source})"
        print(f"removed {place}: {_percent(overlap.coverage)} of the question, for instance {overlap.shared[:80]!r}")
    print(f"{kept:,} of {result.rows:,} rows are kept: {target}; the others with reasons: {removed}")
    if result.contaminated:
        advice = "all of its rows are dropped" if dropped else "--drop-source would drop all of its rows"
        print(f"{train} is contaminated for {', '.join(result.contaminated)} (more than {_percent(source_limit)}): {advice}")


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


@app.command()
def rank(
    action: Annotated[str, typer.Argument(help="'serve' the pages, or 'export' what was ranked.")] = "serve",
    database: Annotated[str, typer.Option("--database", help="A file (SQLite), or postgresql://user@host/name.")] = "rankings.db",
    data: Data = None,
    task: TaskOption = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A model that answers the prompts now (repeat for more).")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-k", min=1, help="Answers of each model to each prompt.")] = 2,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Of the sampler: temperature=0.8 (repeat for more).")] = None,
    count: Count = None,
    map_: Map = None,
    annotator: Annotated[list[str] | None, typer.Option("--annotator", "-a", help="A link for NAME (repeat for more).")] = None,
    revoke: Annotated[list[str] | None, typer.Option("--revoke", help="Makes a name's links worthless (repeat for more).")] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes one that is free.")] = 8000,
    kind: Annotated[str, typer.Option("--as", help="Export: pairs, rankings or dataset.")] = "pairs",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Export: a .jsonl file.")] = None,
    seed: Seed = 0,
    skip_invalid: SkipInvalid = False,
) -> None:
    """People put responses in order on a page (extra 'annotate'); export what they said as rows to train on.

    The file's rows are prompt + responses, or comparisons: chosen + rejected, or prompt + responses + ranking.

    Examples: `posttrain rank --data responses.jsonl --annotator ada --annotator ben`;
    `posttrain rank -m runs/sft/model -m runs/rl/model --samples 2 -t word-problems -n 50`;
    `posttrain rank export --database rankings.db --as pairs --out pairs.jsonl`.
    """
    from posttrain.annotate import serve

    sources = {"data": data, "task": task, "models": models or [], "samples": samples, "count": count, "rename": map_ or []}
    source = {**sources, "settings": setting or [], "seed": seed, "skip_invalid": skip_invalid}
    people = {"annotators": annotator or [], "revoked": revoke or [], "host": host, "port": port}
    serve.rank(action, database, source=source, people=people, kind=kind, out=out)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _shown(numbers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of evaluations as a table has them."""
    return [
        {**n, "value": _percent(n["value"]), "interval": f"[{_percent(n['low'])}, {_percent(n['high'])}]"} for n in numbers
    ]


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


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(str(row.get(column) if row.get(column) is not None else "") for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


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
