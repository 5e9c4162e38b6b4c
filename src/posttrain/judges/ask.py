"""Questions to a judge: which of two, which of K, how good, and how good in several respects.

Every answer carries what led to it: both orders' probabilities, the mass on neither option, the rationale, or the error.

Sources: "RLAIF vs. RLHF", arXiv:2309.00267 (order swap, direct scores, reasoning first); "Constitutional AI", arXiv:2212.08073
(lettered options, principles, clamping); "Foundational Automatic Evaluators", arXiv:2510.17793 (written verdicts).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.errors import ConfigError
from posttrain.judges.judge import Judge
from posttrain.judges.probabilities import among, clamped, debiased, expectation, mean_wins, neither, scaled
from posttrain.judges.templates import LETTERS, Template, lettered, template_named
from posttrain.judges.verdicts import verdict_in

__all__ = [
    "Comparison",
    "Rating",
    "RubricRating",
    "Selection",
    "Tournament",
    "pairwise",
    "rate",
    "rubric",
    "select",
    "tournament",
    "written_pairwise",
]

RATIONALE_TOKENS = 256
"""Tokens of a rationale, unless the caller says otherwise."""


@dataclass(frozen=True)
class Comparison:
    """Which of two answers is better."""

    p: float | None  # that the first is better, both orders averaged; None: it could not be read
    orders: tuple[float, ...] = ()  # probability of slot 1, as given and swapped
    neither: tuple[float, ...] = ()  # mass on neither option, by order
    rationales: tuple[str, ...] = ()  # by order
    principle: str = ""
    error: str = ""

    @property
    def consistent(self) -> bool:
        """Do both orders prefer the same answer?"""
        return len(self.orders) == 2 and (self.orders[0] - 0.5) * (0.5 - self.orders[1]) > 0


@dataclass(frozen=True)
class Selection:
    """Which of K answers is best."""

    p: tuple[float, ...] | None  # [K] in the order in which the answers were given
    order: tuple[int, ...] = ()  # [K] the answer that stood at each letter
    neither: float = 0.0
    rationale: str = ""
    principle: str = ""
    error: str = ""


@dataclass(frozen=True)
class Tournament:
    """K answers, each compared with each."""

    wins: tuple[tuple[float, ...], ...] | None  # [K, K] probability that i is better than j, 0.5 on the diagonal
    comparisons: dict[tuple[int, int], Comparison] = field(default_factory=dict)  # of i < j

    @property
    def means(self) -> list[float] | None:
        """`[K]` mean probability to beat the others; None where a comparison could not be read."""
        return None if self.wins is None else mean_wins(self.wins)


@dataclass(frozen=True)
class Rating:
    """How good an answer is."""

    score: float | None  # expected value of the options; None: it could not be read
    reward: float | None = None  # the score as a number in [-1, 1]
    neither: float = 0.0
    rationale: str = ""
    error: str = ""


@dataclass(frozen=True)
class RubricRating:
    """How good an answer is in several respects."""

    by: dict[str, Rating]
    reward: float | None  # the weighted mean of the rewards; None where one could not be read


@dataclass(frozen=True)
class _Told:
    """What a judge said of one question."""

    logprobs: tuple[float, ...] = ()
    rationale: str = ""
    error: str = ""


def pairwise(
    judge: Judge,
    items: Sequence[tuple[str, str, str]],
    template: Template | None = None,
    *,
    principles: Sequence[str] | None = None,
    clamp: tuple[float, float] | None = None,
    rationale_tokens: int = RATIONALE_TOKENS,
) -> list[Comparison]:
    """Which of two answers is better: both orders are asked, and their probabilities averaged.

    Args:
        judge: Who is asked.
        items: (prompt, first answer, second answer), `[P]`.
        template: With two options and the holes `{first}` and `{second}`, or with letters and `{options}`.
        principles: One an item; otherwise the template's own.
        clamp: Bounds that each order's probability is moved into, (0.4, 0.6) where the judge reasons first.
        rationale_tokens: Longest rationale.

    Returns:
        One an item, `[P]`.
    """
    template = template or template_named("pairwise")
    texts = list(principles or [""] * len(items))
    if template.options and len(template.options) != 2:
        raise ConfigError(f"template '{template.name}' has {len(template.options)} options; a comparison has two")
    asked = []
    for (prompt, first, second), principle in zip(items, texts, strict=True):
        for one, two in ((first, second), (second, first)):
            given = {"options": lettered([one, two])} if not template.options else {"first": one, "second": two}
            asked.append({"prompt": prompt, "principle": principle, **given})
    told = _told(judge, template, asked, template.options or ("A", "B"), rationale_tokens)
    return [_compared(told[2 * i : 2 * i + 2], clamp, principle or template.principle) for i, principle in enumerate(texts)]


def _compared(told: Sequence[_Told], clamp: tuple[float, float] | None, principle: str) -> Comparison:
    rationales = tuple(one.rationale for one in told)
    if error := next((one.error for one in told if one.error), ""):
        return Comparison(None, rationales=rationales, principle=principle, error=error)
    orders = tuple(among(one.logprobs)[0] for one in told)
    if clamp:
        orders = tuple(clamped(p, *clamp) for p in orders)
    missed = tuple(neither(one.logprobs) for one in told)
    return Comparison(debiased(orders[0], orders[1]), orders, missed, rationales, principle)


def written_pairwise(
    judge: Judge, items: Sequence[tuple[str, str, str]], template: Template, *, max_tokens: int = RATIONALE_TOKENS
) -> list[Comparison]:
    """`pairwise` of a judge that writes its verdict out, `[A]` at the end: 1, 0, or 0.5 where the two orders disagree.

    A text without one verdict at its end is an error, whatever the other order says.
    """
    labels = template.options or ("A", "B")
    questions = []
    for prompt, first, second in items:
        for one, two in ((first, second), (second, first)):
            given = {"options": lettered([one, two])} if not template.options else {"first": one, "second": two}
            questions.append(_with(template.messages(prompt=prompt, **given), template.think))
    replies = judge.write(questions, max_tokens)
    found = []
    for i in range(len(items)):
        two_replies = replies[2 * i : 2 * i + 2]
        texts = tuple(reply.text for reply in two_replies)
        verdicts = [verdict_in(text, labels) for text in texts]
        error = next((reply.error for reply in two_replies if reply.error), "")
        if error or None in verdicts:
            found.append(Comparison(None, rationales=texts, error=error or "no verdict at the end of what was written"))
            continue
        orders = tuple(float(verdict == labels[0]) for verdict in verdicts)
        found.append(Comparison(debiased(orders[0], orders[1]), orders, rationales=texts, principle=template.principle))
    return found


def select(
    judge: Judge,
    items: Sequence[tuple[str, Sequence[str]]],
    template: Template | None = None,
    *,
    principles: Sequence[str] | None = None,
    seed: int = 0,
    keys: Sequence[object] | None = None,
    rationale_tokens: int = RATIONALE_TOKENS,
) -> list[Selection]:
    """Which of K answers is best, as one lettered question in an order drawn for each item.

    Args:
        judge: Who is asked.
        items: (prompt, K answers), all with the same K.
        template: With letters and the hole `{options}`.
        principles: One an item; otherwise the template's own.
        seed: With the item's key, what its order is drawn by.
        keys: One an item; otherwise their places.
        rationale_tokens: Longest rationale.
    """
    template = template or template_named("multiple-choice")
    texts = list(principles or [""] * len(items))
    sizes = {len(answers) for _, answers in items}
    if len(sizes) > 1 or template.options:
        found = f"options {list(template.options)}" if template.options else f"items of {sorted(sizes)} answers"
        raise ConfigError(f"template '{template.name}' chooses among letters, as many for each item; found {found}")
    drawn = [random.Random(f"{seed}/{key}") for key in (keys or range(len(items)))]
    orders = [tuple(draw.sample(range(len(answers)), len(answers))) for draw, (_, answers) in zip(drawn, items, strict=True)]
    asked = [
        {"prompt": prompt, "principle": principle, "options": lettered([answers[i] for i in order])}
        for (prompt, answers), principle, order in zip(items, texts, orders, strict=True)
    ]
    told = _told(judge, template, asked, tuple(LETTERS[: next(iter(sizes), 2)]), rationale_tokens)
    found_all = []
    for one, order, principle in zip(told, orders, texts, strict=True):
        said = principle or template.principle
        if one.error:
            found_all.append(Selection(None, order, rationale=one.rationale, principle=said, error=one.error))
            continue
        by_letter = dict(zip(order, among(one.logprobs), strict=True))
        p = tuple(by_letter[i] for i in range(len(order)))
        found_all.append(Selection(p, order, neither(one.logprobs), one.rationale, said))
    return found_all


def tournament(
    judge: Judge,
    items: Sequence[tuple[str, Sequence[str]]],
    template: Template | None = None,
    *,
    principles: Sequence[str] | None = None,
    clamp: tuple[float, float] | None = None,
    rationale_tokens: int = RATIONALE_TOKENS,
) -> list[Tournament]:
    """Every two of K answers compared, in both orders: K (K - 1) questions an item."""
    texts = list(principles or [""] * len(items))
    places = [[(n, i, j) for i, j in itertools.combinations(range(len(answers)), 2)] for n, (_, answers) in enumerate(items)]
    flat = [place for part in places for place in part]
    pairs = [(items[n][0], items[n][1][i], items[n][1][j]) for n, i, j in flat]
    compared = pairwise(
        judge, pairs, template, principles=[texts[n] for n, _, _ in flat], clamp=clamp, rationale_tokens=rationale_tokens
    )
    found: list[dict[tuple[int, int], Comparison]] = [{} for _ in items]
    for (n, i, j), comparison in zip(flat, compared, strict=True):
        found[n][i, j] = comparison
    return [Tournament(_wins(len(items[n][1]), by), by) for n, by in enumerate(found)]


def _wins(count: int, by: Mapping[tuple[int, int], Comparison]) -> tuple[tuple[float, ...], ...] | None:
    wins = [[0.5] * count for _ in range(count)]
    for (i, j), comparison in by.items():
        if comparison.p is None:
            return None
        wins[i][j], wins[j][i] = comparison.p, 1.0 - comparison.p
    return tuple(tuple(row) for row in wins)


def rate(
    judge: Judge,
    items: Sequence[tuple[str, str]],
    template: Template | None = None,
    *,
    principle: str = "",
    rationale_tokens: int = RATIONALE_TOKENS,
    **more: str,
) -> list[Rating]:
    """How good an answer is: the expected value of the options, and the same in [-1, 1].

    Args:
        judge: Who is asked.
        items: (prompt, answer).
        template: One whose options have values; 1 to 10 by default.
        principle: In place of the template's own.
        rationale_tokens: Longest rationale.
        more: Other holes of the template, such as `criterion`.
    """
    template = template or template_named("rating")
    if not template.values:
        raise ConfigError(f"template '{template.name}' has no values, so its options are no ratings; try 'rating'")
    asked = [{"prompt": prompt, "answer": answer, "principle": principle, **more} for prompt, answer in items]
    low, high = min(template.values), max(template.values)
    ratings = []
    for one in _told(judge, template, asked, template.options, rationale_tokens):
        if one.error:
            ratings.append(Rating(None, rationale=one.rationale, error=one.error))
            continue
        score = expectation(one.logprobs, template.values)
        ratings.append(Rating(score, scaled(score, low, high), neither(one.logprobs), one.rationale))
    return ratings


def rubric(
    judge: Judge,
    items: Sequence[tuple[str, str]],
    criteria: Mapping[str, tuple[str, float]],
    template: Template | None = None,
    *,
    rationale_tokens: int = RATIONALE_TOKENS,
) -> list[RubricRating]:
    """How good an answer is in several respects, each asked about by itself.

    Args:
        judge: Who is asked.
        items: (prompt, answer).
        criteria: Name -> (what is meant, weight); the weights are positive.
        template: With the hole `{criterion}`.
        rationale_tokens: Longest rationale.
    """
    template = template or template_named("criterion")
    if not criteria or any(weight <= 0 for _, weight in criteria.values()):
        raise ConfigError(f"found criteria {dict(criteria)}; write at least one, each (text, weight above 0)")
    by = {
        name: rate(judge, items, template, rationale_tokens=rationale_tokens, criterion=text)
        for name, (text, _) in criteria.items()
    }
    total = sum(weight for _, weight in criteria.values())
    found = []
    for number in range(len(items)):
        own = {name: ratings[number] for name, ratings in by.items()}
        rewards = [(rating.reward, criteria[name][1]) for name, rating in own.items() if rating.reward is not None]
        whole = len(rewards) == len(criteria)
        found.append(RubricRating(own, sum(r * weight for r, weight in rewards) / total if whole else None))
    return found


def _with(messages: list[dict[str, str]], more: str) -> list[dict[str, str]]:
    """The messages with a line behind the last one's text."""
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last['content']}\n{more}"}] if more else messages


def _told(
    judge: Judge, template: Template, asked: Sequence[Mapping[str, str]], options: Sequence[str], rationale_tokens: int
) -> list[_Told]:
    """Ask every question: the rationale first where the template wants one, then the options behind it."""
    questions = [template.messages(**given) for given in asked]
    thoughts, errors = [""] * len(questions), [""] * len(questions)
    if template.think:
        questions = [_with(question, template.think) for question in questions]
        for i, reply in enumerate(judge.write(questions, rationale_tokens)):
            thoughts[i] = reply.text.partition(template.until)[0] if template.until else reply.text
            errors[i] = reply.error or ("" if thoughts[i].strip() else "the judge wrote no rationale")
        questions = [_after(template, question, thought) for question, thought in zip(questions, thoughts, strict=True)]
    elif template.begun:
        questions = [[*question, {"role": "assistant", "content": template.begun}] for question in questions]
    open_ones = [i for i, error in enumerate(errors) if not error]
    replies = dict(zip(open_ones, judge.choose([questions[i] for i in open_ones], options), strict=True))
    told = []
    for i, thought in enumerate(thoughts):
        if i not in replies:
            told.append(_Told(rationale=thought, error=errors[i]))
            continue
        reply = replies[i]
        silent = not reply.error and all(x == float("-inf") for x in reply.logprobs)
        error = reply.error or ("none of the options has any probability" if silent else "")
        told.append(_Told(reply.logprobs, thought, error))
    return told


def _after(template: Template, question: list[dict[str, str]], thought: str) -> list[dict[str, str]]:
    """The question whose answer is the verdict, behind a rationale."""
    if template.begun:
        return [*question, {"role": "assistant", "content": thought + template.begun}]
    return [*question, {"role": "assistant", "content": thought}, {"role": "user", "content": template.ending}]
