"""What the short commands do: one stage, a few samples, an evaluation, a talk, a look at a model and its data."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, nearest
from posttrain.method import Method, Optimizer
from posttrain.options import build, parsed
from posttrain.run import Run
from posttrain.types import Sampling

GIVEN = ("method", "model", "data", "out", "rewards", "sampling", "optimizer", "lora", "evaluation", "quiet")
"""Fields of a run that have an option of their own, or a section."""


def _names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)}


def sorted_settings(settings: Mapping[str, Any], method: type[Method]) -> dict[str, dict[str, Any]]:
    """Each `key=value` in its section: method, run, optimizer, sampling, lora.

    A plain key belongs to the first of method, run, sampling, optimizer that has it; `optimizer.lr` names the section.

    Raises:
        ConfigError: No section has the key.
    """
    from posttrain.models.lora import Lora

    sections: dict[str, set[str]] = {
        "method": _names(method),
        "run": _names(Run) - set(GIVEN),
        "sampling": _names(Sampling),
        "optimizer": _names(Optimizer),
    }
    named = {**sections, "lora": _names(Lora)}
    found: dict[str, dict[str, Any]] = {name: {} for name in named}
    for key, value in settings.items():
        section, dot, field = key.partition(".")
        if dot and section in named:
            if field not in named[section]:
                raise ConfigError(f"{section} has no option '{field}'{nearest(field, named[section])}")
            found[section][field] = value
            continue
        home = next((name for name, keys in sections.items() if key in keys), None)
        if home is None:
            known = {k for keys in sections.values() for k in keys}
            raise ConfigError(f"there is no option '{key}'{nearest(key, known)}")
        found[home][key] = value
    return found


def renamed(pairs: Sequence[str]) -> dict[str, str]:
    """`["question=problem"]` as new name -> old name."""
    found = {}
    for pair in pairs:
        new, equals, old = pair.partition("=")
        if not equals or not new or not old:
            raise ConfigError(f"--map {pair}: expected new=old, for instance --map completion=response")
        found[new] = old
    return found


def reads_file(task: str) -> bool:
    """Does a task take its questions from a file of the user's?"""
    from posttrain.tasks import TASKS

    return task in TASKS and "path" in inspect.signature(TASKS[task]).parameters


def named_task(name: str, data: str | None) -> Any:
    """A task by name; `data` is its file where it reads one.

    Raises:
        ConfigError: There is no such task, or it reads no file and one is given.
    """
    from posttrain.tasks import task

    if data is None or reads_file(name):
        return task(name, **({"path": data} if data else {}))
    found = task(name)
    raise ConfigError(f"task '{found.name}' makes its own questions and reads no file; leave out --data")


def rows_to_learn(
    name: str,
    method: Method,
    *,
    task: Any,
    data: str | None,
    count: int | None,
    rename: Sequence[str],
    skip_invalid: bool,
) -> list[Any]:
    """The rows of `posttrain train`: of the file where there is one, else of the task.

    Raises:
        ConfigError: The method learns from pairs, and a task has none.
        DataError: The rows do not hold what the method learns from.
    """
    from posttrain.data.rows import load_rows, need

    parts = [part.method for part in method.parts().values() if part.supply is None]
    if data is not None:
        rows = load_rows(data, rename=renamed(rename), limit=count, skip_invalid=skip_invalid)
    else:
        if any(part.rows == "pairs" for part in parts):
            raise ConfigError(f"{name} learns from pairs; {task.name} gives demonstrations: give --data pairs.jsonl")
        samples = any(part.rows == "prompts" for part in parts)
        rows = list(task.rows("train" if samples else "demonstrations", count or (2000 if samples else 100), 0))
    for part in parts:
        need(rows, part.rows, name)
    return rows


def _task_and_file(task: str | None, data: str | None) -> tuple[Any, str | None]:
    """The task of `posttrain train`, and the file of rows that is not the task's own."""
    if data is None and task is None:
        raise ConfigError("nothing to train on; give --data FILE or --task NAME (for instance --task word-problems)")
    if task is None:
        return None, data
    own = reads_file(task)
    return named_task(task, data if own else None), None if own else data


def _say_sources(data: str, task: Any, *, samples: bool, rewards: bool, evaluates: bool) -> None:
    """Which of a file and a task gives what, on standard error."""
    gives = [word for word, given in (("rewards", samples and not rewards), ("evaluation", evaluates)) if given]
    other = f", {' and '.join(gives)} from {task.name}" if gives else f"; {task.name} gives nothing else here"
    print(f"rows from {data}{other}", file=sys.stderr)


def training_run(
    name: str,
    *,
    settings: Sequence[str],
    model: str,
    data: str | None,
    task: str | None,
    count: int | None,
    rename: Sequence[str],
    rewards: Sequence[str],
    out: Path,
    lora: bool,
    quiet: bool,
    skip_invalid: bool = False,
) -> Run:
    """The run of `posttrain train`.

    Raises:
        ConfigError: The options do not fit together.
    """
    from posttrain.methods import method as method_named
    from posttrain.models.lora import Lora
    from posttrain.plan import build_method, validation
    from posttrain.rewards.named import named_rewards

    values = parsed(settings)
    cls = type(build_method(name, {})) if ".py:" in name else method_named(name)
    parts = sorted_settings(values, cls)
    method = build_method(name, parts["method"])
    if parts["lora"] and not lora:
        raise ConfigError("lora settings are given without --lora; add it, or leave them out")
    given, file = _task_and_file(task, data)
    samples = any(part.method.rows == "prompts" for part in method.parts().values())
    rows = rows_to_learn(name, method, task=given, data=file, count=count, rename=rename, skip_invalid=skip_invalid)
    evaluates = given is not None and bool(parts["run"].get("evaluate_every"))
    if file is not None and given is not None and not quiet:
        _say_sources(file, given, samples=samples, rewards=bool(rewards), evaluates=evaluates)
    judged = tuple(given.rewards) if given is not None and samples else ()
    if rewards:
        judged = named_rewards(rewards, task=given)
    sampling = {**({"max_tokens": given.max_tokens} if given is not None else {}), **parts["sampling"]}
    return build(
        Run,
        {
            **parts["run"],
            "method": method,
            "model": model,
            "data": rows,
            "out": str(out),
            "rewards": judged,
            "verdicts": {**(given.values if given is not None else {}), **parts["run"].get("verdicts", {})},
            "evaluation": validation(given, 0) if evaluates else None,
            "sampling": build(Sampling, sampling, what="sampling"),
            "optimizer": build(Optimizer, parts["optimizer"], what="optimizer"),
            "lora": build(Lora, parts["lora"], what="lora") if lora else None,
            "quiet": quiet,
        },
        what="train",
    )


def next_commands(run: Run, model: Path, *, task: str | None, data: str | None) -> list[str]:
    """What one would write after a stage: an evaluation where a task names one, a talk (not to a reward model), a report."""
    views = [view for part in run.method.parts().values() for view in part.method.views().values()]
    scores = any(view.model == "policy" and read.head == "reward" for view in views for read in view.reads)
    commands = [] if scores else [f"posttrain chat {model}"]
    if task is not None and not scores:
        file = f" -d {data}" if data and reads_file(task) else ""
        commands.insert(0, f"posttrain evaluate -m {model} -t {task}{file}")
    return [*commands, f"posttrain report {run.out}"]


def newest_save(out: Path) -> tuple[str, int] | None:
    """Stage ("" for a run of its own) and step of the newest save under a folder."""
    saves = [*out.glob("state/step-*"), *out.glob("*/state/step-*")]
    if not saves:
        return None
    newest = max(saves, key=lambda path: path.stat().st_mtime_ns)
    stage = newest.parent.parent
    return ("" if stage == out else stage.name), int(newest.name.partition("-")[2])


def opened(model: str, *, writes: bool = True) -> tuple[Any, Any, Any]:
    """A model, its tokenizer and the renderer over it; a reward model that is to write is warned of."""
    from posttrain.data.chat import renderer_of
    from posttrain.models.load import load

    loaded, tokenizer = load(model)
    loaded.use_quickest()
    if writes and "reward" in loaded.heads:
        warnings.warn(f"{model} is a reward model: it was trained to score answers, not to write them", stacklevel=2)
    return loaded, tokenizer, renderer_of(loaded, tokenizer)


def write_samples(
    *,
    model: str,
    data: str | None,
    task: str | None,
    prompt: str | None,
    count: int | None,
    samples: int,
    settings: Sequence[str],
    out: Path | None,
    seed: int,
    skip_invalid: bool = False,
) -> None:
    """`posttrain sample`: answers as JSON lines."""
    from posttrain.distributed.world import World
    from posttrain.experience import Desk
    from posttrain.files import atomic_write, make_folders
    from posttrain.records import sample_to_json
    from posttrain.rewards import RewardRunner, score
    from posttrain.samplers.native import NativeSampler

    given, rows = _asked(prompt, data=data, task=task, count=count, seed=seed, skip_invalid=skip_invalid)
    if out is not None:
        if out.is_dir():
            raise ConfigError(f"--out {out} is a folder; give a file, for instance {out / 'samples.jsonl'}")
        make_folders(out.parent)
    options = {**({"max_tokens": given.max_tokens} if given is not None else {}), **parsed(settings)}
    loaded, tokenizer, renderer = opened(model)
    sampler = NativeSampler(loaded, tokenizer, stop_tokens=renderer.stop_tokens)
    sampling = build(Sampling, options, what="sampling")
    desk = Desk(renderer, sampler, sampling, samples, seed, 0, World())
    answers = desk.rollout(rows)
    if given is not None:
        with RewardRunner(max_failure_rate=1.0) as runner:
            answers = score(given.rewards, answers, renderer.decode, runner=runner, stop_tokens=renderer.stop_tokens)[0]
    lines = []
    for sample in answers:
        text = {
            "prompt_text": renderer.decode(sample.tokens[: sample.prompt_length]),
            "text": renderer.decode(sample.completion),
        }
        lines.append(
            json.dumps(
                {"id": f"{sample.query}#{sample.index}", **text, "sample": sample_to_json(sample)}, ensure_ascii=False
            )
        )
    content = "\n".join(lines) + "\n"
    if out is None:
        sys.stdout.write(content)
    else:
        atomic_write(out, content)


def _asked(
    prompt: str | None, *, data: str | None, task: str | None, count: int | None, seed: int, skip_invalid: bool
) -> tuple[Any, list[Any]]:
    """The task of `posttrain sample`, where it is one, and the prompts."""
    from posttrain.data.rows import load_rows

    of_file = task is not None and reads_file(task)
    names = {"--prompt": prompt, "--data": None if of_file else data, "--task": task}
    found = [name for name, value in names.items() if value is not None]
    if not found:
        raise ConfigError("nothing to answer; give --prompt TEXT, --data FILE or --task NAME")
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(found)} each name what to answer; give one of them")
    if prompt is not None:
        return None, [{"id": "prompt", "prompt": [{"role": "user", "content": prompt}]}]
    if task is None:
        return None, load_rows(str(data), limit=count, skip_invalid=skip_invalid)
    given = named_task(task, data)
    return given, list(given.rows("test", count or 10, seed))


def evaluated(
    *, model: str, task: str, data: str | None, count: int | None, samples: int, split: str, seed: int
) -> Any:
    """`posttrain evaluate`: the outcome of one evaluation."""
    from posttrain.evaluation.accuracy import Evaluation
    from posttrain.report.live import counted

    given = named_task(task, data)
    evaluation = Evaluation(
        task=given.name,
        rows=list(given.rows(split, count, seed)),
        rewards=tuple(given.rewards),
        verdicts=given.values,
        split=split,
        samples=samples,
        max_tokens=given.max_tokens,
        seed=seed,
    )
    loaded, tokenizer, renderer = opened(model)
    with counted(f"evaluate {model}", quiet=False) as progress:
        return evaluation.of(loaded, tokenizer, renderer, model_name=model, progress=progress)


def talk(model: str, *, system: str, temperature: float, max_tokens: int, seed: int) -> None:
    """`posttrain chat`: a conversation; what the model wrote is kept as messages."""
    from posttrain.samplers.native import NativeSampler

    loaded, tokenizer, renderer = opened(model)
    sampler = NativeSampler(loaded, tokenizer, stop_tokens=renderer.stop_tokens)
    sampling = Sampling(temperature=temperature or 1.0, greedy=temperature == 0, max_tokens=max_tokens)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    turn = 0
    while True:
        try:
            text = input("you: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not text:
            break
        messages.append({"role": "user", "content": text})
        answer = sampler.sample([renderer.prompt(messages)], sampling=sampling, seed=seed, step=turn)[0]
        reply = renderer.decode(answer.said(renderer.stop_tokens))
        print(f"model: {reply}" + ("  [cut]" if answer.finish == "length" else ""))
        messages.append({"role": "assistant", "content": reply})
        turn += 1


def examined(
    model: str, *, data: str | None, task: str | None, rename: Sequence[str], show: int, skip_invalid: bool = False
) -> int:
    """`posttrain doctor`: rendered rows and findings; the exit code is 1 where something is wrong."""
    from rich.console import Console

    from posttrain.data.doctor import diagnose
    from posttrain.data.rows import load_rows
    from posttrain.experience import Desk
    from posttrain.opening import show_samples

    loaded, tokenizer, renderer = opened(model, writes=False)
    rows: list[Any] | None = None
    if task is not None:
        rows = list(named_task(task, data).rows("demonstrations", 100, 0))
    elif data is not None:
        rows = load_rows(data, rename=renamed(rename), skip_invalid=skip_invalid)
    console = Console()
    findings = diagnose(
        tokenizer, rows, loaded.config, generation_config=getattr(loaded.module, "generation_config", None)
    )
    if rows and not any(finding.severity == "error" and "template" in finding.what for finding in findings):
        desk = Desk(renderer)
        pairs = all("chosen" in row for row in rows)
        show_samples(desk.replay_or_prompts(rows[:show]), tokenizer, console, rows=show, pairs=pairs, total=len(rows))
    for finding in findings:
        style = {"error": "bold red", "warning": "yellow", "note": "dim"}[finding.severity]
        console.print(str(finding), style=style, markup=False)
    if not findings:
        console.print("nothing is wrong", style="green")
    return int(any(finding.severity == "error" for finding in findings))
