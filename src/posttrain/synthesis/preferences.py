"""AI feedback: the start's own answers compared by a judge, as soft-labelled pairs or as rankings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from posttrain.errors import ConfigError, RewardError
from posttrain.judges.ask import RATIONALE_TOKENS, Comparison, Selection, select, tournament
from posttrain.judges.cache import CachedJudge
from posttrain.judges.judge import judge_named
from posttrain.judges.probabilities import agreement, mean_wins
from posttrain.judges.templates import conversation, template_named
from posttrain.random import shuffled
from posttrain.synthesis.maker import Made, Maker, Workshop
from posttrain.types import Sample

PRINCIPLE = 53
"""Stream of random numbers that principles are drawn from."""
TIE = 1e-9
"""What rounding may make of a probability of 0.5: nothing is decided by less."""

Wins = Sequence[Sequence[float]]
"""`[K, K]` probability that answer i is better than answer j."""


TOGETHER = 64
"""Prompts whose answers are judged in one call: an endpoint has so much to do at once, and a kill loses no more."""


@dataclass(frozen=True, kw_only=True)
class Preferences(Maker):
    """K answers to each prompt, compared by a judge: pairs whose column `preference` is the judge's probability, or rankings.

    Two answers are asked about in both orders and the probabilities averaged, so that a judge that looks at the slot alone says
    0.5.  More than two are compared each with each, or, where the template has letters, in one question in an order that is drawn:
    `p(i over j) = p_i / (p_i + p_j)`.  A pair of which the judge says exactly 0.5, or whose answers are the same text, is dropped;
    nothing is decided by the slot.  Every judgement is kept in judgements.jsonl, and replies are kept by content, so that a run
    that was killed goes on.

    Sources: "RLAIF vs. RLHF", arXiv:2309.00267 (both orders, soft labels); "Constitutional AI", arXiv:2212.08073 (principles drawn
    at random, letters, probabilities kept within 0.4 and 0.6 where the judge reasons first).
    """

    judge: str = ""
    """Who judges: `openai:URL#MODEL`, `local:FOLDER`, `file.py:function`, `start` for the start itself; empty: model `judge`."""
    template: str = "pairwise"
    """What is asked: a template's name, or `FILE.yaml:NAME`."""
    principles: tuple[str, ...] = ()
    """Texts of which each prompt draws `ensemble` at random; empty: the template's own."""
    ensemble: int = 1
    """Principles by which each prompt is judged; their probabilities are averaged."""
    clamp: float = 0.0
    """Each probability is kept within [clamp, 1 - clamp], 0.4 for a judge that reasons first; 0 leaves them."""
    threshold: float = 0.0
    """Pairs are kept whose probability differs from 0.5 by more than this."""
    keep: Literal["all", "best", "ranking"] = "all"
    """Every pair of the answers to a prompt, the best against the worst by mean win probability, or one ranking."""
    soft: bool = True
    """Write the probability into the column `preference`; otherwise labels are hard."""
    truncated: bool = True
    """Are answers that were cut at the limit used?"""
    rationale_tokens: int = RATIONALE_TOKENS
    """Longest rationale of a template that asks for one."""

    def __post_init__(self) -> None:
        if not 0 <= self.clamp < 0.5 or not 0 <= self.threshold < 0.5:
            raise ConfigError(f"found clamp {self.clamp} and threshold {self.threshold}; both must be in [0, 0.5)")
        if not 1 <= self.ensemble <= max(1, len(self.principles)):
            raise ConfigError(f"ensemble is {self.ensemble} of {len(self.principles)} principles; expected 1 or up to all of them")
        template_named(self.template)

    def needs(self) -> tuple[str, ...]:
        """A judge: a model of the stage, unless one is named."""
        return () if self.judge else ("judge",)

    def make(self, shop: Workshop) -> Made:
        """Answer, compare, pair."""
        shop.need_several("a judge compares")
        answers = shop.scored(shop.answers(shop.rows, step=shop.draw))
        groups = [group for group in self.groups(answers) if len(group) > 1]
        judge = self.opened(shop)
        judged = self.judged(shop, judge, groups)
        rows: list[dict[str, Any]] = []
        for group, (wins, _) in zip(groups, judged, strict=True):
            if wins is not None:
                rows += self.rows(shop, group, wins)
        records = [record for _, part in judged for record in part]
        return Made(rows, self.metrics(groups, judged, rows, judge), {"judgements": records})

    def groups(self, answers: Sequence[Sample]) -> list[list[Sample]]:
        """The distinct answers to each prompt."""
        found: dict[str, dict[tuple[int, ...], Sample]] = {}
        for sample in answers:
            group = found.setdefault(sample.group, {})
            if self.truncated or sample.finish != "length":
                group.setdefault(tuple(sample.completion), sample)
        return [list(group.values()) for group in found.values()]

    def opened(self, shop: Workshop) -> CachedJudge:
        """The judge, with the replies that the stage's folder has."""
        own = self.judge in ("", "start")
        return shop.cached(shop.judge(self.judge or "judge") if own else judge_named(self.judge))

    def judged(
        self, shop: Workshop, judge: CachedJudge, groups: Sequence[Sequence[Sample]]
    ) -> list[tuple[Wins | None, list[dict[str, Any]]]]:
        """(win probabilities, records) of each prompt, from all ranks; None where the judge could not be read.

        Raises:
            RewardError: The judge failed on more than half of the prompts.
        """
        size, rank = shop.world.size, shop.world.rank
        own: list[int] = list(range(rank, len(groups), size))
        found: list[tuple[Wins | None, list[dict[str, Any]]]] = []
        with shop.progress("judgements", len(own)) as advance:
            for start in range(0, len(own), TOGETHER):
                found += self.compared(shop, judge, [(i, groups[i]) for i in own[start : start + TOGETHER]])
                advance(len(found), len(own))
        if size > 1:
            parts = shop.world.all_gather_json([list(one) for one in found])
            found = [tuple(parts[i % size][i // size]) for i in range(len(groups))]
        errors = [record["error"] for wins, part in found if wins is None for record in part if record["error"]]
        unread = sum(wins is None for wins, _ in found)
        if 2 * unread > len(found):
            failed = f"the judge {judge.identity} failed on {unread} of {len(found)} prompts"
            raise RewardError(f"{failed}; the first error: {errors[0]}")
        return found

    def compared(
        self, shop: Workshop, judge: CachedJudge, groups: Sequence[tuple[int, Sequence[Sample]]]
    ) -> list[tuple[Wins | None, list[dict[str, Any]]]]:
        """(win probabilities, records) of some prompts, given by their numbers and their answers."""
        asked = []  # one a prompt and principle
        for number, group in groups:
            prompt, texts = conversation(group[0].info["prompt"]), [shop.text(sample) for sample in group]
            about = {"id": group[0].query, "prompt": prompt, "answers": texts, "template": self.template}
            asked += [_Asked(number, about, principle) for principle in self.drawn(shop.seed, number)]
        said = list(zip(asked, self.said(judge, asked), strict=True))
        found: list[tuple[Wins | None, list[dict[str, Any]]]] = []
        for number, _ in groups:
            own = [judgement for question, judgement in said if question.number == number]
            who = {"judge": judge.identity, "versions": sorted(judge.versions)}
            records = [{**record, **who} for _, part in own for record in part]
            whole = [wins for wins, _ in own if wins is not None]
            mean = [[sum(cell) / len(whole) for cell in zip(*row, strict=True)] for row in zip(*whole, strict=True)]
            found.append((mean if len(whole) == len(own) else None, records))
        return found

    def said(self, judge: CachedJudge, asked: Sequence[_Asked]) -> list[tuple[Wins | None, list[dict[str, Any]]]]:
        """(win probabilities, records) of each question: lettered where the template is, else each answer with each."""
        template, tokens = template_named(self.template), self.rationale_tokens
        clamp = (self.clamp, 1 - self.clamp) if self.clamp else None
        found: dict[int, tuple[Wins | None, list[dict[str, Any]]]] = {}
        sizes = sorted({one.size for one in asked if one.size > 2}) if not template.options else []
        for size in sizes:
            places = [place for place, one in enumerate(asked) if one.size == size]
            part = [asked[place] for place in places]
            items, principles = [one.item for one in part], [one.principle for one in part]
            keys = [f"{one.number}/{one.principle}" for one in part]
            chosen = select(judge, items, template, principles=principles, keys=keys, rationale_tokens=tokens)
            for place, selection in zip(places, chosen, strict=True):
                wins = None if selection.p is None else _shares(selection.p)
                found[place] = wins, [{"kind": "selection", **asked[place].about, **_plain(selection)}]
        places = [place for place in range(len(asked)) if place not in found]
        part = [asked[place] for place in places]
        items, principles = [one.item for one in part], [one.principle for one in part]
        played = tournament(judge, items, template, principles=principles, clamp=clamp, rationale_tokens=tokens)
        for place, one in zip(places, played, strict=True):
            about = {"kind": "comparison", **asked[place].about}
            records = [{**about, "pair": list(pair), **_plain(each)} for pair, each in one.comparisons.items()]
            found[place] = one.wins, records
        return [found[place] for place in range(len(asked))]

    def drawn(self, seed: int, number: int) -> list[str]:
        """The principles by which a prompt is judged; empty texts are the template's own."""
        if not self.principles:
            return [""]
        return [self.principles[i] for i in shuffled(seed, number, len(self.principles), stream=PRINCIPLE)[: self.ensemble]]

    def rows(self, shop: Workshop, group: Sequence[Sample], wins: Wins) -> list[dict[str, Any]]:
        """Pairs (or the ranking) of one prompt."""
        means = mean_wins(wins)
        order = sorted(range(len(group)), key=lambda i: -means[i])
        if self.keep == "ranking":
            if means[order[0]] - means[order[-1]] <= max(self.threshold, TIE):
                return []
            return [shop.ranking(group, order, scores=means)]
        places = [(order[0], order[-1])] if self.keep == "best" else list(itertools.combinations(range(len(group)), 2))
        found = []
        for i, j in places:
            p = wins[i][j]
            if abs(p - 0.5) <= max(self.threshold, TIE) or shop.text(group[i]) == shop.text(group[j]):
                continue
            better, worse = (group[i], group[j]) if p > 0.5 else (group[j], group[i])
            soft = {"columns": {"preference": max(p, 1 - p)}} if self.soft else {}
            found.append(shop.pair(better, worse, **soft))
        return found

    def metrics(
        self,
        groups: Sequence[Sequence[Sample]],
        judged: Sequence[tuple[Wins | None, list[dict[str, Any]]]],
        rows: Sequence[Mapping[str, Any]],
        judge: CachedJudge,
    ) -> dict[str, float]:
        """What the summary shows of the judging."""
        records = [record for _, part in judged for record in part]
        read = [record for record in records if not record["error"]]
        orders = [record["orders"] for record in read if len(record.get("orders", ())) == 2]
        missed = [x for record in read for x in _numbers(record["neither"])]
        truth = [
            (wins[i][j], (group[i].reward or 0.0) > (group[j].reward or 0.0))
            for group, (wins, _) in zip(groups, judged, strict=True)
            if wins is not None
            for i, j in itertools.combinations(range(len(group)), 2)
            if group[i].reward is not None and group[j].reward is not None and group[i].reward != group[j].reward
        ]
        longer = [len(r["chosen"][0]["content"]) > len(r["rejected"][0]["content"]) for r in rows if "chosen" in r]
        found = {
            "prompts": float(len(groups)),
            "judgements": float(len(records)),
            "unread": float(len(records) - len(read)),
            "rows": float(len(rows)),
            "on_neither": sum(missed) / max(1, len(missed)),
            "asked": float(judge.asked),
        }
        if orders:
            found["consistent"] = sum((first - 0.5) * (0.5 - swapped) > 0 for first, swapped in orders) / len(orders)
        if longer:
            found["chosen_longer"] = sum(longer) / len(longer)
        if truth:
            found["agreement"] = agreement([p for p, _ in truth], [first for _, first in truth])
        return found


@dataclass(frozen=True)
class _Asked:
    """The answers to one prompt, to be judged by one principle."""

    number: int
    about: dict[str, Any]
    principle: str

    @property
    def item(self) -> tuple[str, Sequence[str]]:
        return self.about["prompt"], self.about["answers"]

    @property
    def size(self) -> int:
        return len(self.about["answers"])


def _plain(judgement: Comparison | Selection) -> dict[str, Any]:
    """A judgement as JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(judgement).items()}


def _numbers(value: Any) -> list[float]:
    return list(value) if isinstance(value, list) else [float(value)]


def _shares(p: Sequence[float]) -> Wins:
    """`p_i / (p_i + p_j)`, 0.5 where both are 0.  `[K] -> [K, K]`."""
    return [[a / (a + b) if a + b else 0.5 for b in p] for a in p]
