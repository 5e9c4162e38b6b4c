"""Choosing among K answers by a principle: lettered options, the letters' log-probabilities, all rotations averaged.

Sources: "Constitutional AI", arXiv:2212.08073, section 4.1 (template, normalised option probabilities); averaging over orders as in
"RLAIF vs. RLHF", arXiv:2309.00267.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.constitution.principles import Principle
from posttrain.errors import ConfigError
from posttrain.judges.judge import Judge
from posttrain.judges.probabilities import among, neither
from posttrain.judges.templates import LETTERS, Template, lettered

__all__ = ["Case", "Choice", "choice_prompt", "choose", "ranked", "transcript"]


@dataclass(frozen=True)
class Case:
    """One question to a judge."""

    prompt: list[dict[str, Any]]
    """The conversation that was answered."""
    responses: tuple[str, ...]  # [K]
    principle: Principle


@dataclass(frozen=True)
class Choice:
    """How likely each response is to be the better one."""

    p: tuple[float, ...] = ()  # [K] averaged over the rotations; sums to 1; empty where the judge failed
    rotations: tuple[tuple[float, ...], ...] = ()  # [K, K] by rotation r and response i, which has letter i - r mod K
    neither: float = 0.0  # mass on none of the letters, averaged: much of it means a broken prompt
    asked: tuple[list[dict[str, str]], ...] = ()  # [K] the prompts as sent
    error: str = ""


def transcript(prompt: Sequence[dict[str, Any]]) -> str:
    """A conversation as text, one turn a paragraph."""
    names = {"user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names.get(turn['role'], turn['role'].capitalize())}: {turn['content']}" for turn in prompt)


def choice_prompt(
    prompt: Sequence[dict[str, Any]], responses: Sequence[str], principle: Principle, template: Template
) -> list[dict[str, str]]:
    """The multiple-choice question, responses lettered in the order given."""
    return template.messages(prompt=transcript(prompt), principle=principle.choice, options=lettered(list(responses)))


def choose(judge: Judge, cases: Sequence[Case], template: Template) -> list[Choice]:
    """Ask about every case K times, each response standing once at each letter; probabilities, not log-odds, are averaged.

    A judge that looks at the letter alone gives every response 1/K.

    Raises:
        ConfigError: The template does not choose among letters at once.
    """
    if template.options or template.think or template.begun:
        raise ConfigError(
            f"template '{template.name}' does not choose among letters at once; write one with 'options: letters', without think "
            "and begun"
        )
    found: list[Choice] = [Choice()] * len(cases)
    for size in sorted({len(case.responses) for case in cases}):
        places = [place for place, case in enumerate(cases) if len(case.responses) == size]
        asked = [_rotated(cases[place], template) for place in places]
        replies = judge.choose([question for questions in asked for question in questions], LETTERS[:size])
        for number, place in enumerate(places):
            told = replies[number * size : (number + 1) * size]
            error = next((reply.error for reply in told if reply.error), "")
            if not error and any(max(reply.logprobs) == -math.inf for reply in told):
                error = "none of the letters has any probability"
            if error:
                found[place] = Choice(asked=tuple(asked[number]), error=error)
                continue
            rotations = tuple(_unrotated(among(reply.logprobs), shift) for shift, reply in enumerate(told))
            p = tuple(sum(column) / size for column in zip(*rotations, strict=True))
            missed = sum(neither(reply.logprobs) for reply in told) / size
            found[place] = Choice(p, rotations, missed, tuple(asked[number]))
    return found


def _rotated(case: Case, template: Template) -> list[list[dict[str, str]]]:
    """The question with the responses rotated by 0, 1, ... K - 1 places."""
    size = len(case.responses)
    orders = [[case.responses[(place + shift) % size] for place in range(size)] for shift in range(size)]
    return [choice_prompt(case.prompt, order, case.principle, template) for order in orders]


def _unrotated(by_letter: Sequence[float], shift: int) -> tuple[float, ...]:
    """Probabilities by letter as probabilities by response."""
    size = len(by_letter)
    return tuple(by_letter[(place - shift) % size] for place in range(size))


def ranked(p: Sequence[float]) -> list[int]:
    """The responses' numbers, the most probable first; of equals the earlier.

    >>> ranked([0.181741, 0.494023, 0.299640, 0.024596])
    [1, 2, 0, 3]
    """
    return sorted(range(len(p)), key=lambda place: (-p[place], place))
