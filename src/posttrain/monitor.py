"""What a run watches beside its loss: reward with an interval, signal, length, KL from the start, entropy, the sampler's gap."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.files import atomic_write
from posttrain.forward import read
from posttrain.pack import units
from posttrain.reads import entropy, logprob
from posttrain.report.statistics import clustered_interval
from posttrain.step import Ready
from posttrain.types import InfraError, Overlong, Sample, Unparseable, View


def without_signal(ready: Ready) -> bool:
    """Do all groups of a part that compares answers hold equal rewards?  Then there is nothing to step on.

    A KL or entropy term alone would still move the weights; a group without signal must not. A batch with nothing
    left to train (every reward failed, say) has none either.
    """
    if not units(ready.batch, ready.method.unit):
        return True
    stats = ready.state.groups
    if ready.method.rows != "prompts" or stats is None or int(stats.count.max()) < 2:
        return False
    return bool((ready.batch.advantages == 0).all()) and bool((stats.std < 1e-8).all())


def sample_metrics(samples: Sequence[Sample], part: str, *, groups: bool) -> dict[str, float]:
    """Numbers about the samples of one part: length, and for answers reward, signal, truncation, parsing, failures.

    The reward has an interval from 5 groups on.

    Args:
        samples: Of one step.
        part: Prefix of the names, for a part of a sum beside which another one samples; "" for none.
        groups: Were they sampled in groups and scored?
    """
    if not samples:
        return {}
    lengths = [len(sample) - sample.prompt_length for sample in samples]
    found = {"length": sum(lengths) / len(lengths)}
    if groups:
        scored = [sample for sample in samples if sample.reward is not None]
        found["reward_failures"] = 1 - len(scored) / len(samples)
        found["truncated"] = sum(sample.finish == "length" for sample in samples) / len(samples)
        found["empty"] = sum(length <= 1 for length in lengths) / len(samples)
        if scored:
            rewards = [float(sample.reward or 0.0) for sample in scored]
            interval = clustered_interval(rewards, [sample.group for sample in scored])
            shown = interval.worth_saying(share=all(reward in (0, 1) for reward in rewards))
            found["reward"] = shown.value
            if shown.known:
                found |= {"reward_low": shown.low, "reward_high": shown.high}
            unread = (Unparseable, Overlong, InfraError)
            found["parsed"] = sum(
                not any(isinstance(verdict, unread) for verdict in sample.verdicts.values()) for sample in scored
            ) / len(scored)
            if len({sample.group for sample in scored}) < len(scored):  # else nothing is compared within a group
                found["signal"] = signal_share(scored)
            found |= reward_means(scored)
    return {f"{part}/{name}" if part else name: value for name, value in found.items()}


def reward_means(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of each reward by name, before weight and gate, where there are several: a gold reward beside its proxy, say."""
    named: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, value in sample.info.get("rewards", {}).items():
            named[name].append(value)
    return {f"reward/{name}": sum(values) / len(values) for name, values in named.items()} if len(named) > 1 else {}


def signal_share(samples: Sequence[Sample]) -> float:
    """The share of groups in which rewards differ."""
    groups: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(float(sample.reward or 0.0))
    return sum(max(rewards) - min(rewards) > 1e-8 for rewards in groups.values()) / len(groups)


def watch(models: Mapping[str, Any], ready: Sequence[Ready], *, rows: int, start: str) -> dict[str, float]:
    """KL from the start (k3, nats per token), entropy, and the gap between sampler and trainer, on a few samples."""
    if not rows or start not in models:
        return {}
    for each in ready:
        if each.method.rows != "prompts":
            continue
        live = each.batch.mask.any(-1).nonzero().flatten()[:rows]
        if not len(live):
            return {}
        batch = each.batch.rows(live)
        views = {"policy": View(reads=(logprob, entropy), once=True), "start": View(start, (logprob,), once=True)}
        seen = read(models, batch, views)
        mask = batch.mask
        difference = (seen.start.logprob - seen.policy.logprob)[mask]
        k3 = torch.expm1(difference) - difference
        found = {"kl": float(k3.mean()), "entropy": float(seen.policy.entropy[mask].mean())}
        gap = (seen.policy.logprob - batch.logprobs)[mask].abs()
        found |= {"logprob_gap": float(gap.mean()), "logprob_gap_max": float(gap.max())}
        return found
    return {}


def write_replay(out: Path, step: int, number: int, members: Sequence[tuple[Ready, Any]], culprit: str) -> str:
    """Write what an update that was left out had been made of, so that it can be looked into; returns where.

    `number` counts the updates left out in a row, and `members` hold the units of all ranks.

    The file names the first tensor that was not finite, and each part's samples by number, with readings that are not finite.
    """
    parts = []
    for ready, chosen in members:
        rows = [row for unit in chosen for row in unit]
        bad = [row for row in rows if not bool(torch.isfinite(ready.batch.advantages[row]).all())]
        parts.append(
            {
                "part": ready.name,
                "rows": rows,
                "rows_with_bad_advantages": bad,
                "tokens": [ready.batch.tokens[row, : int(ready.batch.lengths[row])].tolist() for row in rows],
                "rewards": [float(ready.batch.rewards[row]) for row in rows],
            }
        )
    path = out / "replay" / f"step-{step:08d}-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"step": step, "first_non_finite": culprit, "parts": parts}))
    return str(path)
