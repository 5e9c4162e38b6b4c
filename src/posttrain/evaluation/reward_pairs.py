"""How far to trust a reward model: held-out pairs, length, calibration, and whether others of its kind agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from posttrain.errors import ConfigError, DataError
from posttrain.evaluation.accuracy import Outcome
from posttrain.evaluation.examiner import Examiner, curve, entry
from posttrain.experience import Desk
from posttrain.report.statistics import Interval, clustered_interval
from posttrain.rewards.model import reward_scores
from posttrain.synthesis.maker import Workshop
from posttrain.types import Row, Sample

__all__ = ["Pair", "RewardPairs", "answers_of", "calibration", "pairs_of", "ranks", "spearman"]


@dataclass(frozen=True)
class Pair:
    """One comparison: a better and a worse answer to one prompt."""

    prompt: str
    gap: float  # score of the better one minus that of the worse one
    longer: int  # tokens by which the better one is longer
    gold: float  # by which its true score is higher; NaN where that is not known
    others: tuple[float, ...]  # the gaps of the other models


@dataclass(frozen=True, kw_only=True)
class RewardPairs(Examiner):
    """Reads a reward model on comparisons that it was not trained on.

    Numbers: `pair_accuracy` (a tie is wrong), the same among pairs of equal length and where the better answer is the shorter
    one, `prefers_longer` (what "longer is better" would get), `length_correlation` (Spearman, scores and lengths less
    their prompt's mean), `calibration_error`, `gold_pair_accuracy` on pairs whose true scores (the rows' `scores`) differ,
    and `disagreement`, the share of pairs that another of the stage's models orders differently.  Intervals are over
    prompts.
    """

    bins: int = 8
    """Bins of the calibration curve."""
    least: int = 20
    """Pairs below which a number is left out."""

    def examine(self, shop: Workshop, *, model_name: str) -> Outcome:
        """The numbers, and one record a pair."""
        pairs, spread = self._read(shop)
        n = len({pair.prompt for pair in pairs})
        found: dict[str, tuple[int, Interval]] = {}

        def share(name: str, chosen: Sequence[Pair], right: Callable[[Pair], float]) -> None:
            if len(chosen) >= self.least:
                values = [float(right(pair)) for pair in chosen]
                found[name] = (len(chosen), clustered_interval(values, [pair.prompt for pair in chosen]))

        share("pair_accuracy", pairs, lambda pair: pair.gap > 0)
        share("pair_accuracy_equal_length", [pair for pair in pairs if pair.longer == 0], lambda pair: pair.gap > 0)
        share("pair_accuracy_chosen_shorter", [pair for pair in pairs if pair.longer < 0], lambda pair: pair.gap > 0)
        known = [pair for pair in pairs if not math.isnan(pair.gold) and pair.gold != 0]
        share("gold_pair_accuracy", known, lambda pair: pair.gap * pair.gold > 0)
        share("prefers_longer", pairs, lambda pair: (pair.longer > 0) + 0.5 * (pair.longer == 0))
        if pairs and pairs[0].others:
            share("disagreement", pairs, lambda pair: any(other * pair.gap < 0 for other in pair.others))
        points, error = calibration([pair.gap for pair in pairs], bins=self.bins)
        nan = float("nan")
        found["calibration_error"] = (len(pairs), Interval(error, nan, nan, n))
        found["length_correlation"] = (len(spread), Interval(spearman(spread), nan, nan, len(spread)))
        task, split = "comparisons", "held out"
        numbers = [entry(model_name, task, split, name, count, interval) for name, (count, interval) in found.items()]
        drawn = curve(
            f"Calibration of {model_name}",
            x="chance that the model gives its choice",
            y="share of its choices that are right",
            lines={model_name: points, "calibrated": [[0.5, 0.5], [1.0, 1.0]]},
            caption="On the line the model is as sure as it is right; below it, it is too sure.",
        )
        return Outcome(numbers, [_record(pair, model_name) for pair in pairs], [drawn])

    def _read(self, shop: Workshop) -> tuple[list[Pair], list[tuple[float, float]]]:
        """Every pair, and (score, length) of every answer less the means of its prompt."""
        who = shop.model("start")
        groups = answers_of(shop.rows, Desk(who.renderer))
        flat = [sample for group in groups for sample in group]
        models = [shop.model(name).model for name in shop.sources]
        scores = [iter(reward_scores(model, flat)) for model in models]
        pairs: list[Pair] = []
        spread: list[tuple[float, float]] = []
        for number, (row, group) in enumerate(zip(shop.rows, groups, strict=True)):
            mine = [[next(score) for _ in group] for score in scores]  # [models][K]
            lengths = [len(sample.completion) for sample in group]
            pairs += pairs_of(str(row.get("id") or number), mine, lengths, _gold(row))
            mean, middle = sum(mine[0]) / len(group), sum(lengths) / len(group)
            spread += [(score - mean, length - middle) for score, length in zip(mine[0], lengths, strict=True)]
        return pairs, spread


def answers_of(rows: Sequence[Row], desk: Desk) -> list[list[Sample]]:
    """The answers of each row, best first: of a ranking all, of a pair two.

    Raises:
        DataError: A row is neither a ranking nor a pair.
    """
    groups = []
    for number, row in enumerate(rows):
        if "ranking" in row:
            groups.append(desk.rankings([row]))
        elif "chosen" in row or "chosen_sample" in row:
            groups.append(desk.pairs([row]))
        else:
            raise DataError(f"row {number} is no comparison; expected prompt + chosen + rejected, or responses + ranking")
    return groups


def _gold(row: Row) -> list[float] | None:
    """The true scores of a row's answers, best-ranked first, where the row has them."""
    scores = row.get("scores")
    if scores is None:
        return None
    order = row.get("ranking") or range(len(scores))
    return [float(scores[place]) for place in order]


def pairs_of(prompt: str, gaps: Sequence[Sequence[float]], lengths: Sequence[int], gold: Sequence[float] | None) -> list[Pair]:
    """All pairs of one ranking, best first.

    Args:
        prompt: What the pairs share.
        gaps: Scores `[models][K]`, the model in question first.
        lengths: Tokens of each answer, `[K]`.
        gold: True scores, `[K]`, or None.
    """
    found = []
    for better, worse in combinations(range(len(lengths)), 2):
        differences = [score[better] - score[worse] for score in gaps]
        true = gold[better] - gold[worse] if gold is not None else float("nan")
        found.append(Pair(prompt, differences[0], lengths[better] - lengths[worse], true, tuple(differences[1:])))
    return found


def calibration(gaps: Sequence[float], *, bins: int = 8) -> tuple[list[list[float]], float]:
    """How often a model's choice is right against the chance `sigmoid(|gap|)` that it gives it.

    Args:
        gaps: Score of the better answer minus that of the worse one, `[P]`.
        bins: Equally filled ones.

    Returns:
        Points `[mean chance, share right]` of each bin, and the mean distance of the two weighed by bin size (the
        expected calibration error).

    Raises:
        ConfigError: There is no bin.
    """
    if bins < 1:
        raise ConfigError(f"bins is {bins}; expected at least 1")
    sure = sorted((1 / (1 + math.exp(-min(abs(gap), 60.0))), float(gap > 0)) for gap in gaps)
    bounds = [len(sure) * number // bins for number in range(bins + 1)]
    points, error = [], 0.0
    for first, end in pairwise(bounds):
        inside = sure[first:end]
        if inside:
            chance, right = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            points.append([chance, right])
            error += abs(chance - right) * len(inside) / len(sure)
    return points, error


def spearman(values: Sequence[tuple[float, float]]) -> float:
    """The rank correlation of two columns, ties sharing their mean rank; NaN where one does not vary.  `[n, 2] -> []`.

    >>> spearman([(1, 10), (2, 20), (3, 15), (4, 40)])
    0.8
    """
    if len(values) < 2:
        return float("nan")
    first, second = (ranks([value[side] for value in values]) for side in (0, 1))
    middle = (len(values) + 1) / 2
    spread = math.sqrt(sum((a - middle) ** 2 for a in first) * sum((b - middle) ** 2 for b in second))
    if not spread:
        return float("nan")
    return sum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True)) / spread


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1 on, ties sharing their mean rank.  `[n] -> [n]`."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2 + 1
        start = end + 1
    return ranks


def _record(pair: Pair, model_name: str) -> dict[str, Any]:
    gold = None if math.isnan(pair.gold) else pair.gold
    return {"kind": "comparison", "model": model_name, "prompt": pair.prompt, "gap": pair.gap, "longer": pair.longer, "gold": gold}
