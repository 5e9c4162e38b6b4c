"""Rewards over all ranks: each scores its share of the groups, every rank learns all verdicts; and what is judged before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from posttrain.records import verdict_from_json, verdict_to_json
from posttrain.types import Sample

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer
    from posttrain.distributed.world import World
    from posttrain.rewards.reward import Reward
    from posttrain.rewards.runner import RewardRunner

PAYS = 0.05
"""Judging in workers goes on beside sampling where it takes at least this share of the time that sampling takes."""


@dataclass
class Overlap:
    """Answers are judged in workers while others are still being written, in steps in which that is likely to pay.

    It is likely where it would have paid in both of the last two steps: a reward that is quicker than the threads that feed
    it only takes time from the sampler, and a first step holds the start of the workers.  The choice touches no result.
    """

    rewards: Sequence[Reward]
    renderer: Renderer
    runner: RewardRunner
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=2))
    """Of the last steps: seconds that workers judged, by seconds of sampling."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last step."""

    def listener(self) -> Callable[[Sample], None] | None:
        """Whom a sampler tells of each answer; None where overlap would not pay."""
        return self._judge if len(self.shares) == 2 and min(self.shares) >= PAYS else None

    def _judge(self, sample: Sample) -> None:
        from posttrain.rewards.judging import answer_of

        answer = answer_of(sample, self.renderer.decode, stop_tokens=self.renderer.stop_tokens)
        for reward in self.rewards:
            self.runner.judge_ahead(reward, answer)

    def settle(self, sample_seconds: float) -> None:
        """Take note of a step that was sampled in so many seconds, and scored."""
        overlapped, singles = self.listener() is not None, self.runner.settle()
        self.metrics = {"overlap/judged_ahead": singles.ahead / singles.judged} if overlapped and singles.judged else {}
        if singles.judged:
            self.shares.append(singles.seconds / max(1e-9, sample_seconds))


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
