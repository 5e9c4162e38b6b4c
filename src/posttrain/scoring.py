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
"""Judging beside sampling is tried where workers judge for at least this share of the time that sampling takes."""
EVERY = 50
"""In the last two of so many steps the way that was slower is tried again."""


def _last_two() -> deque[float]:
    return deque(maxlen=2)


@dataclass
class Overlap:
    """Answers are judged in workers while others are still being written, in steps in which that pays.

    A reward that is quicker than the threads that feed it only takes time from the sampler, and one that computes hard may
    take the sampler's cores.  So it is tried where the last two steps (the very first of a run holds the start of the
    workers) spent enough time in workers, and kept while a token costs no more with it than without it.  The choice depends
    on the clock and touches no result.
    """

    rewards: Sequence[Reward]
    renderer: Renderer
    runner: RewardRunner
    num_steps: int = 0
    shares: deque[float] = field(default_factory=_last_two)
    """Of the last steps: seconds that workers judged, by seconds of sampling."""
    costs: dict[bool, deque[float]] = field(default_factory=lambda: {True: _last_two(), False: _last_two()})
    """Of the last steps with and without overlap: seconds of sampling and scoring a token."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last step."""

    def pays(self) -> bool:
        """Is the step that comes to be overlapped?"""
        if len(self.shares) < 2 or min(self.shares) < PAYS:
            return False
        costs = self.costs
        best = len(costs[True]) < 2 or not costs[False] or min(costs[True]) <= min(costs[False])
        return best != (self.num_steps % EVERY >= EVERY - 2)

    def listener(self) -> Callable[[Sample], None] | None:
        """Whom a sampler tells of each answer; None in a step that is not overlapped."""
        return self._judge if self.pays() else None

    def _judge(self, sample: Sample) -> None:
        from posttrain.rewards.judging import answer_of

        answer = answer_of(sample, self.renderer.decode, stop_tokens=self.renderer.stop_tokens)
        for reward in self.rewards:
            self.runner.judge_ahead(reward, answer)

    def settle(self, *, num_tokens: int, sample_seconds: float, score_seconds: float) -> None:
        """Take note of what a step cost that wrote and scored so many tokens."""
        overlapped, singles = self.pays(), self.runner.settle()
        self.metrics = {"overlap/judged_ahead": singles.ahead / singles.judged} if overlapped and singles.judged else {}
        self.num_steps += 1
        if singles.judged and num_tokens and sample_seconds > 0:
            self.shares.append(singles.seconds / sample_seconds)
            self.costs[overlapped].append((sample_seconds + score_seconds) / num_tokens)


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
