"""What the commands share: options that mean the same everywhere, and tables of what was found."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="'tiny', 'smollm2', a model folder, a hub name, or a stage's output.")]
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
Options = Annotated[list[str] | None, typer.Argument(help="key=value settings, for instance steps=100 optimizer.lr=1e-4 beta=0.2.")]


def percent(value: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def shown(numbers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of evaluations as a table has them: shares in per cent, others as they are."""
    from posttrain.report.names import evaluation_unit, number

    rows = []
    for entry in numbers:
        unit = evaluation_unit(entry["metric"], [entry["value"]])
        value, low, high = (number(entry[key], unit) for key in ("value", "low", "high"))
        rows.append({**entry, "value": value, "interval": f"[{low}, {high}]" if entry["low"] is not None else ""})
    return rows


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Rows on the terminal, one column a key."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(*columns, box=None, header_style="bold")
    for row in rows:
        grid.add_row(*(str(row.get(column) if row.get(column) is not None else "") for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(grid)
