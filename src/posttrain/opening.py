"""What happens before step 1: optimisers, refusals, and a few rendered samples to look at."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.data.colour import coloured
from posttrain.distributed.world import World
from posttrain.errors import CheckpointError, ConfigError, DataError
from posttrain.experience import Desk
from posttrain.method import Method
from posttrain.step import Stepper
from posttrain.types import Row, Sample
from posttrain.wiring import derived_optimizer, trained_parameters

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.data.chat import Renderer
    from posttrain.run import Run


def build_steppers(run: Run, models: Mapping[str, Any], steps: int) -> dict[str, Stepper]:
    """One optimiser shared by all parts (""), and one for each part that has its own.

    Raises:
        ConfigError: Nothing learns.
    """
    parameters = trained_parameters(models, run.method)
    if not parameters:
        raise ConfigError("nothing learns: no model of this run has a trainable parameter")
    out = {"": Stepper(derived_optimizer(run, models["policy"]), parameters, steps * run.updates * run.minibatches)}
    for name, part in run.method.parts().items():
        if part.optimizer is not None:
            settings = (
                part.optimizer if part.optimizer.lr is not None else replace(part.optimizer, lr=out[""].settings.lr)
            )
            out[name] = Stepper(settings, parameters, steps)
    return out


def refuse_changed(out: Path, settings: Mapping[str, Any], *, free: Sequence[str]) -> None:
    """Refuse to go on in a folder whose saves were made with other settings, and name those.

    Raises:
        CheckpointError: With each changed setting, before and now.
    """
    record = out / "run.json"
    if not (record.is_file() and any((out / "state").glob("step-*"))):
        return
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return  # the saves themselves are compared next
    changed = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in settings.items()
        if key not in free and before.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"{out} holds the saves of another run: {'; '.join(changed)}. Go back to its settings, or choose another folder"
        )


def show_samples(samples: Sequence[Sample], tokenizer: Any, console: Console | None = None) -> None:
    """Rendered samples in colour, on standard error."""
    from rich.console import Console

    where = console or Console(stderr=True, soft_wrap=True)
    for number, sample in enumerate(samples):
        where.print(coloured(sample, tokenizer, with_legend=number == 0))


def first_look(
    run: Run,
    renderer: Renderer,
    models: Mapping[str, Any],
    tokenizer: Any,
    *,
    tokens: int,
    rates: Sequence[float],
    steps: int,
    quiet: bool,
) -> None:
    """Refuse what must not be trained on, say what was derived, and show a few rendered samples.

    Raises:
        TemplateError: Nothing is trained, the stop token is not, BOS is doubled, or prompts differ between training and sampling.
        DataError: Rows do not fit the context; nothing is cut in silence.
    """
    policy = models["policy"]
    limit = run.max_length or int(getattr(policy.config, "max_position_embeddings", 0) or 0)
    desk = Desk(renderer, None, run.sampling, run.samples_per_prompt, run.seed, 0, World())
    shown: list[Sample] = []
    for part in run.method.parts().values():
        if part.supply is not None:
            continue
        rows = run.sets().get(part.data) if part.data else next(iter(run.sets().values()))
        if rows is None:
            raise ConfigError(f"a part reads data set '{part.data}', and the run has {sorted(run.sets())}")
        samples = _rendered(desk, part.method, rows)
        asked = part.method.rows == "prompts"
        renderer.check(samples, imitates=part.method.imitates and not asked, prompts=asked)
        if asked and limit and run.sampling.max_tokens >= limit:
            found = f"max_tokens is {run.sampling.max_tokens} and the model's context has {limit} tokens"
            raise ConfigError(f"{found}, which leaves no room for a prompt; lower max_tokens")
        _refuse_overlong(samples, limit - (run.sampling.max_tokens if asked else 0) if limit else 0)
        shown += samples[: run.show]
    if quiet or run.quiet:
        return
    size = f"{policy.num_parameters / 1e6:.1f} M parameters"
    if policy.has_adapters:
        size += f" ({sum(p.numel() for p in policy.parameters().values()) / 1e6:.2g} M of them, in adapters, learn)"
    print(
        f"{type(run.method).__name__} on {size}: {steps} steps, learning rate "
        f"{', '.join(f'{rate:g}' for rate in rates)}, at most {tokens} tokens a forward, {torch.get_num_threads()} thread(s), "
        f"matrix products '{run.precision}'",
        file=sys.stderr,
    )
    show_samples(shown[: run.show], tokenizer)


def _refuse_overlong(samples: Sequence[Sample], room: int) -> None:
    too_long = [sample for sample in samples if room and len(sample) > room]
    if too_long:
        first = too_long[0]
        raise DataError(
            f"{len(too_long)} of {len(samples)} rows do not fit {room} tokens (the first: {first.query}, {len(first)} tokens); "
            "nothing is cut in silence: shorten or drop them, or raise max_length"
        )


def _rendered(desk: Desk, method: Method, rows: Sequence[Row]) -> list[Sample]:
    """Every row as it will be trained on (prompts alone, for methods that sample)."""
    if method.rows == "prompts":
        return desk.prompts(rows, 1)
    return desk.pairs(rows) if method.rows == "pairs" else desk.replay(rows)
