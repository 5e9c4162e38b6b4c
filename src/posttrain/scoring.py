"""Rewards over all ranks: each scores its share of the groups, every rank learns all verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from posttrain.records import verdict_from_json, verdict_to_json
from posttrain.types import Sample

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer
    from posttrain.distributed.world import World
    from posttrain.rewards.reward import Reward
    from posttrain.rewards.runner import RewardRunner


def score_everywhere(
    rewards: Sequence[Reward],
    samples: Sequence[Sample],
    renderer: Renderer,
    *,
    runner: RewardRunner,
    world: World,
    values: Mapping[str, float] | None = None,
) -> list[Sample]:
    """Every sample with its verdicts and reward; groups are never parted between ranks.

    `values` are the numbers of verdicts that differ from 0, for instance `{"Wrong": -1.0}`.
    """
    from posttrain.rewards.judging import score

    if world.size == 1:
        return score(rewards, samples, renderer.decode, runner=runner, values=values, stop_tokens=renderer.stop_tokens)[0]
    numbers: dict[str, int] = {}
    group = [numbers.setdefault(sample.query or sample.group, len(numbers)) for sample in samples]
    mine = [i for i, number in enumerate(group) if number % world.size == world.rank]
    own = [samples[i] for i in mine]
    scored, _ = score(rewards, own, renderer.decode, runner=runner, values=values, stop_tokens=renderer.stop_tokens)
    records = [
        {
            "place": place,
            "reward": sample.reward,
            "trained": any(sample.trained),
            "info": {key: sample.info[key] for key in ("rewards",) if key in sample.info},
            "verdicts": {name: verdict_to_json(verdict) for name, verdict in sample.verdicts.items()},
        }
        for place, sample in zip(mine, scored, strict=True)
    ]
    out = list(samples)
    for record in (record for part in world.all_gather_json(records) for record in part):
        sample = out[record["place"]]
        verdicts = {name: verdict_from_json(value) for name, value in record["verdicts"].items()}
        trained = sample.trained if record["trained"] else [False] * len(sample)
        info = {**sample.info, **record["info"]}
        out[record["place"]] = sample.with_(reward=record["reward"], verdicts=verdicts, trained=trained, info=info)
    return out
