"""Warnings in words: what the numbers of a stage say is going wrong, and what to do about it.

Each rule looks at the steps so far and returns one or two plain sentences, or nothing.  Thresholds are rules of thumb;
they stand as constants beside their rule.  A metric that a method does not log says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report.names import number, phases_of, shares

RECENT = 5
"""Steps that count as now, and as the beginning: one noisy step warns of nothing."""


@dataclass(frozen=True)
class History:
    """The steps of one stage, as the lines of `metrics.jsonl`, oldest first."""

    rows: Sequence[Mapping[str, Any]]

    def values(self, name: str) -> list[float]:
        """`[steps]` the finite values of a metric."""
        found = [row.get(name) for row in self.rows]
        return [float(value) for value in found if isinstance(value, (int, float)) and math.isfinite(value)]

    def recent(self, name: str) -> float | None:
        """Mean of the last `RECENT` values, or None when there are fewer."""
        values = self.values(name)
        return _mean(values[-RECENT:]) if len(values) >= RECENT else None

    def first(self, name: str) -> float | None:
        """Mean of the first `RECENT` values, or None unless at least as many follow."""
        values = self.values(name)
        return _mean(values[:RECENT]) if len(values) >= 2 * RECENT else None


Rule = Callable[[History], "str | None"]


def warnings_in_words(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the steps so far give reason to look at, most serious first; [] when nothing does.

    Args:
        history: One mapping a step of one stage, oldest first: the lines of `metrics.jsonl`, or the metrics as they
        were logged.

    Example:
        >>> steps = [{"signal": 0.0, "reward": 0.0}] * 6
        >>> warnings_in_words(steps)[0].split(":")[0]
        'No signal for the last 6 steps'
    """
    found = History(history)
    return [warning for rule in RULES if (warning := rule(found)) is not None]


def skipped_updates(history: History) -> str | None:
    """Any update that was left out."""
    skipped = sum(history.values("skipped_updates"))
    if not skipped:
        return None
    return (
        f"{skipped:.0f} update{'s were' if skipped != 1 else ' was'} skipped in {_steps(len(history.rows))}, because "
        "a gradient was not finite. Lower the learning rate, and look at the replay file that names the tensor, the "
        "sample and the layer."
    )


def not_a_number(history: History) -> str | None:
    """Numbers of a step that are none."""
    names = ["loss", "reward", "kl", "entropy"]
    if not any(history.values("skipped_updates")):  # which has said it of the gradient
        names.append("gradient_norm")
    counts = {name: sum(_not_finite(row, name) for row in history.rows) for name in names}
    bad = [f"{name} in {_steps(count)}" for name, count in counts.items() if count]
    if not bad:
        return None
    return f"Not a number: {', '.join(bad)}. Lower the learning rate or train in float32, and look at the samples of those steps."


def reward_failures(history: History) -> str | None:
    """More than one recent sample in a hundred that no reward could judge."""
    share = history.recent("reward_failures")
    if share is None or share <= 0.01:
        return None
    return (
        f"The rewards themselves failed for {_per_cent(share)} of recent samples (they raised, hung or lost a "
        "worker). Those samples are left out, so the rest may not be representative. Look at the reasons in "
        "samples.jsonl, and raise the reward's deadline if they are time-outs."
    )


def nothing_parses(history: History) -> str | None:
    """Fewer than half of the recent answers can be read."""
    share = history.recent("parsed")
    if share is None or share >= 0.5:
        return None
    amount = "Almost no" if share < 0.05 else f"Only {_per_cent(share)} of"
    return (
        f"{amount} recent answers can be read by the verifier. Look at a few completions: if they are right in "
        "another format, show the format in the prompt or fine-tune on some demonstrations first; if not, check that "
        "the stop token and the answer pattern agree with the task."
    )


def no_signal(history: History) -> str | None:
    """Groups of equal rewards: `RECENT` steps without any signal, or twice as many with hardly any."""
    values = history.values("signal")
    silent = 0
    for value in reversed(values):
        if value > 0:
            break
        silent += 1
    if silent >= RECENT:
        return (
            f"No signal for the last {silent} steps: within every group all answers got the same reward, so nothing "
            "was learned. " + _difficulty(history)
        )
    share = _mean(values[-2 * RECENT :]) if len(values) >= 2 * RECENT else None
    if share is not None and share < 0.1:
        return (
            f"Little signal: in only {_per_cent(share)} of recent groups do rewards differ, and the rest is sampled "
            "for nothing. " + _difficulty(history)
        )
    return None


def truncated(history: History) -> str | None:
    """More than half of the recent answers are cut."""
    share = history.recent("truncated")
    if share is None or share <= 0.5:
        return None
    if share > 0.95:
        return (
            f"{_per_cent(share)} of recent answers are cut at the token limit: the model almost never stops. Check "
            "that the stop token is trained and is the one the sampler stops at; if it is, raise max_tokens."
        )
    return (
        f"{_per_cent(share)} of recent answers are cut at the token limit before they end. Raise max_tokens, or give "
        "a small penalty for length; what is cut is scored as a failure whether or not the reasoning was right."
    )


def empty_answers(history: History) -> str | None:
    """More than half of the recent answers are empty."""
    share = history.recent("empty")
    if share is None or share <= 0.5:
        return None
    return (
        f"{_per_cent(share)} of recent answers are empty: the model stops at once. Check that the prompt ends with "
        "the assistant's opening tokens, and that no penalty makes silence the best answer."
    )


def kl_grows(history: History) -> str | None:
    """KL tripled within ten steps, or is above one nat per token."""
    values = history.values("kl")
    if len(values) < 3 * RECENT:
        return None
    now, before = _mean(values[-RECENT:]), _mean(values[-3 * RECENT : -2 * RECENT])
    if now > 0.05 and now > 3 * max(before, 0.0):
        return (
            f"The policy leaves its reference fast: KL rose from {number(before)} to {number(now)} nats per token "
            f"within {2 * RECENT} steps. Lower the learning rate or raise the KL weight, and check the completions "
            "for tricks that please the reward."
        )
    if now > 1.0:
        return (
            f"The policy is far from its reference: {number(now)} nats per token. Other abilities have probably "
            "suffered; evaluate them, or raise the KL weight."
        )
    return None


def entropy_collapse(history: History) -> str | None:
    """Entropy fell to a tenth of its beginning, or tripled."""
    first, now = history.first("entropy"), history.recent("entropy")
    if first is None or now is None:
        return None
    if now < 0.1 * first or now < 0.005:
        return (
            f"Entropy has collapsed from {number(first)} to {number(now)} nats per token: the policy gives nearly the "
            "same answer every time, and groups will stop differing. Lower the learning rate, raise the upper clip "
            "range or the temperature, or add an entropy bonus."
        )
    if now > 3 * first and now > 1:
        return (
            f"Entropy has risen from {number(first)} to {number(now)} nats per token: answers are turning random. "
            "Lower the learning rate, and look at the completions."
        )
    return None


def reward_trend(history: History) -> str | None:
    """The last quarter's reward is below the first's, or within two standard errors of it; of answers, not of a reward model."""
    if history.values("gap") or history.values("width"):  # the mean of what a reward model gives is nobody's goal
        return None
    values = history.values("reward")
    quarter = len(values) // 4
    if quarter < RECENT or history.recent("signal") == 0:  # without signal nothing else is to be said
        return None
    early, late = values[:quarter], values[-quarter:]
    change = _mean(late) - _mean(early)
    error = math.sqrt((_variance(early) + _variance(late)) / quarter)
    if change < -2 * error and change < 0:
        return (
            f"Reward is falling: from {number(_mean(early))} in the first quarter of the steps to "
            f"{number(_mean(late))} in the last. Lower the learning rate, and check that the reward's sign and the "
            "reference are what you mean."
        )
    if change <= 2 * error and _mean(late) < 0.95:
        return (
            f"Reward is flat: {number(_mean(early))} in the first quarter of {len(values)} steps, "
            f"{number(_mean(late))} in the last. Try a higher learning rate, more samples per prompt, or problems "
            "that the model solves sometimes but not always."
        )
    return None


def longer_but_no_better(history: History) -> str | None:
    """Answers doubled in length, and the reward did not rise."""
    first, now = history.first("length"), history.recent("length")
    before, after = history.first("reward"), history.recent("reward")
    if first is None or now is None or before is None or after is None or len(history.rows) < 4 * RECENT:
        return None
    if now <= 2 * first or after > before:
        return None
    return (
        f"Answers grew from {first:.0f} to {now:.0f} tokens while the reward did not rise. Average the loss over "
        "tokens rather than rows, or add a penalty for length."
    )


def logprob_gap(history: History) -> str | None:
    """Sampler and trainer differ by more than 0.05 nats per token."""
    gap = history.recent("logprob_gap")
    if gap is None or gap <= 0.05:
        return None
    return (
        f"Sampler and trainer disagree by {number(gap)} nats per token on the same answers. Small gaps come from "
        "number formats; one like this usually means old weights in the sampler or another template. Sync after "
        "every update, sample in the trainer's precision, or correct with importance weights."
    )


def clipped(history: History) -> str | None:
    """More than three tokens in ten are clipped."""
    share = history.recent("clip_fraction")
    if share is None or share <= 0.3:
        return None
    return (
        f"{_per_cent(share)} of recent tokens are clipped, so most of the batch no longer teaches anything. Lower the "
        "learning rate, or do fewer updates on each batch."
    )


def learning_rate_zero(history: History) -> str | None:
    """Three steps or more without a learning rate; the single zero at a schedule's end is none of them."""
    zeros = sum(value == 0 for value in history.values("learning_rate"))
    if zeros < 3:
        return None
    return (
        f"The learning rate was zero in {_steps(zeros)}, in which nothing was learned. Check the schedule's length "
        "against the number of steps, and its warm-up."
    )


def gradient_zero(history: History) -> str | None:
    """`RECENT` steps with a gradient of zero, though there was signal."""
    norms, signal = history.values("gradient_norm"), history.recent("signal")
    if len(norms) < RECENT or any(norms[-RECENT:]) or signal == 0:
        return None
    return (
        f"The gradient has been exactly zero for {RECENT} steps. Check that tokens of the answer are marked as "
        "trained and that the parameters are not frozen."
    )


def time_spent(history: History) -> str | None:
    """A phase that should be small takes the time."""
    total: dict[str, float] = {}
    for row in history.rows:
        for name, seconds in phases_of(row).items():
            total[name] = total.get(name, 0.0) + seconds
    if len(history.rows) < RECENT or not total:
        return None
    parts = shares(total)
    if parts.get("score", 0) >= 50:
        return (
            f"{parts['score']} % of the time goes into scoring. Give the rewards more workers, or a cheaper check "
            "before the costly one."
        )
    if parts.get("wait", 0) >= 40:
        return f"{parts['wait']} % of the time the trainer waits for samples. Add samplers, or allow a batch to be one version old."
    if parts.get("other", 0) >= 30:
        return f"{parts['other']} % of the time is in no named phase. Look at data loading, saving and the disk."
    return None


RULES: tuple[Rule, ...] = (
    skipped_updates,
    not_a_number,
    reward_failures,
    nothing_parses,
    no_signal,
    gradient_zero,
    truncated,
    empty_answers,
    kl_grows,
    entropy_collapse,
    reward_trend,
    longer_but_no_better,
    logprob_gap,
    clipped,
    learning_rate_zero,
    time_spent,
)
"""Every rule, most serious first."""


def _difficulty(history: History) -> str:
    """What to do about groups without signal, by whether their answers are right or wrong."""
    right, wrong = history.recent("all_pass"), history.recent("all_fail")
    if right is None or wrong is None:
        reward = history.recent("reward")
        right = reward
        wrong = None if reward is None else 1 - reward
    if right is not None and wrong is not None and right > 0.9:
        return "Nearly all answers are right: use harder problems, or stop here."
    if right is not None and wrong is not None and wrong > 0.9:
        return (
            "Nearly all answers are wrong: use easier problems, sample more answers per prompt, or fine-tune on some "
            "demonstrations first."
        )
    return "Sample more answers per prompt, raise the temperature, or drop problems that are always or never solved."


def _not_finite(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name, 0.0)
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    centre = _mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / max(1, len(values) - 1)


def _per_cent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"
