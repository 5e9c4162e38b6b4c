"""Samples are judged: rewards give verdicts, verdicts a number, and what the infrastructure failed is masked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.rewards.reward import Answer, Reward, check, number_of, values_of
from posttrain.rewards.runner import RewardRunner, Tally
from posttrain.types import InfraError, Sample, Verdict

__all__ = ["ScoreReport", "answer_of", "combine", "score"]


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """What one call of `score` did.  Every mapping has one entry a reward."""

    num_samples: int
    num_masked: int  # samples that a reward's infrastructure failed
    num_unjudged: int  # samples of which no reward had anything to say; masked too
    means: Mapping[str, float] = field(default_factory=dict)  # of the numbers, before weight and gate; absent when none
    kinds: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # how often each verdict: {"Wrong": 3, ...}
    closed: Mapping[str, int] = field(default_factory=dict)  # samples on which its gate was closed
    tallies: Mapping[str, Tally] = field(default_factory=dict)  # failures, retries, seconds
    failures: Mapping[str, str] = field(default_factory=dict)  # the run's first, where any failed now

    def metrics(self) -> dict[str, float]:
        """Flat numbers for the log: `reward/<name>/mean`, `/failed`, `/retried`, `/seconds`, `/<Verdict>`, ..."""
        flat = {"reward/masked": float(self.num_masked), "reward/unjudged": float(self.num_unjudged)}
        for name, tally in self.tallies.items():
            flat |= {f"reward/{name}/{key}": float(getattr(tally, key)) for key in ("failed", "timed_out", "retried")}
            flat[f"reward/{name}/seconds"] = tally.seconds
            flat[f"reward/{name}/gate_closed"] = float(self.closed[name])
            flat |= {f"reward/{name}/{kind}": float(count) for kind, count in self.kinds[name].items()}
            if name in self.means:
                flat[f"reward/{name}/mean"] = self.means[name]
        return flat


def answer_of(sample: Sample, decode: Callable[[list[int]], str], *, stop_tokens: Collection[int] = frozenset()) -> Answer:
    """A sample as rewards see it.

    Args:
        sample: The sample; its `info` holds the row's values (`answer`, `id`, ...).
        decode: Tokens to text, special tokens kept.
        stop_tokens: A last token among these is not part of the text.
    """
    info = {key: value for key, value in sample.info.items() if key != "rewards"}
    messages: list[dict[str, Any]] = next((info[key] for key in ("messages", "prompt") if isinstance(info.get(key), list)), [])
    return Answer(
        text=decode(sample.said(stop_tokens)),
        prompt=decode(sample.tokens[: sample.prompt_length]),
        messages=messages,
        info=info,
        num_tokens=len(sample.completion),
        finish=sample.finish,
        group=sample.group,
        query=sample.query or sample.group,
        index=sample.index,
        tokens=sample.tokens,
        num_prompt_tokens=sample.prompt_length,
    )


def combine(
    rewards: Sequence[Reward], verdicts: Mapping[str, Verdict], values: Mapping[str, float]
) -> tuple[float | None, frozenset[str]]:
    """The weighted sum of one sample's verdicts, and the names of the rewards whose gates are closed.

    A reward whose gate is closed counts 0.  A gate is open where the value of its verdict is above 0 and its own gate
    is open; where it had nothing to say it is open.  The sum is None when no reward had anything to say.
    """
    gates = {reward.name: reward.gate for reward in rewards}

    def is_open(name: str) -> bool:
        gate = gates[name]
        if gate is None:
            return True
        passed = gate not in verdicts or number_of(verdicts[gate], values) > 0
        return passed and is_open(gate)

    spoken = [reward for reward in rewards if reward.name in verdicts]
    shut = frozenset(reward.name for reward in spoken if not is_open(reward.name))
    if not spoken:
        return None, shut
    total = sum(r.weight * number_of(verdicts[r.name], values) for r in spoken if r.name not in shut)
    return float(total), shut


def score(
    rewards: Sequence[Reward],
    samples: Sequence[Sample],
    decode: Callable[[list[int]], str],
    *,
    runner: RewardRunner,
    values: Mapping[str, float] | None = None,
    stop_tokens: Collection[int] = frozenset(),
) -> tuple[list[Sample], ScoreReport]:
    """Judge samples: fill `verdicts` and `reward`, and mask what the rewards' infrastructure failed.

    A sample of which any reward failed, even at weight 0 or behind a closed gate, has `reward` None and nothing
    trained; its group keeps its other samples.  `info["rewards"]` holds the number of each reward, before weight and
    gate.

    Args:
        rewards: The columns; weights and gates say how they become one number.
        samples: Finished samples, [S].
        decode: Tokens to text, special tokens kept.
        runner: Who runs them.
        values: Numbers of verdicts that differ from 0, for instance `{"Wrong": -1.0}`.
        stop_tokens: Token ids that end an answer and are no part of its text.

    Returns:
        The samples in the same order, [S], and what happened.

    Raises:
        ConfigError: The rewards do not fit together.
        DataError: A row holds values that are not JSON.
        RewardError: A reward cannot be loaded, or fails above the runner's rate.
    """
    check(rewards)
    table = values_of(values)
    answers = [answer_of(sample, decode, stop_tokens=stop_tokens) for sample in samples]
    columns, tallies = {}, {}
    for reward in rewards:
        columns[reward.name], tallies[reward.name] = runner.judge(reward, answers)
    judged, closed, masked, unjudged = [], Counter[str](), 0, 0
    for row, sample in enumerate(samples):
        verdicts = {name: verdict for name, column in columns.items() if (verdict := column[row]) is not None}
        numbers = {n: number_of(v, table) for n, v in verdicts.items() if not isinstance(v, InfraError)}
        failed = len(numbers) < len(verdicts)
        total, shut = (None, frozenset[str]()) if failed else combine(rewards, verdicts, table)
        closed.update(shut)
        masked, unjudged = masked + failed, unjudged + (total is None and not failed)
        changes: dict[str, Any] = {"verdicts": {**sample.verdicts, **verdicts}, "reward": total}
        if total is None:
            changes["trained"] = [False] * len(sample.trained)
        judged.append(sample.with_(**changes, info={**sample.info, "rewards": numbers}))
    report = ScoreReport(
        num_samples=len(samples),
        num_masked=masked,
        num_unjudged=unjudged,
        means=_means(judged, columns),
        kinds={name: Counter(type(v).__name__ for v in column if v is not None) for name, column in columns.items()},
        closed={name: closed[name] for name in columns},
        tallies=tallies,
        failures={name: runner.first_failure(name) for name, tally in tallies.items() if tally.failed},
    )
    return judged, report


def _means(samples: Sequence[Sample], names: Collection[str]) -> dict[str, float]:
    """The mean number of each reward over the samples it judged."""
    columns = {name: [s.info["rewards"][name] for s in samples if name in s.info["rewards"]] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items() if column}
