"""The metrics that the report knows by name: what each is called for a reader, its unit, and how it is written.

A run may log any other name; it is kept in `metrics.jsonl` and listed on the page as it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["number", "share", "count", "rate"]

PHASE = "time/"
"""Prefix of the seconds that a step spent in a phase: `time/sample`, `time/score`, ..., `time/other`."""


@dataclass(frozen=True)
class Metric:
    """One named number of a step."""

    name: str
    title: str
    meaning: str
    unit: Unit = "number"
    chart: bool = True  # does the page draw a curve of it


METRICS = (
    Metric("reward", "Reward", "mean reward of the step's answers, with its 95 % interval"),
    Metric("evaluation", "Evaluation", "accuracy on questions that are not trained on", "share"),
    Metric("loss", "Loss", "what is minimised; of policy gradients it says little"),
    Metric("accuracy", "Accuracy", "share of pairs whose better answer is put first, or of verdicts on the label's side", "share"),
    Metric("margin", "Margin", "reward of the chosen answer minus that of the rejected one"),
    Metric("kl", "KL from the reference", "nats per token between the policy and its start"),
    Metric("entropy", "Entropy", "nats per token: how undecided the policy is"),
    Metric("length", "Completion length", "mean tokens of an answer", "count"),
    Metric("truncated", "Truncated", "share of answers that were cut at the token limit", "share"),
    Metric("signal", "Groups with signal", "share of groups whose answers got differing rewards", "share"),
    Metric("parsed", "Parsed", "share of answers in which the verifier could read an answer", "share"),
    Metric("clip_fraction", "Clipped", "share of tokens whose ratio was clipped", "share"),
    Metric("gradient_norm", "Gradient norm", "before clipping"),
    Metric("logprob_gap", "Sampler and trainer", "mean difference of their log-probabilities, nats per token"),
    Metric("learning_rate", "Learning rate", "of the first parameter group"),
    Metric("tokens_per_second", "Tokens per second", "sampled and trained, all phases", "rate"),
    Metric("overlap/judged_ahead", "Judged ahead", "share of judgements that were ready when asked for", "share", chart=False),
    Metric("empty", "Empty answers", "share of answers without a token before the stop token", "share", chart=False),
    Metric("reward_failures", "Reward failures", "share of samples that a reward failed to judge", "share", chart=False),
    Metric("skipped_updates", "Skipped updates", "updates left out because a gradient was not finite", "count", chart=False),
)
"""Known metrics, in the order in which a reader wants them."""

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}

SHARE = re.compile(
    r"^(accuracy|exact|parsed|truncated|format|consistent|readable|right|last-number|(gold_)?pair_accuracy|prefers_longer"
    r"|disagreement|violation_rate|obeyed|unanswered|(choice|critique|revision|step)_accuracy|first_error_found"
    r"|(pass|maj|best|mean|vote).*@\d+)"
)
"""Names of evaluation metrics that are shares, written in per cent when they lie in [0, 1]."""


def number(value: float | None, unit: Unit = "number") -> str:
    """A number as a reader wants it: `41.2 %`, `38`, `1,240`, `0.0031`; a dash where there is none.

    Example:
        >>> number(0.412, "share"), number(0.00312), number(1240.4, "rate"), number(None)
        ('41.2 %', '0.00312', '1,240', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "share":
        return f"{100 * value:.1f} %"
    size = abs(value)
    if 1000 <= size < 1e7 or (unit in ("rate", "count") and 100 <= size < 1e7):
        return f"{value:,.0f}"
    if unit == "count" and size >= 0.1:
        return f"{value:.1f}"
    return f"{value:.3g}"


def metric_in_words(name: str) -> str:
    """What an evaluation's metric, task or split is called on the page."""
    words = {"accuracy_parsed": "accuracy among parsed answers", "parsed": "answers that parse"}
    return words.get(name, name.replace("_", " "))


def metric_meaning(name: str) -> str:
    """One line on what an evaluation's metric is; "" for one that is not known.

    Example:
        >>> metric_meaning("pass@8")
        'chance that at least one of 8 sampled answers is right'
    """
    kind, _, count = name.partition("@")
    several = f"{count} sampled answers" if count != "1" else "1 sampled answer"
    return {
        "accuracy": "share of problems whose one greedy answer is right",
        "parsed": "share of greedy answers that are in the asked format, right or wrong",
        "accuracy_parsed": "share of the answers that parse that is right",
        "pair_accuracy": "share of held-out comparisons in which the better answer gets the higher reward; a tie is wrong",
        "pair_accuracy_equal_length": "the same among answers of equal length, where length tells nothing",
        "pair_accuracy_chosen_shorter": "the same where the better answer is the shorter one",
        "gold_pair_accuracy": "share of pairs with differing true scores that the reward orders as these do",
        "prefers_longer": "share of comparisons that 'the longer one is better' gets right",
        "disagreement": "share of comparisons that another of the reward models orders differently",
        "length_correlation": "rank correlation of reward and length among the answers to one prompt",
        "calibration_error": "mean distance between how sure the reward is and how often it is right",
        "mean": f"share of {several} that is right, averaged over the problems",
        "pass": f"chance that at least one of {several} is right",
    }.get(kind, "")


def evaluation_unit(metric: str, values: Sequence[float | None]) -> Unit:
    """Is an evaluation's metric a share (written in per cent) or a plain number?"""
    inside = all(value is None or 0 <= value <= 1 for value in values)
    return "share" if inside and SHARE.match(metric) else "number"


def duration(seconds: float | None) -> str:
    """A length of time in words: `42 s`, `3 min 20 s`, `2 h 5 min`.

    Example:
        >>> duration(200), duration(7500)
        ('3 min 20 s', '2 h 5 min')
    """
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


def phases_of(row: Mapping[str, object]) -> dict[str, float]:
    """The phases of one line of `metrics.jsonl`, in seconds."""
    found = {}
    for name, value in row.items():
        if name.startswith(PHASE) and isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
            found[name.removeprefix(PHASE)] = float(value)
    return found


def shares(phases: Mapping[str, float], *, total: int = 100) -> dict[str, int]:
    """Whole per cents of each phase that add up to exactly `total`, by largest remainders.

    Rounding each phase alone could add up to 99 or 101.  Phases keep their order; ties go to the earlier one.

    Args:
        phases: Name -> seconds, at least 0.
        total: What the shares add up to; 0 for every phase when no time was spent.

    Example:
        >>> shares({"sample": 1.0, "score": 1.0, "other": 1.0})
        {'sample': 34, 'score': 33, 'other': 33}
    """
    spent = sum(phases.values())
    if not spent > 0:
        return dict.fromkeys(phases, 0)
    exact = {name: total * seconds / spent for name, seconds in phases.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    missing = total - sum(whole.values())
    for name in sorted(exact, key=lambda name: whole[name] - exact[name])[:missing]:
        whole[name] += 1
    return whole
