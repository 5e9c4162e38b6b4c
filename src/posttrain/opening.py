"""What happens before step 1: optimisers, refusals, and a few rendered samples to look at."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.data.colour import coloured, legend
from posttrain.distributed.world import World
from posttrain.errors import CheckpointError, ConfigError, DataError
from posttrain.experience import Desk
from posttrain.method import Method
from posttrain.models.gemm import probe
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


LONGEST = 600
"""Characters of a rendered sample that are shown, about; its middle is left out beyond."""


def show_samples(
    samples: Sequence[Sample], tokenizer: Any, console: Console | None = None, *, rows: int, pairs: bool = False, total: int
) -> None:
    """The samples of the first rows in colour, on standard error; the two answers of a pair are told apart.

    Args:
        samples: Of all rows or of the first; those of one row share a group, and a pair's chosen answer comes first.
        tokenizer: Whose tokens they are.
        console: Where to.
        rows: How many rows to show.
        pairs: Are they pairs?
        total: How many rows there are.
    """
    from rich.console import Console
    from rich.text import Text

    where = console or Console(stderr=True, soft_wrap=True)
    groups = list(dict.fromkeys(sample.group for sample in samples))[: max(0, rows)]
    if not groups:
        return
    noun = ("pair" if pairs else "row") + ("" if total == 1 else "s")
    where.print(f"{len(groups):,} of {total:,} {noun} as the model sees {'it' if total == 1 else 'them'}:", style="bold")
    where.print(legend())
    for number, sample in enumerate(sample for sample in samples if sample.group in groups):
        label = ("chosen: ", "rejected: ")[number % 2] if pairs else ""
        where.print(Text(label, style="bold").append_text(coloured(sample, tokenizer, with_legend=False, longest=LONGEST)))


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
    context = int(getattr(policy.config, "max_position_embeddings", 0) or 0)
    desk = Desk(renderer, None, run.sampling, run.samples_per_prompt, run.seed, 0, World())
    rendered: list[tuple[list[Sample], bool, int]] = []
    for part in run.method.parts().values():
        if part.supply is not None:
            continue
        rows = run.sets().get(part.data) if part.data else next(iter(run.sets().values()))
        if rows is None:
            raise ConfigError(f"a part reads data set '{part.data}', and the run has {sorted(run.sets())}")
        samples = _rendered(desk, part.method, rows)
        asked = part.method.rows == "prompts"
        renderer.check(samples, imitates=part.method.imitates and not asked, prompts=asked)
        _refuse_overlong(samples, run, context=context, asked=asked)
        rendered.append((samples, part.method.rows == "pairs", len(rows)))
    if quiet or run.quiet:
        return
    size = f"{policy.num_parameters / 1e6:.1f} M parameters"
    if policy.has_adapters:
        size += f" ({sum(p.numel() for p in policy.parameters().values()) / 1e6:.2g} M of them, in adapters, learn)"
    print(
        f"{type(run.method).__name__} on {size}: {steps:,} step{'' if steps == 1 else 's'}, learning rate "
        f"{', '.join(f'{rate:g}' for rate in rates)}, at most {tokens} tokens a forward, {torch.get_num_threads()} thread(s), "
        f"matrix products '{run.precision}'{', compiled kernels' if policy.compiled else ''}"
        f"{', compiled layers' if policy.compiles else ''}{_quicker(run, policy)}",
        file=sys.stderr,
    )
    for samples, pairs, total in rendered:
        show_samples(samples, tokenizer, rows=run.show, pairs=pairs, total=total)


def _quicker(run: Run, policy: Any) -> str:
    """What another precision would bring, where the run has the slowest one and could have another."""
    plain = run.precision == "exact" and run.dtype == "float32" and policy.decoder is not None and policy.device.type == "cpu"
    words = probe().words() if plain else ""
    return f" ({words})" if words else ""


def _refuse_overlong(samples: Sequence[Sample], run: Run, *, context: int, asked: bool) -> None:
    """Refuse rows that, with the answer they ask for, hold more than `max_length` or the model's context allows."""
    limits = [limit for limit in (run.max_length, context) if limit]
    if not limits:
        return
    limit, answer = min(limits), run.sampling.max_tokens if asked else 0
    own = limit == run.max_length and limit != context
    if answer >= limit:
        found = f"max_length is {limit}" if own else f"the model's context has {limit} tokens"
        raise ConfigError(f"max_tokens is {answer} and {found}, which leaves no room for a prompt; lower max_tokens")
    too_long = [sample for sample in samples if len(sample) > limit - answer]
    if too_long:
        first = too_long[0]
        advice = "raise max_length" if own else "take a model with a longer context"
        room = f"{limit - answer} tokens" + (f" (of {limit}, {answer} are kept for the answer)" if answer else "")
        raise DataError(
            f"{len(too_long)} of {len(samples)} rows do not fit {room}; the first is {first.query} with {len(first)} tokens. "
            f"Nothing is cut in silence: shorten or drop them, {'lower max_tokens, ' if answer else ''}or {advice}"
        )


def _rendered(desk: Desk, method: Method, rows: Sequence[Row]) -> list[Sample]:
    """Every row as it will be trained on (prompts alone, for methods that sample)."""
    if method.rows == "prompts":
        return desk.prompts(rows, 1)
    written = {"pairs": desk.pairs, "rankings": desk.rankings, "steps": desk.steps, "demonstrations": desk.replay}
    return written[method.rows](rows)
