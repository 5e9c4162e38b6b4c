"""A method is a frozen value whose fields are its hyper-parameters, and at most seven small functions.

It says what it reads (`views`), where its samples come from (`experience`), what is worked out once over the whole
batch (`credit`), and what each element costs (`loss`).  It never averages: the engine divides once, by counts summed over the
whole optimiser step and all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from posttrain.errors import ConfigError
from posttrain.formulas.reductions import token_mean
from posttrain.types import Batch, Readings, Row, Sample, State, Term, View, Writer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Method:
    """The base of every method.  Concrete methods are final frozen dataclasses and override what they need."""

    rows: ClassVar[Literal["demonstrations", "pairs", "rankings", "steps", "prompts"]] = "demonstrations"
    """What a row of data must hold: a completion to imitate, chosen and rejected, responses with their ranking, steps with
    their labels, or a prompt with what rewards need."""

    unit: ClassVar[Literal["row", "pair", "group"]] = "row"
    """Which rows of a batch the loss couples: they are never parted into different micro-batches."""

    imitates: ClassVar[bool] = True
    """Does training end answers (imitate or sample)?  Then a run refuses data whose stop token is not trained."""

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    """The models that learn: keys of the run's models."""

    least_samples: ClassVar[int] = 1
    """Samples a prompt that the method needs at least: 2 where the answers to one prompt are compared."""

    def views(self) -> dict[str, View]:
        """The forwards this method needs, by name, in the order in which they are read."""
        raise NotImplementedError(f"{type(self).__name__} declares no views")

    def experience(self, writer: Writer, rows: Sequence[Row], state: State) -> list[Sample]:
        """Rows become samples; by default demonstrations as they stand, or what `rows` says."""
        if self.rows == "pairs":
            return writer.pairs(rows)
        if self.rows == "rankings":
            return writer.rankings(rows)
        if self.rows == "steps":
            return writer.steps(rows)
        if self.rows == "prompts":
            return writer.rollout(rows)
        return writer.replay(rows)

    def credit(self, batch: Batch, seen: Readings, state: State) -> Batch:
        """What is worked out once over the whole batch (all ranks): advantages, returns, columns, a smaller mask."""
        return batch

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """One value per element, never a mean; names without a term are metrics (or columns for nobody)."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def terms(self, state: State) -> dict[str, Term]:
        """How each value of `loss` is averaged and weighed."""
        return {"loss": Term(token_mean)}

    def begin(self) -> dict[str, Any]:
        """The method's memory at the start: JSON values and tensors only."""
        return {}

    def remember(self, state: State, batch: Batch, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The memory after a step; called once a step with the credited batch and the step's metrics."""
        return dict(state.memory)

    def parts(self) -> dict[str, Part]:
        """The parts of a sum; a plain method is the one part of itself."""
        return {"": Part(method=self)}


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its schedule."""

    lr: float | None = None
    """Peak learning rate; derived from the model's size (and LoRA) when not given, and printed."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after warm-up, to `final` times the peak."""
    warmup: float = 0.0
    """Warm-up: a share of all updates when below 1, a number of updates otherwise."""
    final: float = 0.0
    """Where a linear or cosine schedule ends, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr < 0:
            raise ConfigError(f"lr is {self.lr}; expected a number >= 0")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One member of a sum: a method, how much it weighs, where its rows come from, and how it steps."""

    method: Method
    weight: float | Callable[[State], float] = 1.0
    """A number, or a controller asked before `experience`: at 0 nothing of this part is sampled or read."""
    data: str = ""
    """Name of the run's data set that feeds it; empty: the run's first."""
    supply: Callable[[State], Sequence[Row]] | None = None
    """Rows from the sum's own memory in place of a data set (a buffer of failures, say)."""
    optimizer: Optimizer | None = None
    """Its own optimiser with its own moments, which makes it step alone; None: the one that all parts share."""
    clip: float | None = None
    """Its own gradient-norm limit, applied to its gradient before it is added to the others'."""
    alone: bool = False
    """Steps by itself after the others, never in one update with them: one update a step, on the whole batch."""

    def weight_at(self, state: State) -> float:
        """The weight at this step; never negative or NaN.

        Raises:
            ConfigError: The controller returned something else.
        """
        weight = float(self.weight(state) if callable(self.weight) else self.weight)
        if not weight >= 0:
            raise ConfigError(f"the weight of a part is {weight} at step {state.step}; expected a number >= 0")
        return weight


def steps_alone(part: Part) -> bool:
    """Does a part take updates of its own, after those that the others share?"""
    return part.alone or part.optimizer is not None


@dataclass(frozen=True, kw_only=True)
class Sum(Method):
    """A weighted sum of methods, each with its own views, data, denominators and metrics (prefixed by its name).

    Example:
        >>> from posttrain.methods import GRPO, SFT
        >>> mixed = Sum(members={"rl": Part(method=GRPO()), "sft": Part(method=SFT(), weight=0.1, data="demonstrations")})
        >>> sorted(mixed.parts())
        ['rl', 'sft']
    """

    members: dict[str, Part]
    """The parts by name."""

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("a Sum has no members; give at least one Part")
        for name, part in self.members.items():
            if list(part.method.parts()) != [""]:
                kind = type(part.method).__name__
                raise ConfigError(f"member '{name}' is a {kind}, which has parts of its own; a Sum takes plain methods")

    def views(self) -> dict[str, View]:
        """A sum reads nothing itself; its parts do."""
        return {}

    def loss(self, batch: Batch, seen: Readings, state: State) -> dict[str, Tensor]:
        """A sum costs nothing itself; its parts do."""
        return {}

    def terms(self, state: State) -> dict[str, Term]:
        """A sum has no term of its own."""
        return {}

    def begin(self) -> dict[str, Any]:
        """The members' memories, each key behind its member's name."""
        return {f"{name}/{key}": v for name, part in self.members.items() for key, v in part.method.begin().items()}

    def parts(self) -> dict[str, Part]:
        """The members."""
        return dict(self.members)


def settings(method: Method) -> dict[str, Any]:
    """A method's hyper-parameters by name, as plain values."""
    return {f.name: getattr(method, f.name) for f in fields(method)}
