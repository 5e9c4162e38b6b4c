"""Commands around feedback and data: `posttrain rank | decontaminate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli_options import Count, Data, Map, Seed, SkipInvalid, TaskOption, percent, table
from posttrain.errors import ConfigError


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
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The clean rows, JSONL; TRAIN.clean.jsonl when left out.")] = None,
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
    found = [{"evaluation": n, **f, "share": percent(f["share"])} for n, f in result.evaluations.items()]
    table(found, ("evaluation", "rows", "too_short", "overlapping", "share", "contaminated"))
    for overlap in result.removed[:5]:
        place = f"{overlap.source} ({overlap.evaluation}, {overlap.evaluation_source})"
        print(f"removed {place}: {percent(overlap.coverage)} of the question, for instance {overlap.shared[:80]!r}")
    print(f"{kept:,} of {result.rows:,} rows are kept: {target}; the others with reasons: {removed}")
    if result.contaminated:
        advice = "all of its rows are dropped" if dropped else "--drop-source would drop all of its rows"
        print(f"{train} is contaminated for {', '.join(result.contaminated)} (more than {percent(source_limit)}): {advice}")
