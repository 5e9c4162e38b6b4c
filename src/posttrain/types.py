"""The vocabulary: what flows through a run, with the shape of each field beside it.

Axes: `B` rows of a batch, `T` tokens of a row, `N` real tokens of a batch (packed), `n` tokens of one chunk,
`D` hidden width, `V` vocabulary, `H` attention heads, `K` steps of a chain.  Index t speaks of token t everywhere:
`logprob[b, t]` is that of `tokens[b, t]` given what stands before it.  Log-probabilities are natural, in nats.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from posttrain.errors import NotRead, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Row = Mapping[str, Any]
"""One row of data as it stands in the file: `messages`, `prompt`, `completion`, `chosen`, `answer`, ..."""


class Origin(enum.IntEnum):
    """Who wrote a token."""

    CONTEXT = 0
    TEMPLATE = 1
    SYSTEM = 2
    USER = 3
    TOOL = 4
    POLICY = 5
    DEMONSTRATION = 6
    PREFIX = 7


# --------------------------------------------------------------------------------------------------------------
# Verdicts: what a reward says of a sample.


@dataclass(frozen=True)
class Verdict:
    """What one reward says of one sample.  The first five speak of the policy, the last two of the infrastructure."""

    reason: str = field(default="", kw_only=True)
    """In words, for the report; never read by an objective."""


@dataclass(frozen=True)
class Score(Verdict):
    """The answer was judged: `value` is the reward."""

    value: float


@dataclass(frozen=True)
class Wrong(Verdict):
    """The answer was read and is wrong."""


@dataclass(frozen=True)
class Unparseable(Verdict):
    """No answer could be read."""


@dataclass(frozen=True)
class Overlong(Verdict):
    """The answer was cut off at the token limit."""


@dataclass(frozen=True)
class Crashed(Verdict):
    """The policy's own program hung or failed."""


@dataclass(frozen=True)
class InfraError(Verdict):
    """The reward itself failed (raised, returned NaN, lost its worker): retried, then the sample is masked."""


@dataclass(frozen=True)
class Timeout(InfraError):
    """The reward itself did not answer in time."""


# --------------------------------------------------------------------------------------------------------------
# Samples and batches.


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence of tokens, append-only: text is a view of it and is never tokenised again.

    Example:
        >>> sample = Sample(tokens=[5, 6, 7, 2], origin=[3, 3, 5, 5], trained=[False, False, True, True], group="q0")
        >>> sample.prompt_length, len(sample)
        (2, 4)
    """

    tokens: list[int]  # [T]
    origin: list[int]  # [T] values of Origin
    trained: list[bool]  # [T] may an objective train this token
    turn: list[int] = field(default_factory=list)  # [T] index of the message the token belongs to; [] means all 0
    logprobs: list[float] | None = None  # [T] under whoever wrote it, at its temperature; 0.0 where nobody sampled
    sampled_logprobs: list[float] | None = None  # [T] the same after top-k / top-p truncation
    group: str = ""  # samples of one prompt share it
    query: str = ""  # samples of one question share it, even when their prompts differ
    policy_version: int = -1  # weights that wrote it; -1: no policy did
    temperature: float = 1.0
    finish: str = "stop"  # "stop" | "length": did the answer end, or was it cut
    index: int = 0  # global number of the sample in its step: the `sample` of counter-based randomness
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    reward: float | None = None  # weighted sum of the verdicts; None: not scored, or masked
    info: dict[str, Any] = field(default_factory=dict)  # JSON values: the row's answer, per-reward numbers, ids
    columns: dict[str, Any] = field(default_factory=dict)  # float, or list of T floats: carried into the batch; NaN is no label

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first that was written by a policy, a demonstration or a prefix."""
        for position, origin in enumerate(self.origin):
            if origin >= Origin.POLICY:
                return position
        return len(self.tokens)

    @property
    def completion(self) -> list[int]:
        """The tokens from `prompt_length` on."""
        return self.tokens[self.prompt_length :]

    def said(self, stop_tokens: Collection[int]) -> list[int]:
        """The completion without the token that ended it, where one of `stop_tokens` did."""
        written = self.completion
        return written[:-1] if self.finish == "stop" and written and written[-1] in stop_tokens else written

    def with_(self, **changes: Any) -> Sample:
        """A copy with some fields replaced."""
        unknown = changes.keys() - self.__dict__.keys()
        if unknown:
            raise TypeError(f"a Sample has no field '{min(unknown)}'")
        copy = object.__new__(Sample)  # a rollout makes thousands: `dataclasses.replace` takes five times as long
        copy.__dict__.update(self.__dict__)
        copy.__dict__.update(changes)
        return copy


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples as rectangular tensors, right-padded.  Methods see only this; the trunk may run packed underneath.

    Rows of a pair stand together (2i chosen, 2i + 1 rejected), rows of a group too.
    """

    tokens: Tensor  # [B, T] int64
    lengths: Tensor  # [B] int64, real tokens of each row
    mask: Tensor  # [B, T] bool, tokens that are trained; never index 0, never padding
    origin: Tensor  # [B, T] int8
    turn: Tensor  # [B, T] int16
    group: Tensor  # [B] int64, equal within a group
    index: Tensor  # [B] int64, global number of the sample: key of counter-based randomness
    temperature: Tensor  # [B] float, 1 for demonstrations
    logprobs: Tensor  # [B, T] float, the writer's; 0 where nobody sampled
    sampled_logprobs: Tensor  # [B, T] float, after truncation
    rewards: Tensor  # [B] float, 0 where there is none
    truncated: Tensor  # [B] bool, cut at the token limit
    advantages: Tensor  # [B, T] float, written by credit (0 before)
    returns: Tensor  # [B, T] float, written by credit (0 before)
    columns: dict[str, Tensor] = field(default_factory=dict)  # [B, ...] named values, and model inputs beyond tokens
    seed: int = 0
    step: int = 0  # with `seed`, the other half of the randomness key
    training: bool = True  # False in evaluation: noise, smoothing and mixed inputs are off
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # see `kept`

    @property
    def num_rows(self) -> int:
        """B."""
        return int(self.tokens.shape[0])

    def with_(self, **changes: Any) -> Batch:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def with_columns(self, **columns: Tensor) -> Batch:
        """A copy with more named columns."""
        return replace(self, columns={**self.columns, **columns})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        if str(self.tokens.device) == str(device):
            return self
        moved = {name: getattr(self, name).to(device) for name in ROW_FIELDS}
        return replace(self, **moved, columns={name: value.to(device) for name, value in self.columns.items()}, memo={})

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` works out from tokens, lengths and groups alone; made once, while these are the same tensors."""
        of = (self.tokens, self.lengths, self.group)
        found = self.memo.get(key)
        if found is None or any(one is not other for one, other in zip(found[0], of, strict=True)):
            found = self.memo[key] = (of, make())
        return found[1]

    def rows(self, chosen: Tensor) -> Batch:
        """The rows of `chosen` [b] (int64 or bool), every tensor cut alike; columns ride along."""
        same = {"tokens", "lengths", "group"}  # cut once, so that what is kept of their layout holds
        key = ("rows", chosen.dtype, *chosen.tolist())
        cut, memo = self.kept(key, lambda: ({name: getattr(self, name)[chosen] for name in same}, {}))
        cut = {**cut, **{name: getattr(self, name)[chosen] for name in ROW_FIELDS if name not in same}}
        return replace(self, **cut, columns={name: value[chosen] for name, value in self.columns.items()}, memo=memo)


ROW_FIELDS = (
    "tokens",
    "lengths",
    "mask",
    "origin",
    "turn",
    "group",
    "index",
    "temperature",
    "logprobs",
    "sampled_logprobs",
    "rewards",
    "truncated",
    "advantages",
    "returns",
)
"""The tensors of a `Batch` whose first axis is B."""


@dataclass(frozen=True)
class GroupStats:
    """What is known of each group between scoring and credit; one entry a group, in order of first appearance."""

    group: Tensor  # [G] int64, values of Batch.group
    count: Tensor  # [G] int64, scored samples
    passed: Tensor  # [G] int64, samples whose reward reaches the pass mark
    mean: Tensor  # [G] float
    std: Tensor  # [G] float, population
    truncated: Tensor  # [G] int64

    @property
    def all_pass(self) -> Tensor:
        """[G] bool: every scored sample passed."""
        return (self.passed == self.count) & (self.count > 0)

    @property
    def all_fail(self) -> Tensor:
        """[G] bool: at least one sample was scored, and none passed."""
        return (self.passed == 0) & (self.count > 0)


# --------------------------------------------------------------------------------------------------------------
# What a method reads.


@dataclass(frozen=True)
class At:
    """Where a chunk of `n` tokens stands; the rows that a read's function receives are aligned with it."""

    target: Tensor  # [n] int64, the token that is predicted
    temperature: Tensor  # [n] float
    row: Tensor  # [n] int64, row in the batch
    position: Tensor  # [n] int64, t in the row
    index: Tensor  # [n] int64, global number of the sample
    seed: int
    step: int
    beside: Tensor | None = None  # [n, V] float logits of the view named by `Read.beside`, without gradients
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False)  # what several reads of one chunk share


@dataclass(frozen=True)
class Read:
    """One quantity of one forward.

    `source` says what `fn` receives and what comes out:

    - `"logits"`: `fn(logits [n, V] float, at: At) -> [n, ...]`, read for the trained tokens only (predicting token t), in
      chunks that are recomputed in the backward pass.  Zero elsewhere.  Result: `[B, T, ...]`.
    - `"hidden"`: `fn(model, hidden [n, D], at: At) -> [n, ...]`: the state *before* each trained token.  Result `[B, T, ...]`.
    - `"after"`: the same with the state *at* each trained token, which has read that token: what a verdict on the text up to
      and including token t is made from.  Result `[B, T, ...]`.
    - `"row"`: `fn(model, hidden [N, D], ends [B]) -> [B, ...]`: whole rows, by the state of their last token, `hidden[ends]`.
    - `"attention"`: `fn(probabilities [B, H, T, T], batch) -> [B, T]`, of the layer `layer` (negative counts from the end).
    """

    name: str
    source: Literal["logits", "hidden", "after", "row", "attention"]
    fn: Callable[..., Tensor]
    beside: str | None = None  # name of a view read before this one, whose logits come in `At.beside`
    layer: int = -1
    head: str = ""  # key of `model.heads` that `fn` uses; a run adds the head when the model lacks it


@dataclass(frozen=True)
class View:
    """One forward of one model."""

    model: str = "policy"  # a key of the run's models: policy, critic, reference, teacher, reward, ...
    reads: tuple[Read, ...] = ()
    once: bool = False  # True: before the first update of this batch, without gradients, and kept
    grad: bool = True  # False: read at every step, without gradients
    credit: bool = True  # False: `credit` does not look at it, so an on-policy update may take it from the live view
    inputs: Callable[[Batch, Readings], Batch] | None = None  # other tokens for the same rows
    embeddings: Callable[[Embed, Batch, Readings], Tensor] | None = None  # [B, T, D] in place of embed(tokens)


class Embed(Protocol):
    """The embedding of a model as a function, scaling included."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """`[..., ] int64 -> [..., D]`."""
        ...


@dataclass(frozen=True)
class Reading:
    """What one view read: `reading.logprob` is `[B, T]`."""

    view: str
    values: Mapping[str, Tensor]

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.values:
            return self.values[name]
        message = f"'{name}' was not read; add it to the reads of view '{self.view}'{nearest(name, self.values)}"
        raise NotRead(message)


@dataclass(frozen=True)
class Readings:
    """What all views read: `seen.policy.logprob`.

    Example (a loss is tested with literal tensors):
        >>> import torch
        >>> Readings.of(policy={"logprob": torch.zeros(1, 3)}).policy.logprob.shape
        torch.Size([1, 3])
    """

    views: Mapping[str, Reading] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Reading:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.views:
            return self.views[name]
        raise NotRead(f"no view '{name}' was declared{nearest(name, self.views)}")

    def __contains__(self, name: str) -> bool:
        return name in self.views

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    @classmethod
    def of(cls, **views: Mapping[str, Tensor]) -> Readings:
        """Readings from plain mappings of tensors."""
        return cls({name: Reading(name, values) for name, values in views.items()})

    def plus(self, name: str, values: Mapping[str, Tensor]) -> Readings:
        """A copy with one more view."""
        return Readings({**self.views, name: Reading(name, values)})

    def rows(self, chosen: Tensor) -> Readings:
        """The rows of `chosen` of every reading."""
        return Readings.of(**{v: {k: x[chosen] for k, x in r.values.items()} for v, r in self.views.items()})


Reduction = Callable[[Batch], "tuple[Tensor, Tensor]"]
"""`batch -> (weights, count)`: weights shaped like the value they reduce, and the denominator they bring (a scalar tensor).
Both come from the data alone.  The engine divides `sum(value * weights)` once by the counts summed over the optimiser step."""


@dataclass(frozen=True)
class Term:
    """How one value that `loss` returns becomes part of the scalar."""

    reduce: Reduction
    weight: float = 1.0


# --------------------------------------------------------------------------------------------------------------
# What methods are given besides tensors.


@dataclass(frozen=True, kw_only=True)
class State:
    """Where the run stands, as a method sees it; read-only."""

    step: int = 0  # rollout step (one batch of experience)
    update: int = 0  # optimiser steps done
    total_steps: int = 1
    seed: int = 0
    groups: GroupStats | None = None  # statistics of this batch's groups, once it is scored
    rows: tuple[Row, ...] = ()  # rows of data behind `groups`, one a group in its order (all ranks)
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the last step
    memory: Mapping[str, Any] = field(default_factory=dict)  # the method's own: JSON values and tensors only

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.total_steps))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """What logits are divided by."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this share of the probability; 1 turns it off."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 turns it off."""
    max_tokens: int = 64
    """Longest answer, in tokens; a task brings its own."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside the model's own stop tokens."""
    greedy: bool = False
    """Take the likeliest token always."""

    @property
    def truncated(self) -> bool:
        """Does the sampler draw from another distribution than softmax(logits / temperature)?"""
        return self.greedy or self.top_p < 1.0 or self.top_k > 0


class Sampler(Protocol):
    """Who writes tokens: the one seam to every generator."""

    policy_version: int

    def sample(
        self,
        prompts: Sequence[Sample],
        *,
        sampling: Sampling,
        seed: int,
        step: int,
        done: Callable[[Sample], None] | None = None,
    ) -> list[Sample]:
        """Continue every prompt once, in order.

        A prompt is a sample of which nothing is trained; `prompt.index` is its number in the step, and the draw of a token
        depends on `(seed, step, index, position)` alone.  Prompts with the same tokens share one prefill.  What comes back
        has the prompt's tokens first, then tokens of origin POLICY with `trained` set, `logprobs`, `finish` and
        `policy_version`.  `done` is called with each of these samples as soon as it is whole, in whatever order, by the
        thread that called.
        """
        ...


class Writer(Protocol):
    """What a method's `experience` is given: rows become samples through it."""

    def replay(self, rows: Sequence[Row]) -> list[Sample]:
        """Demonstrations as they stand, one sample a row."""
        ...

    def pairs(self, rows: Sequence[Row]) -> list[Sample]:
        """Chosen and rejected, two samples a row, in this order."""
        ...

    def rankings(self, rows: Sequence[Row]) -> list[Sample]:
        """All responses of a row as one group, best first; rows may have different numbers of them."""
        ...

    def steps(self, rows: Sequence[Row]) -> list[Sample]:
        """Worked answers, one sample a row, with the columns `step_end` and `step_label`, `[T]`.

        `step_end` is 1 at the last token of each step and 0 elsewhere; `step_label` is the label there, in [0, 1], and NaN
        elsewhere and where a step has none.
        """
        ...

    def rollout(self, rows: Sequence[Row], *, samples: int | None = None, temperature: float | None = None) -> list[Sample]:
        """The policy's own answers, `samples` a row (default: the run's), grouped by row."""
        ...
