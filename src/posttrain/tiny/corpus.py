"""The text that the embedded base model reads: procedural, endless, and a function of (seed, index) alone.

Half of it is worked solutions of word problems in eight formats, none of them the task's: `<think>...</think>` followed
by `<answer>N</answer>` never occurs, and calculator annotations occur in bare drills alone. Every word problem comes from
the split `pretrain`, so that no template meets the numbers it has in a demonstration, an RL prompt or a test. The rest
is arithmetic, equations, stories with numbers, plain sentences, and chats about other things that use the chat and
think tags.
"""

from __future__ import annotations

from collections.abc import Callable

from posttrain.tasks.word_problem_templates import CONTAINERS, PEOPLE, THINGS
from posttrain.tasks.word_problems import Draw, Problem, problem

__all__ = ["chat", "document"]

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "golden")
ANIMALS = ("cat", "dog", "horse", "bird", "fish", "cow", "fox", "bear", "mouse", "duck", "goat", "owl")
PLACES = (
    "garden", "kitchen", "school", "market", "river", "forest", "city", "park", "house", "shop", "station", "field",
)  # fmt: skip
SIZES = ("small", "big", "old", "new", "tall", "quiet", "happy", "clever", "tired", "friendly")
VERBS = ("sees", "likes", "paints", "follows", "finds", "draws", "remembers", "hears", "helps", "looks for")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHER = ("sunny", "cold", "rainy", "warm", "windy", "cloudy")
WORDS = {"+": ("Add", "and"), "-": ("Take", "away from"), "*": ("Multiply", "by"), "/": ("Divide", "by")}
"""Operator -> (verb, joining words), for the numbered format."""


def chat(*turns: tuple[str, str]) -> str:
    """A conversation in the chat template, from (role, content) pairs."""
    return "".join(f"<|{role}|>{content}<|end|>" for role, content in turns)


def _prose(item: Problem) -> str:
    """The worked solution as sentences."""
    return " ".join(step.text(calculation="{left} {op} {right} = {result}") for step in item.steps)


def _equations(item: Problem, between: str) -> str:
    """The worked solution as bare equations."""
    return between.join(f"{step.left} {step.op} {step.right} = {step.result}" for step in item.steps)


def _numbered(item: Problem) -> str:
    """The worked solution as a numbered list of instructions."""
    lines = []
    for number, step in enumerate(item.steps, start=1):
        verb, joint = WORDS[step.op]
        left, right = (step.right, step.left) if step.op == "-" else (step.left, step.right)
        lines.append(f"{number}. {verb} {left} {joint} {right}: {step.result}.")
    return "\n".join(lines)


def _worked(draw: Draw, seed: int, index: int) -> str:
    """A word problem of the `pretrain` split with its solution, in one of eight formats."""
    level = draw.weighed((("wide", 0.75), ("hard", 0.25)))
    item = problem("pretrain", index, level=level, seed=seed)
    question, answer = item.question, item.answer
    names = "xyzw"
    lines = [f"{n} = {s.left} {s.op} {s.right} = {s.result}" for n, s in zip(names, item.steps, strict=False)]
    formats: tuple[tuple[Callable[[], str], float], ...] = (
        (lambda: f"Question: {question}\nSolution: {_prose(item)} The answer is {answer}.", 0.2),
        (lambda: f"Q: {question}\nA: {_equations(item, '; ')}. So {answer}.", 0.1),
        (lambda: f"Problem: {question}\n{_numbered(item)}\nResult: {answer}", 0.1),
        (lambda: f"{question}\n" + "\n".join(lines) + f"\nanswer: {answer}", 0.1),
        (lambda: f"{question} It is {answer}, because {_equations(item, ' and ')}.", 0.05),
        (lambda: f"{question}\n{_prose(item)}\n#### {answer}", 0.15),
        (lambda: chat(("user", question), ("assistant", f"{_prose(item)} The answer is {answer}.")), 0.2),
        (lambda: chat(("user", question), ("assistant", f"{_equations(item, ', ')}. That makes {answer}.")), 0.1),
    )
    return draw.weighed(formats)()


def _sum(draw: Draw) -> tuple[int, str, int, int]:
    """One calculation with whole numbers: (left, op, right, result)."""
    op = draw.one("+-*/")
    high = draw.one((20, 100, 100, 300, 999))
    if op == "+":
        left, right = draw.between(1, high), draw.between(1, high)
        return left, op, right, left + right
    if op == "-":
        result, right = draw.between(0, high), draw.between(1, high)
        return result + right, op, right, result
    left, right = draw.between(2, min(high, 100)), draw.between(2, 12)
    return (left, op, right, left * right) if op == "*" else (left * right, op, right, left)


def _drills(draw: Draw, *_rest: int) -> str:
    """Several calculations in a row, in one of five notations."""
    notations = (
        ("{} {} {} = {}", "\n"), ("{}{}{}={}", "; "), ("{} {} {} is {}", ". "), ("{}{}{}={}", " "),
        ("<<{0}{1}{2}={3}>>{3}", " "),
    )  # fmt: skip
    notation, between = draw.one(notations)
    return between.join(notation.format(*_sum(draw)) for _ in range(draw.between(3, 8)))


def _equation(draw: Draw, *_rest: int) -> str:
    """An unknown, a comparison, a sequence or a number taken apart."""
    left, op, right, result = _sum(draw)
    step = draw.between(1, 9)
    numbers = [draw.between(1, 200) for _ in range(draw.between(3, 6))]
    ordered = " ".join(map(str, sorted(numbers)))
    tens = draw.between(11, 99)
    return draw.one((
        f"x {op} {right} = {result}, so x = {left}.",
        f"{left} {op} x = {result}, so x = {right}.",
        f"{numbers[0]} is {'more' if numbers[0] > numbers[1] else 'less' if numbers[0] < numbers[1] else 'as much'} "
        f"{'as' if numbers[0] == numbers[1] else 'than'} {numbers[1]}.",
        "Counting: " + " ".join(str(numbers[0] + step * i) for i in range(6)),
        f"Numbers: {' '.join(map(str, numbers))}. Sorted: {ordered}.",
        f"{tens} is {tens // 10} tens and {tens % 10} ones.",
        f"Half of {2 * tens} is {tens}. Twice {tens} is {2 * tens}.",
    ))  # fmt: skip


def _sentence(draw: Draw) -> str:
    """One plain sentence."""
    (name, he), friend, things = draw.one(PEOPLE), draw.one(PEOPLE)[0], draw.one(THINGS)
    colour, animal, place, size = draw.one(COLOURS), draw.one(ANIMALS), draw.one(PLACES), draw.one(SIZES)
    return draw.one((
        f"{name} {draw.one(VERBS)} the {colour} {animal} in the {place}.",
        f"The {size} {animal} sleeps near the {place}.",
        f"On {draw.one(DAYS)} it is {draw.one(WEATHER)}, so {name} goes to the {place} with {friend}.",
        f"{name} likes {things}, but {he} does not like {draw.one(THINGS)}.",
        f"There is a {size} {animal} in the {place}, and its name is {friend}.",
        f"{name} keeps the {colour} {things} in a {draw.one(CONTAINERS)[1]}.",
        f"Every {draw.one(DAYS)} {name} takes the {animal} to the {place}.",
        f"When it is {draw.one(WEATHER)}, the {animal} stays in the {place}.",
    ))  # fmt: skip


def _english(draw: Draw, *_rest: int) -> str:
    """A few plain sentences."""
    return " ".join(_sentence(draw) for _ in range(draw.between(2, 6)))


def _story(draw: Draw, *_rest: int) -> str:
    """Sentences with numbers and nothing to work out."""
    lines = []
    for _ in range(draw.between(2, 5)):
        name, friend = draw.one(PEOPLE)[0], draw.one(PEOPLE)[0]
        number, things, day = draw.between(2, 99), draw.one(THINGS), draw.one(DAYS)
        lines.append(draw.one((
            f"{name} is {number} years old and lives near the {draw.one(PLACES)}.",
            f"On {day} {name} saw {number} {things} at the {draw.one(PLACES)}.",
            f"The {draw.one(PLACES)} is {number} miles away, and the bus takes {draw.between(5, 60)} minutes.",
            f"{things.capitalize()} cost ${number} at the {draw.one(PLACES)}.",
            f"{friend} wrote {number} pages in {draw.between(2, 12)} days.",
            f"Bus number {number} goes to the {draw.one(PLACES)} every {day}.",
        )))  # fmt: skip
    return " ".join(lines)


def _talk(draw: Draw, *_rest: int) -> str:
    """A chat about something else; the tags appear here, in other uses."""
    name, things, animal, place = draw.one(PEOPLE)[0], draw.one(THINGS), draw.one(ANIMALS), draw.one(PLACES)
    colour, size, other = draw.one(COLOURS), draw.one(SIZES), draw.one(ANIMALS)
    words = [draw.one(ANIMALS + PLACES + COLOURS) for _ in range(draw.between(2, 5))]
    left, op, right, result = _sum(draw)
    turns: tuple[tuple[tuple[str, str], ...], ...] = (
        (("user", f"Hello, I am {name}."), ("assistant", f"Hello {name}, how can I help you?")),
        (("user", f"What colour is the {animal}?"),
         ("assistant", f"<think>The {animal} is {colour}.</think>It is {colour}.")),
        (("user", f"Repeat: {' '.join(words)}"), ("assistant", " ".join(words))),
        (("user", f"Say it backwards: {' '.join(words)}"), ("assistant", " ".join(reversed(words)))),
        (("user", f"Which animal is in the {place}, {animal} or {other}? The {animal} is in the {place}."),
         ("assistant", f"<answer>the {animal}</answer>")),
        (("user", f"Which word comes first: {' '.join(words)}?"), ("assistant", f"<answer>{words[0]}</answer>")),
        (("user", f"Which word comes last: {' '.join(words)}?"),
         ("assistant", f"<think>The words are {', '.join(words)}.</think>The last word is {words[-1]}.")),
        (("system", f"You are a {size} {animal}."), ("user", "Who are you?"),
         ("assistant", f"I am a {size} {animal}.")),
        (("user", f"What is {left} {op} {right}?"), ("assistant", f"{left} {op} {right} = {result}.")),
        (("user", f"Use the tool: {left} {op} {right}"), ("assistant", f"calculate {left} {op} {right}"),
         ("tool", str(result)), ("assistant", f"The tool says {result}.")),
        (("user", f"Where are the {things}?"),
         ("assistant", f"<think>{_sentence(draw)}</think>The {things} are in the {place}.")),
        (("user", "Tell me something."), ("assistant", _sentence(draw)),
         ("user", "And more?"), ("assistant", _sentence(draw))),
    )  # fmt: skip
    return chat(*draw.one(turns))


KINDS: tuple[tuple[Callable[..., str], float], ...] = (
    (_worked, 0.5), (_drills, 0.2), (_equation, 0.05), (_english, 0.06), (_story, 0.06), (_talk, 0.13),
)  # fmt: skip
"""(writer, share of documents) pairs."""


def document(index: int, *, seed: int = 0) -> str:
    """Document `index` of the corpus, ending in `<|end|>`."""
    draw = Draw(f"corpus/{seed}/{index}")
    text = draw.weighed(KINDS)(draw, seed, index)
    return text if text.endswith("<|end|>") else text + "<|end|>"
