"""Kill training at random moments, also inside saves, restart until it is done, and compare with an undisturbed run.

    python benchmarks/kill_resume.py --kills 100 --methods sft,dpo,grpo,ppo --work /tmp/kill_resume

For every method the command below runs once undisturbed.  Then it runs again and again under SIGKILL: half of the kills
come at a random moment of the clock, half before a random operation of a random save (`POSTTRAIN_KILL_AT`, see
`posttrain/files.py`).  A run that was killed a few times is left to finish; its final weights must be the undisturbed
run's byte for byte (SHA-256 of every `model.safetensors`), and its `metrics.jsonl` the same but for times.  A kill
survived if the run it hit ended so.  The exit status is 0 if all did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

COMMON = "--model tiny --quiet seed=0 save_every=1"
COMMANDS = {
    "sft": f"train sft --task word-problems --count 40 {COMMON} steps=8 prompts_per_step=4",
    "dpo": f"train dpo --data {{pairs}} {COMMON} steps=8 prompts_per_step=4",
    "grpo": f"train grpo --task word-problems --count 40 {COMMON} steps=6 prompts_per_step=2 samples_per_prompt=4 max_tokens=16",
    "ppo": f"train ppo --task word-problems --count 40 {COMMON} steps=6 prompts_per_step=4 samples_per_prompt=1 max_tokens=16",
}
"""What follows `python -m posttrain`, without `--out`; `{pairs}` is a file of preference pairs that is written here."""

SAVES = {"sft": 8, "dpo": 8, "grpo": 6, "ppo": 6}  # how many saves an undisturbed run makes
OPERATIONS_PER_SAVE = 24  # a number past the last operation of a save kills nobody, and the run goes on
KILLS_PER_RUN = 6  # then it is left to finish
DEADLINE_SECONDS = 900
TIME_KEYS = re.compile(r"(^|[/_])(time|seconds|per_second|overlap|memory|host|pid|at)($|[/_])")


@dataclass
class Count:
    """What became of one method's kills."""

    kills: int = 0
    in_saves: int = 0
    runs: int = 0
    survived: int = 0
    other_weights: int = 0  # runs
    other_metrics: int = 0  # runs
    failed: int = 0  # runs that stopped with an error after a kill
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def write_pairs(path: Path) -> None:
    """Forty preference pairs about small sums."""
    rows = [
        {"prompt": f"What is {a} + {b}?", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"}
        for a in range(2, 10)
        for b in range(2, 7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def launch(method: str, work: Path, out: Path, kill_at: str = "") -> subprocess.Popen[bytes]:
    """Start, or go on with, a run."""
    arguments = COMMANDS[method].format(pairs=work / "pairs.jsonl").split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("POSTTRAIN_KILL_AT", None)
    if kill_at:
        environment["POSTTRAIN_KILL_AT"] = kill_at
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / "output.txt").open("ab") as output:
        command = [sys.executable, "-m", "posttrain", *arguments, "--out", str(out)]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the run alone, as the system would; its workers must notice by themselves."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def undisturbed(method: str, work: Path, out: Path) -> tuple[float, float]:
    """Run once; seconds until the first step was written, and in all."""
    began, first = time.monotonic(), 0.0
    process = launch(method, work, out)
    while process.poll() is None:
        if not first and (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size:
            first = time.monotonic() - began
        if time.monotonic() - began > DEADLINE_SECONDS:
            end(process)
        time.sleep(0.02)
    if process.returncode != 0:
        raise SystemExit(f"{method}: the undisturbed run failed; see {out.parent / 'output.txt'}")
    return first, time.monotonic() - began


def weights(out: Path) -> dict[str, str]:
    """SHA-256 of every finished `model.safetensors` of a run, by place."""
    found = sorted(out.rglob("model.safetensors"))
    places = {path.relative_to(out): path for path in found}
    return {
        str(place): hashlib.sha256(path.read_bytes()).hexdigest()
        for place, path in places.items()
        if not any(part.startswith(".") for part in place.parts)
    }


def metrics(out: Path) -> list[dict[str, object]]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not TIME_KEYS.search(key)} for line in lines]


def difference(expected: Path, out: Path) -> tuple[str, str]:
    """What differs in the weights, and in the metrics; "" where nothing does."""
    a, b = weights(expected), weights(out)
    of_weights = "" if a and a == b else f"weights differ: {sorted(name for name in a | b if a.get(name) != b.get(name))}"
    c, d = metrics(expected), metrics(out)
    if c == d:
        return of_weights, ""
    where = next((i for i, (x, y) in enumerate(zip(c, d, strict=False)) if x != y), min(len(c), len(d)))
    keys = sorted(k for k in {*c[where], *d[where]} if c[where].get(k) != d[where].get(k)) if where < len(c) == len(d) else []
    return of_weights, f"metrics differ from line {where + 1} ({len(c)} and {len(d)} lines): {keys}"


def killed(method: str, work: Path, out: Path, randomly: random.Random, times: tuple[float, float]) -> tuple[bool, bool]:
    """Go on with a run until it is killed or done: was it killed, and by its own hand inside a save?

    Raises:
        RuntimeError: The run stopped with an error.
    """
    first, total = times
    plan, moment = "", DEADLINE_SECONDS * 1.0
    if randomly.random() < 0.5:
        plan = f"save:{randomly.randint(1, max(1, SAVES[method] // 2))}:{randomly.randint(1, OPERATIONS_PER_SAVE)}"
    else:  # mostly among the steps, sometimes while everything is loaded
        moment = randomly.uniform(first, total) if randomly.random() < 0.8 else randomly.uniform(0.05, first)
    process = launch(method, work, out, plan)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        end(process)
        return True, False
    if process.returncode == -signal.SIGKILL:
        return True, True
    if process.returncode != 0:
        raise RuntimeError(f"exit status {process.returncode}; see {out.parent / 'output.txt'}")
    return False, False


def disturb(method: str, work: Path, kills: int, seed: int) -> Count:
    """All kills of one method."""
    count, randomly, began = Count(), random.Random(f"{seed}:{method}"), time.monotonic()
    expected = work / method / "undisturbed" / "run"
    times = undisturbed(method, work, expected)
    while count.kills < kills:
        out = work / method / f"{count.runs:04d}" / "run"  # the same last name: it is the name of the stage
        count.runs += 1
        hits = 0
        try:
            while hits < min(KILLS_PER_RUN, kills - count.kills):
                hit, inside = killed(method, work, out, randomly, times)
                if not hit:
                    break
                hits += 1
                count.in_saves += inside
            process = launch(method, work, out)
            if process.wait(timeout=DEADLINE_SECONDS) != 0:
                raise RuntimeError(f"exit status {process.returncode}; see {out.parent / 'output.txt'}")
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            count.kills += max(1, hits)
            count.failed += 1
            count.notes.append(f"run {count.runs - 1}: {error}")
            continue
        of_weights, of_metrics = difference(expected, out)
        count.kills += hits
        count.survived += 0 if of_weights or of_metrics else hits
        count.other_weights += bool(of_weights)
        count.other_metrics += bool(of_metrics)
        count.notes += [f"run {count.runs - 1}: {note}" for note in (of_weights, of_metrics) if note]
        print(f"{method}: {count.survived}/{count.kills}", file=sys.stderr, flush=True)
    count.seconds = time.monotonic() - began
    return count


def table(counts: dict[str, Count]) -> str:
    """One line a method."""
    columns: dict[str, Callable[[Count], object]] = {
        "kills": lambda c: c.kills,
        "in saves": lambda c: c.in_saves,
        "runs": lambda c: c.runs,
        "survived": lambda c: f"{c.survived}/{c.kills}",
        "other weights": lambda c: c.other_weights,
        "other metrics": lambda c: c.other_metrics,
        "errors": lambda c: c.failed,
        "seconds": lambda c: f"{c.seconds:.0f}",
    }
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, count in counts.items():
        lines.append(f"| {method} | " + " | ".join(str(cell(count)) for cell in columns.values()) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="kills of each method")
    parser.add_argument("--methods", default="sft,dpo,grpo,ppo", help=f"some of {','.join(COMMANDS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the kills; the runs have seed 0")
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist yet")
    options = parser.parse_args()
    methods = options.methods.split(",")
    unknown = [method for method in methods if method not in COMMANDS]
    if unknown or options.kills < 1:
        parser.error(f"unknown methods {unknown}, or kills below 1; known: {', '.join(COMMANDS)}")
    if options.work.exists():
        parser.error(f"{options.work} exists; name a new folder")
    options.work.mkdir(parents=True)
    work = options.work.resolve()
    write_pairs(work / "pairs.jsonl")
    counts = {method: disturb(method, work, options.kills, options.seed) for method in methods}
    print(table(counts))
    for method, count in counts.items():
        for note in count.notes:
            print(f"{method}, {note}")
    survived, kills = (sum(getattr(c, name) for c in counts.values()) for name in ("survived", "kills"))
    print(f"survived {survived}/{kills} in {sum(c.seconds for c in counts.values()):.0f} s")
    return 0 if survived == kills else 1


if __name__ == "__main__":
    sys.exit(main())
