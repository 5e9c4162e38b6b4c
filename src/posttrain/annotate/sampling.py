"""Items whose responses models write on the spot, each response with the name of the model that wrote it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from posttrain.annotate.items import FEWEST, MOST, Item
from posttrain.errors import ConfigError, DataError
from posttrain.types import Row, Sample, Sampling


def written_items(
    rows: Sequence[Row], models: Sequence[str], *, samples: int, sampling: Mapping[str, Any] | Sampling, seed: int = 0
) -> list[Item]:
    """Every model answers every prompt `samples` times; equal and empty answers of an item count once and not at all.

    The models are loaded one after another.  The same arguments give the same answers, so items are never doubled.

    Args:
        rows: Normalised rows with a `prompt`.
        models: As `posttrain sample --model` takes them; the same one twice writes other answers the second time.
        samples: Answers of each model to each prompt.
        sampling: How tokens are drawn.
        seed: Of the draws.

    Raises:
        ConfigError: Not 2 to 8 answers to a prompt would come of it.
        DataError: A row has no prompt, or no prompt got two different answers.
    """
    count = len(models) * samples
    if not FEWEST <= count <= MOST:
        raise ConfigError(
            f"{len(models)} models with {samples} samples each are {count} responses an item; expected {FEWEST} to {MOST}: "
            "change --samples or the number of --model"
        )
    missing = next((row for row in rows if "prompt" not in row), None)
    if missing is not None:
        raise DataError(f"{missing.get('_source', 'a row')}: no 'prompt' to answer; expected rows with a prompt")
    drawn = sampling if isinstance(sampling, Sampling) else Sampling(**sampling)
    written: list[list[tuple[str, str]]] = [[] for _ in rows]
    for number, name in enumerate(models):
        texts = _answers(rows, name, samples=samples, sampling=drawn, seed=seed, step=number)
        for place, answers in enumerate(texts):
            written[place] += [(name, text) for text in answers]
    made = [_item(row, answers) for row, answers in zip(rows, written, strict=True)]
    found = [item for item in made if item is not None]
    if len(found) < len(rows):
        left = len(rows) - len(found)
        warnings.warn(f"{left} of {len(rows)} prompts got fewer than two different answers and were left out", stacklevel=2)
    if not found:
        raise DataError("no prompt got two different answers; raise --samples, or the temperature with temperature=1.2")
    return found


def _answers(rows: Sequence[Row], name: str, *, samples: int, sampling: Sampling, seed: int, step: int) -> list[list[str]]:
    """The answers of one model, by row."""
    from posttrain.distributed.world import World
    from posttrain.experience import Desk
    from posttrain.quick import opened
    from posttrain.samplers.native import NativeSampler

    model, tokenizer, renderer = opened(name)
    sampler = NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
    answers = Desk(renderer, sampler, sampling, samples, seed, step, World()).rollout(rows)

    def text(sample: Sample) -> str:
        return renderer.decode(sample.said(renderer.stop_tokens)).strip().replace("\x00", "\ufffd")

    return [[text(sample) for sample in answers[start : start + samples]] for start in range(0, len(answers), samples)]


def _item(row: Row, answers: Sequence[tuple[str, str]]) -> Item | None:
    """The item of a row, with the first of equal answers; None where fewer than two differ."""
    first: dict[str, str] = {}
    for name, text in answers:
        if text:
            first.setdefault(text, name)
    if len(first) < FEWEST:
        return None
    info = {key: value for key, value in row.items() if key not in ("prompt", "completion") and not key.startswith("_")}
    responses = [[{"role": "assistant", "content": text}] for text in first]
    return Item(list(row["prompt"]), responses, list(first.values()), info)


def task_sampling(max_tokens: int | None, settings: Mapping[str, Any]) -> Sampling:
    """Sampling from settings, with a task's own limit unless they say otherwise."""
    from posttrain.options import build

    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return build(Sampling, {**asdict(Sampling()), **limit, **settings}, what="sampling")
