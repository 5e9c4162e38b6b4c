"""The sentences of the word problems: names, things, fixed templates and the pieces of chained stories.

A template is text with holes. `{a}`, `{b}`, `{d}`, `{e}`, `{f}` are the numbers it draws, `{N}`, `{F}`, `{G}` are three
people, `{He} {he} {him} {his}` speak of `{N}`, `{T}` are things, `{U}` other things, `{C}` containers and `{c}` one of
them. Each step is written `x = a * b | sentence`, where `#` in the sentence is the place of the calculation. A step may
use every number drawn and the result of every earlier step; the last result is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

PEOPLE: tuple[tuple[str, str], ...] = (
    ("Mia", "she"), ("Anna", "she"), ("Lucy", "she"), ("Sara", "she"), ("Emma", "she"), ("Nora", "she"),
    ("Ruth", "she"), ("Lily", "she"), ("Jane", "she"), ("Rosa", "she"), ("Tom", "he"), ("Ben", "he"),
    ("Sam", "he"), ("Max", "he"), ("Leo", "he"), ("Jack", "he"), ("Omar", "he"), ("Paul", "he"),
    ("Ivan", "he"), ("Noah", "he"),
)  # fmt: skip
"""Names and their pronouns."""

PRONOUNS: dict[str, tuple[str, str]] = {"she": ("her", "her"), "he": ("him", "his")}
"""Pronoun -> (him, his)."""

THINGS: tuple[str, ...] = (
    "apples", "pens", "books", "cards", "stickers", "marbles", "coins", "eggs", "shells", "stamps", "beads",
    "cookies", "balloons", "buttons", "cups", "flowers", "pencils", "toys", "oranges", "plums", "stones", "nuts",
    "candles", "keys",
)  # fmt: skip

CONTAINERS: tuple[tuple[str, str], ...] = (
    ("boxes", "box"), ("bags", "bag"), ("baskets", "basket"), ("jars", "jar"), ("drawers", "drawer"), ("trays", "tray"),
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """One kind of problem: which numbers it draws, how it is asked, how it is worked out."""

    name: str
    """Part of the key that decides the split."""
    numbers: tuple[tuple[str, str], ...]
    """(hole, kind of range) pairs, for instance `("a", "big")`; the ranges are the level's."""
    wordings: tuple[str, ...]
    """Questions that mean the same."""
    steps: tuple[tuple[str, str, str, str, str], ...]
    """(result, left, operator, right, sentence) of each step; left and right are holes, results or literal numbers."""


@dataclass(frozen=True)
class Event:
    """One thing that happens in a chained story."""

    op: str
    kind: str
    wordings: tuple[str, ...]
    sentence: str


def template(name: str, numbers: str, wordings: list[str], steps: list[str]) -> Template:
    """Parse the short notation below into a `Template`."""
    parsed = []
    for line in steps:
        formula, sentence = line.split(" | ")
        result, _, left, op, right = formula.split()
        parsed.append((result, left, op, right, sentence))
    pairs = tuple((hole, kind) for hole, kind in (word.split(":") for word in numbers.split()))
    return Template(name=name, numbers=pairs, wordings=tuple(wordings), steps=tuple(parsed))


ONE_STEP: tuple[Template, ...] = (
    template("more-than", "a:big b:big",
             ["{N} has {a} {T}. {F} has {b} more {T} than {N}. How many {T} does {F} have?",
              "{F} has {b} more {T} than {N}, who has {a}. How many {T} does {F} have?"],
             ["x = a + b | {F} has # {T}."]),
    template("fewer-than", "a:big b:big",
             ["{N} has {a} {T}. {F} has {b} fewer {T} than {N}. How many {T} does {F} have?",
              "{F} has {b} fewer {T} than {N}, who has {a}. How many {T} does {F} have?"],
             ["x = a - b | {F} has # {T}."]),
    template("times-as-many", "a:big b:small",
             ["{N} has {a} {T}. {F} has {b} times as many. How many {T} does {F} have?",
              "{F} has {b} times as many {T} as {N}, who has {a}. How many {T} does {F} have?"],
             ["x = a * b | {F} has # {T}."]),
    template("groups", "a:small b:big",
             ["{N} has {a} {C} with {b} {T} in each {c}. How many {T} does {N} have?",
              "There are {b} {T} in each {c}. {N} has {a} {C}. How many {T} is that?"],
             ["x = a * b | There are # {T}."]),
    template("share", "a:big b:small",
             ["{N} shares {a} {T} equally among {b} friends. How many {T} does each friend get?",
              "{b} friends share {a} {T} equally. How many {T} does each friend get?"],
             ["x = a / b | Each friend gets # {T}."]),
    template("price", "a:big b:small",
             ["{N} buys {a} {T} for ${b} each. How much does {he} pay?",
              "At a shop {T} cost ${b} each. How much do {a} {T} cost?"],
             ["x = a * b | The {T} cost $#."]),
    template("older", "a:big b:small",
             ["{N} is {a} years old. {F} is {b} years older. How old is {F}?"],
             ["x = a + b | {F} is # years old."]),
    template("distance", "a:big b:small",
             ["{N} drives {a} miles an hour for {b} hours. How far does {he} go?",
              "A train goes {a} miles an hour. How far does it go in {b} hours?"],
             ["x = a * b | The distance is # miles."]),
)  # fmt: skip

TWO_STEPS: tuple[Template, ...] = (
    template("buy-change", "a:small b:small c:huge",
             ["{N} buys {a} {T} for ${b} each. {He} pays with ${c}. How much change does {he} get?",
              "{T} cost ${b} each. {N} has ${c} and buys {a} {T}. How much money is left?"],
             ["x = a * b | The {T} cost $#.", "y = c - x | {N} has $# left."]),
    template("more-total", "a:big b:big",
             ["{N} has {a} {T}. {F} has {b} more {T} than {N}. How many {T} do they have together?",
              "{F} has {b} more {T} than {N}. {N} has {a}. How many {T} do the two have in all?"],
             ["x = a + b | {F} has # {T}.", "y = a + x | Together they have # {T}."]),
    template("fewer-total", "a:big b:big",
             ["{N} has {a} {T}. {F} has {b} fewer {T} than {N}. How many {T} do they have together?",
              "{F} has {b} fewer {T} than {N}. {N} has {a}. How many {T} do the two have in all?"],
             ["x = a - b | {F} has # {T}.", "y = a + x | Together they have # {T}."]),
    template("times-total", "a:big b:small",
             ["{N} has {a} {T}. {F} has {b} times as many. How many {T} do they have together?",
              "{N} found {a} {T} and {F} found {b} times as many. How many did they find in all?"],
             ["x = a * b | {F} has # {T}.", "y = a + x | Together they have # {T}."]),
    template("times-more", "a:big b:small",
             ["{N} has {a} {T}. {F} has {b} times as many. How many more {T} does {F} have than {N}?"],
             ["x = a * b | {F} has # {T}.", "y = x - a | {F} has # more {T}."]),
    template("groups-left", "a:small b:big d:big",
             ["{N} has {a} {C} with {b} {T} in each {c}. {He} gives away {d} {T}. How many {T} are left?",
              "There are {b} {T} in each of {a} {C}. {N} takes {d} {T} away. How many {T} are left?"],
             ["x = a * b | There are # {T}.", "y = x - d | Then # {T} are left."]),
    template("eat-share", "a:big b:big d:small",
             ["{N} picks {a} {T} and sells {b}. {He} shares the rest equally among {d} friends. How many {T} does each "
              "friend get?",
              "{N} had {a} {T} and lost {b}. {d} friends share the rest equally. How many {T} does each friend get?"],
             ["x = a - b | Then # {T} are left.", "y = x / d | Each friend gets # {T}."]),
    template("pool-share", "a:big b:big d:small",
             ["{N} has {a} {T} and {F} has {b}. They put all {T} equally into {d} {C}. How many {T} are in each {c}?"],
             ["x = a + b | Together they have # {T}.", "y = x / d | Each {c} has # {T}."]),
    template("pages-left", "a:small b:small d:huge",
             ["{N} reads {a} pages a day for {b} days. The book has {d} pages. How many pages are left?",
              "A book has {d} pages. {N} reads {a} pages each day. How many pages are left after {b} days?"],
             ["x = a * b | {N} reads # pages.", "y = d - x | Then # pages are left."]),
    template("two-days-wage", "a:small b:small d:small",
             ["{N} earns ${a} an hour. {He} works {b} hours on Monday and {d} hours on Friday. How much does {he} "
              "earn?"],
             ["x = b + d | {N} works # hours.", "y = x * a | {N} earns $#."]),
    template("earn-spend", "a:small b:small d:big",
             ["{N} earns ${a} a day for {b} days and spends ${d}. How much money is left?",
              "{N} saves ${a} a week for {b} weeks. Then {he} buys a gift for ${d}. How much money is left?"],
             ["x = a * b | {N} earns $#.", "y = x - d | {N} has $# left."]),
    template("half-total", "a:big",
             ["{N} sold {a} {T} in April and half as many in May. How many {T} did {he} sell in all?",
              "{N} has {a} {T}. {F} has half as many. How many {T} do they have together?"],
             ["x = a / 2 | Half of that is # {T}.", "y = a + x | In all it is # {T}."]),
    template("unit-price", "a:huge b:small d:small",
             ["{b} {T} cost ${a}. How much do {d} {T} cost?", "{N} pays ${a} for {b} {T}. What do {d} {T} cost?"],
             ["x = a / b | One costs $#.", "y = x * d | {d} {T} cost $#."]),
    template("age-later", "a:big b:small d:small",
             ["{N} is {a} years old. {F} is {b} years older. How old will {F} be in {d} years?",
              "{F} is {b} years older than {N}, who is {a}. How old will {F} be in {d} years?"],
             ["x = a + b | {F} is # years old.", "y = x + d | Then {F} is # years old."]),
    template("age-before", "a:big b:small d:small",
             ["{N} is {a} years old. {F} is {b} times as old. How old was {F} {d} years ago?"],
             ["x = a * b | {F} is # years old.", "y = x - d | Then {F} was # years old."]),
    template("drive-walk", "a:big b:small d:big",
             ["{N} drives {a} miles an hour for {b} hours and then {d} more miles. How far does {he} go?",
              "A bus goes {a} miles an hour for {b} hours. Then it goes {d} more miles. How far is that?"],
             ["x = a * b | The distance is # miles.", "y = x + d | In all it is # miles."]),
    template("pages-days", "a:huge b:big d:small",
             ["A book has {a} pages. {N} has read {b}. {He} reads {d} pages a day. How many days does the rest take?"],
             ["x = a - b | Then # pages are left.", "y = x / d | It takes # days."]),
)  # fmt: skip

THREE_STEPS: tuple[Template, ...] = (
    template("two-prices", "a:small b:small d:small e:small",
             ["{N} buys {a} {T} for ${b} each and {d} {U} for ${e} each. How much does {he} pay in all?",
              "{T} cost ${b} each and {U} cost ${e} each. How much do {a} {T} and {d} {U} cost?"],
             ["x = a * b | The {T} cost $#.", "y = d * e | The {U} cost $#.", "z = x + y | In all it is $#."]),
    template("two-rates", "a:small b:small d:small e:small",
             ["{N} walks {a} miles a day for {b} days and {d} miles a day for {e} days. How far does {he} walk?"],
             ["x = a * b | First {he} walks # miles.", "y = d * e | Then {he} walks # miles.",
              "z = x + y | In all it is # miles."]),
    template("wage-spend", "a:small b:small d:small e:big",
             ["{N} earns ${a} an hour. {He} works {b} hours on Monday and {d} on Friday. {He} spends ${e}. How much is "
              "left?"],
             ["x = b + d | {N} works # hours.", "y = x * a | {N} earns $#.", "z = y - e | {N} has $# left."]),
    template("groups-add-share", "a:small b:small d:big e:small",
             ["{N} has {a} {C} with {b} {T} in each. {He} finds {d} more and shares all equally among {e} friends. "
              "How many {T} does each friend get?"],
             ["x = a * b | There are # {T}.", "y = x + d | Then there are # {T}.",
              "z = y / e | Each friend gets # {T}."]),
    template("groups-left-share", "a:small b:big d:big e:small",
             ["{N} has {a} {C} with {b} {T} in each. {He} sells {d} and shares the rest equally among {e} friends. "
              "How many {T} does each friend get?"],
             ["x = a * b | There are # {T}.", "y = x - d | Then # {T} are left.",
              "z = y / e | Each friend gets # {T}."]),
    template("half-total-left", "a:big d:big",
             ["{N} made {a} {T} in April and half as many in May. {He} sold {d}. How many {T} are left?"],
             ["x = a / 2 | Half of that is # {T}.", "y = a + x | In all it is # {T}.",
              "z = y - d | Then # {T} are left."]),
    template("unit-price-change", "a:big b:small d:small e:huge",
             ["{b} {T} cost ${a}. {N} buys {d} {T} and pays with ${e}. How much change does {he} get?"],
             ["x = a / b | One costs $#.", "y = x * d | {d} {T} cost $#.", "z = e - y | {N} has $# left."]),
    template("times-total-share", "a:big b:small d:small",
             ["{N} has {a} {T}. {F} has {b} times as many. They put all {T} equally into {d} {C}. How many {T} are in "
              "each {c}?"],
             ["x = a * b | {F} has # {T}.", "y = a + x | Together they have # {T}.",
              "z = y / d | Each {c} has # {T}."]),
    template("more-total-left", "a:big b:big d:big",
             ["{N} has {a} {T}. {F} has {b} more than {N}. Together they sell {d}. How many {T} are left?"],
             ["x = a + b | {F} has # {T}.", "y = a + x | Together they have # {T}.",
              "z = y - d | Then # {T} are left."]),
    template("fewer-total-price", "a:small b:small d:small",
             ["{N} has {a} {T}. {F} has {b} fewer than {N}. They sell all {T} for ${d} each. How much money do they "
              "get?"],
             ["x = a - b | {F} has # {T}.", "y = a + x | Together they have # {T}.", "z = y * d | The {T} cost $#."]),
    template("profit", "a:small b:small d:small",
             ["{N} buys {a} {T} for ${b} each and sells them for ${d} each. How much money does {he} make?"],
             ["x = a * b | The {T} cost $#.", "y = a * d | {N} gets $#.", "z = y - x | {N} makes $#."]),
    template("three-people", "a:big b:big d:small",
             ["{N} has {a} {T}. {F} has {b} more than {N}. {G} has {d} times as many as {F}. How many {T} do {F} and "
              "{G} have together?"],
             ["x = a + b | {F} has # {T}.", "y = x * d | {G} has # {T}.", "z = x + y | Together they have # {T}."]),
)  # fmt: skip

FOUR_STEPS: tuple[Template, ...] = (
    template("two-prices-change", "a:small b:small d:small e:small f:huge",
             ["{N} buys {a} {T} for ${b} each and {d} {U} for ${e} each. {He} pays with ${f}. How much change does "
              "{he} get?"],
             ["x = a * b | The {T} cost $#.", "y = d * e | The {U} cost $#.", "z = x + y | In all it is $#.",
              "w = f - z | {N} has $# left."]),
    template("three-people-all", "a:big b:big d:small",
             ["{N} has {a} {T}. {F} has {b} more than {N}. {G} has {d} times as many as {F}. How many {T} do the three "
              "have in all?"],
             ["x = a + b | {F} has # {T}.", "y = x * d | {G} has # {T}.", "z = a + x | Together they have # {T}.",
              "w = z + y | In all it is # {T}."]),
    template("half-left-share", "a:big d:big e:small",
             ["{N} made {a} {T} in April and half as many in May. {He} sold {d} and shared the rest equally among {e} "
              "friends. How many {T} did each friend get?"],
             ["x = a / 2 | Half of that is # {T}.", "y = a + x | In all it is # {T}.",
              "z = y - d | Then # {T} are left.", "w = z / e | Each friend gets # {T}."]),
)  # fmt: skip

FIXED: dict[int, tuple[Template, ...]] = {1: ONE_STEP, 2: TWO_STEPS, 3: THREE_STEPS, 4: FOUR_STEPS}
"""Number of steps -> templates with that many."""

OPENINGS: tuple[str, ...] = ("{N} has {a} {T}.", "{N} starts with {a} {T}.", "There are {a} {T} on {N}'s table.")

EVENTS: tuple[Event, ...] = (
    Event("+", "big", ("{He} buys {v} more.", "{He} finds {v} more {T}.", "{F} gives {him} {v} {T}.",
                       "Then {he} gets {v} more from {F}."), "Then there are # {T}."),
    Event("-", "big", ("{He} gives {v} to {F}.", "{He} loses {v} {T}.", "{He} sells {v} of them.",
                       "{F} takes {v} {T}."), "Then # {T} are left."),
    Event("*", "small", ("Then {he} gets enough to have {v} times as many.",
                         "A week later {he} has {v} times as many."), "Now {N} has # {T}."),
    Event("/", "small", ("{He} puts them equally into {v} {C} and keeps one {c}.",
                         "{He} splits them into {v} equal parts and keeps one part."), "One part is # {T}."),
)  # fmt: skip
"""Events of chained stories; in one, `x` is what there was before and `v` the event's number."""

CLOSINGS: tuple[str, ...] = ("How many {T} does {he} have now?", "How many {T} does {N} have in the end?")
