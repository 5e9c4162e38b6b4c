"""The sampler that ships: the trainer's own weights, a static cache, and rows that are refilled as they finish.

```
prompts --prefill (each distinct one once)--> first tokens --step, draw, step, draw--> samples, in the prompts' order
                     ^                                             |
                     +------------ a slot is free <----------------+
```

A draw depends on `(seed, step, index, position)` and on the row's logits alone: the order of prompts, their number and
the number of slots change nothing but the last digits of the logits, and with `exact=True` not even these.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.errors import ConfigError, NumericsError
from posttrain.random import SAMPLER, uniform
from posttrain.samplers.answer import StopStrings, extended, refuse_empty, room_behind
from posttrain.samplers.cache import CachedStepper, Prefix, RereadingStepper, Stepper
from posttrain.samplers.compiled_step import CompiledStepper, can_step
from posttrain.samplers.draw import Drawn, check, draw
from posttrain.samplers.graphs import GraphStepper, recorder_of
from posttrain.types import Sample, Sampling

if TYPE_CHECKING:
    from posttrain.models.model import LanguageModel

EXACT_WIDTH = 16
"""Rows of every step when `exact`, whatever `max_batch` is."""
EXACT_CONTEXT = 4096
"""The longest context that `exact` reads in every step without being told to."""
AHEAD = 1024
"""Tokens of prompts that are read in one pass, those of waiting rows included: prefill is not one row at a time."""
BLOCK = 64
"""Positions whose uniform numbers are worked out at once."""


@dataclass
class NativeSampler:
    """Writes tokens with the model that is being trained, so that its weights are always the newest.

    Llama, Mistral, Qwen2, Qwen3 and Gemma run through their own forward with a static cache.  Where the model's precision
    is "fast" or "bf16", a call keeps its weights as oneDNN wants them; otherwise nothing is copied.  On a GPU their steps are
    replayed as CUDA graphs.  Every other model reads each row again at every step: the same samples, slowly.

    Example:
        >>> from posttrain.models.random import random_model
        >>> from posttrain.types import Sample, Sampling
        >>> sampler = NativeSampler(random_model(), None, stop_tokens=(2,), max_batch=8)
        >>> prompt = Sample(tokens=[1, 5, 6], origin=[3, 3, 3], trained=[False] * 3)
        >>> answer, = sampler.sample([prompt], sampling=Sampling(max_tokens=4), seed=0, step=0)
        >>> answer.tokens[:3], len(answer.logprobs) == len(answer.tokens)
        ([1, 5, 6], True)
    """

    model: LanguageModel
    tokenizer: Any
    """Only stop strings need it: anything with `decode`."""
    stop_tokens: tuple[int, ...] = field(kw_only=True)
    """Tokens that end an answer; they are kept, and trained."""
    max_batch: int = field(default=64, kw_only=True)
    """Rows that are written at once."""
    exact: bool = field(default=False, kw_only=True)
    """Bit-equal samples in every composition, order and `max_batch`: prompts are read one at a time, and every step has
    `EXACT_WIDTH` rows and all columns of the context, idle ones included.  Slower; for tests and for finding faults."""
    max_context: int | None = field(default=None, kw_only=True)
    """Tokens of prompt and answer together; None: what the model was made for."""
    policy_version: int = field(default=0, kw_only=True)
    """Written into every sample; set by the run after every update."""
    progress: Callable[[int, int], None] | None = field(default=None, kw_only=True)
    """Called with (answers that are done, all answers) whenever one ends."""

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ConfigError(f"max_batch is {self.max_batch}, but at least one row must be written at a time")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self.max_context is not None and limit is not None and self.max_context > limit:
            raise ConfigError(f"max_context is {self.max_context}, but the model was made for {limit} tokens")
        self.context: int | None = self.max_context or limit  # tokens of a row
        self.graphs_failed = False  # on this GPU; see `graphs`
        if self.exact and self.model.decoder is not None and (self.context or EXACT_CONTEXT + 1) > EXACT_CONTEXT:
            raise ConfigError(
                f"exact=True reads the whole context in every step, and this model's has {self.context} tokens; "
                f"set max_context to what the answers need, at most {EXACT_CONTEXT}"
            )

    def sample(
        self,
        prompts: Sequence[Sample],
        *,
        sampling: Sampling,
        seed: int,
        step: int,
        done: Callable[[Sample], None] | None = None,
    ) -> list[Sample]:
        """Continue every prompt once, in order; see `types.Sampler`.

        A prompt that leaves no room in the context comes back as it is, with finish "length", and a warning.

        Raises:
            ConfigError: `sampling` cannot be honoured.
            DataError: A prompt is empty.
            NumericsError: The model's logits are not finite.
        """
        check(sampling)
        refuse_empty(prompts)
        if not prompts:
            return []
        with torch.no_grad(), _without_dropout(self.model):
            return _Call(self, prompts, sampling, seed, step, done).run()


@contextmanager
def _without_dropout(model: LanguageModel) -> Iterator[None]:
    """Dropout off, and back to what it was."""
    before = model.module.training
    if before:
        model.dropout(False)
    try:
        yield
    finally:
        if before:
            model.dropout(True)


@dataclass
class _Row:
    """One answer that is being written."""

    number: int  # place of its prompt
    prompt: Sample
    room: int  # tokens it may have
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    length: int = 0  # tokens of prompt and answer

    def __post_init__(self) -> None:
        self.length = len(self.prompt.tokens)


class _Call:
    """One call of `sample`: what waits, what is being written, what is done.

    Axes: `S` slots, `B` of them in use (the first B; all S when exact), `m` rows of one admission.
    """

    def __init__(
        self,
        sampler: NativeSampler,
        prompts: Sequence[Sample],
        sampling: Sampling,
        seed: int,
        step: int,
        tell: Callable[[Sample], None] | None,
    ) -> None:
        self.sampler, self.prompts, self.sampling, self.seed, self.step = sampler, prompts, sampling, seed, step
        self.tell = tell
        self.device = sampler.model.device
        self.stop_tokens = frozenset(sampler.stop_tokens)
        self.stop_strings = StopStrings(sampler.tokenizer, sampling.stop)
        self.done: list[Sample | None] = [None] * len(prompts)
        self.num_done = 0
        self.keys = [tuple(prompt.tokens) for prompt in prompts]
        most, context = sampling.max_tokens, sampler.context
        self.rooms = [room_behind(len(key), max_tokens=most, context=context) for key in self.keys]
        self.waiting: deque[int] = deque(self._queue())
        self.left = Counter(self.keys[number] for number in self.waiting)  # rows that still need a prefix
        self.read: dict[tuple[int, ...], Prefix] = {}
        self.slots = EXACT_WIDTH if sampler.exact else min(sampler.max_batch, max(1, len(self.waiting)))
        self.rows: list[_Row | None] = [None] * self.slots
        self.num_live = self.used = 0  # used: B
        self.next_token = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        self.position = torch.zeros_like(self.next_token)  # of `next_token`
        self.live = torch.zeros_like(self.next_token)  # 1 where a row is written, 0 where a slot idles
        self.index = torch.zeros_like(self.next_token)
        self.uniforms = torch.zeros(self.slots, BLOCK, dtype=torch.float64, device=self.device)
        self.column = BLOCK  # of `uniforms`, for the next draw
        self.stepper = self._stepper()
        self.draw = self.stepper.draw if isinstance(self.stepper, CompiledStepper | GraphStepper) else draw

    def _queue(self) -> list[int]:
        """Numbers of the prompts with room, those with the same tokens side by side; the others are done."""
        full = [number for number, room in enumerate(self.rooms) if room < 1]
        if full:
            found = f"{len(full)} of {len(self.prompts)} prompts fill the context of {self.sampler.context} tokens"
            warnings.warn(f"{found} and come back without an answer; shorten them, or drop their rows", stacklevel=5)
        for number in full:
            self._finish(_Row(number, self.prompts[number], 0), "length")
        first: dict[tuple[int, ...], int] = {}
        for number, key in enumerate(self.keys):
            first.setdefault(key, number)
        return sorted((n for n in range(len(self.keys)) if self.rooms[n] > 0), key=lambda n: (first[self.keys[n]], n))

    def _stepper(self) -> Stepper:
        sampler, model = self.sampler, self.sampler.model
        longest = max((len(self.keys[number]) + self.rooms[number] for number in self.waiting), default=1)
        if model.decoder is None:
            return RereadingStepper(model, slots=self.slots, longest=longest, alone=sampler.exact)
        if sampler.exact:
            assert sampler.context is not None
            longest = columns = sampler.context
        else:
            columns = max((len(self.keys[number]) for number in self.waiting), default=1) + BLOCK
        if not sampler.exact and can_step(model):
            return CompiledStepper(model, slots=self.slots, longest=longest, columns=columns)
        make = None if sampler.exact or sampler.graphs_failed else recorder_of(model)
        if make is not None:
            return GraphStepper(model, slots=self.slots, longest=longest, columns=columns, make=make)
        return CachedStepper(model, slots=self.slots, longest=longest, columns=columns, fixed=sampler.exact)

    def run(self) -> list[Sample]:
        """All answers, in the order of the prompts."""
        while True:
            self._refill()
            if not self.num_live:
                break
            self._advance()
        if isinstance(self.stepper, GraphStepper):
            self.sampler.graphs_failed = self.stepper.failed
        return [sample for sample in self.done if sample is not None]

    # ------------------------------------------------------------------------------------------ rows come and go

    def _refill(self) -> None:
        """Start as many waiting rows as there are free slots, then close the gaps that remain."""
        if self.num_live == self.used and not (self.waiting and self.num_live < self.slots):
            return
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        while self.waiting and free:
            numbers = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
            begun, uniforms = self._begin(numbers)
            slots, free = free[: len(begun)], free[len(begun) :]
            self._seat(slots, begun, uniforms)
        if self.sampler.exact:
            self.used = self.slots
        else:
            self._close_gaps()

    def _begin(self, numbers: Sequence[int]) -> tuple[list[tuple[_Row, Prefix]], Tensor | None]:
        """Draw the first token of some rows from their prompts' prefill.

        Returns:
            Those `m` that do not end with it, and `[m, BLOCK]` uniform numbers of their next draws (None when greedy).
        """
        prefixes = [
            self._prefix(self.keys[number], chain(numbers[place + 1 :], self.waiting)) for place, number in enumerate(numbers)
        ]
        rows = [_Row(number, self.prompts[number], self.rooms[number]) for number in numbers]
        logits = torch.stack([prefix.logits for prefix in prefixes])  # [m, V]
        uniforms = None
        if not self.sampling.greedy:
            index = torch.tensor([row.prompt.index for row in rows], device=self.device)
            lengths = torch.tensor([len(prefix.tokens) for prefix in prefixes], device=self.device)
            uniforms = self._numbers(index, lengths, 1 + BLOCK)
        found = _on_host(draw(logits, None if uniforms is None else uniforms[:, 0], self.sampling))
        ended = [self._take(row, *values) for row, values in zip(rows, found, strict=True)]
        left = [place for place, end in enumerate(ended) if not end]
        following = None if uniforms is None else uniforms[left, 1:]
        return [(rows[place], prefixes[place]) for place in left], following

    def _prefix(self, key: tuple[int, ...], others: Iterable[int]) -> Prefix:
        """What a row starts from; kept until the last row with these tokens has it.

        A prompt that was not read yet is read together with those of the rows `others` that fit into `AHEAD` tokens.
        """
        if key not in self.read:
            chosen: dict[tuple[int, ...], None] = {key: None}
            total = len(key)
            for number in () if self.sampler.exact else islice(others, 4 * self.slots):
                other = self.keys[number]
                if other in self.read or other in chosen:
                    continue
                total += len(other)
                if total > AHEAD:
                    break
                chosen[other] = None
            self.read.update(zip(chosen, self.stepper.prefill(list(chosen)), strict=True))
        prefix = self.read[key]
        self.left[key] -= 1
        if not self.left[key]:
            del self.read[key]
        return prefix

    def _seat(self, slots: Sequence[int], begun: Sequence[tuple[_Row, Prefix]], uniforms: Tensor | None) -> None:
        """Give rows their slots."""
        if not begun:
            return
        same: dict[int, list[int]] = {}
        for place, (slot, (row, prefix)) in enumerate(zip(slots, begun, strict=True)):
            self.rows[slot] = row
            same.setdefault(id(prefix), []).append(place)
        at = torch.tensor(slots, device=self.device)  # [m]
        for places in same.values():
            self.stepper.admit(at[places], begun[places[0]][1])
        rows = [row for row, _ in begun]
        self.next_token[at] = torch.tensor([row.tokens[-1] for row in rows], device=self.device)
        self.position[at] = torch.tensor([row.length - 1 for row in rows], device=self.device)
        self.index[at] = torch.tensor([row.prompt.index for row in rows], device=self.device)
        self.live[at] = 1
        if uniforms is not None:
            self.column = self.column if self.num_live else 0
            self.uniforms[at, self.column :] = uniforms[:, : BLOCK - self.column]
        self.num_live += len(rows)

    def _close_gaps(self) -> None:
        """Move the last rows into free slots before them, so that a step is as wide as there are rows."""
        living = [slot for slot, row in enumerate(self.rows) if row is not None]
        self.used = len(living)
        source = [slot for slot in living if slot >= self.used]
        target = [slot for slot in range(self.used) if self.rows[slot] is None]
        if not source:
            return
        longest = 0
        for old, new in zip(source, target, strict=True):
            row = self.rows[new] = self.rows[old]
            self.rows[old] = None
            longest = max(longest, row.length if row else 0)
        there, here = torch.tensor(source, device=self.device), torch.tensor(target, device=self.device)
        self.stepper.move(there, here, longest)
        for values in (self.next_token, self.position, self.index, self.live, self.uniforms):
            values[here] = values[there]

    # ------------------------------------------------------------------------------------------ one step

    def _advance(self) -> None:
        """One token for every row."""
        used = self.used
        tokens, position = self.next_token[:used], self.position[:used]
        longest = max(row.length for row in self.rows[:used] if row is not None)
        logits = self.stepper.step(tokens, position, longest)  # [B, V]
        drawn = self.draw(logits, self._uniforms(used), self.sampling)
        tokens.copy_(drawn.tokens)
        position.add_(self.live[:used])
        gone = []
        for slot, values in enumerate(_on_host(drawn)):
            row = self.rows[slot]
            if row is not None and self._take(row, *values):
                self.rows[slot] = None
                gone.append(slot)
        if gone:
            self.num_live -= len(gone)
            at = torch.tensor(gone, device=self.device)
            for state in (self.next_token, self.position, self.live):
                state[at] = 0

    def _uniforms(self, used: int) -> Tensor | None:
        """`[B]` float64 for the tokens that are drawn now."""
        if self.sampling.greedy:
            return None
        if self.column == BLOCK:
            self.column = 0
            self.uniforms[:used] = self._numbers(self.index[:used], self.position[:used] + 1, BLOCK)
        self.column += 1
        return self.uniforms[:used, self.column - 1]

    def _numbers(self, index: Tensor, position: Tensor, count: int) -> Tensor:
        """`[m, count]`: the uniform numbers of some rows' draws, from `position` [m] on."""
        places = position[:, None] + torch.arange(count, device=self.device)
        return uniform(self.seed, self.step, index[:, None], places, stream=SAMPLER)

    def _take(self, row: _Row, token: int, logprob: float, sampled_logprob: float) -> bool:
        """Put one token behind a row; True when the row ends with it."""
        if token < 0:
            raise NumericsError(
                f"the logits of prompt {row.number} (group '{row.prompt.group}') are not finite at token {row.length}, "
                f"policy version {self.sampler.policy_version}: the weights are broken, perhaps by a high learning rate"
            )
        row.tokens.append(token)
        row.logprobs.append(logprob)
        row.sampled_logprobs.append(sampled_logprob)
        row.length += 1
        if token in self.stop_tokens or (self.stop_strings and self.stop_strings.ended(row.prompt.tokens, row.tokens)):
            self._finish(row, "stop")
            return True
        if len(row.tokens) >= row.room:
            self._finish(row, "length")
            return True
        return False

    def _finish(self, row: _Row, finish: str) -> None:
        """A row is done."""
        self.done[row.number] = answer = extended(
            row.prompt,
            row.tokens,
            logprobs=row.logprobs,
            sampled_logprobs=row.sampled_logprobs,
            finish=finish,
            temperature=1.0 if self.sampling.greedy else self.sampling.temperature,
            policy_version=self.sampler.policy_version,
        )
        self.num_done += 1
        if self.tell is not None:
            self.tell(answer)
        if self.sampler.progress is not None:
            self.sampler.progress(self.num_done, len(self.prompts))


def _on_host(drawn: Drawn) -> Iterator[tuple[int, float, float]]:
    """Token and log-probabilities of each row as Python numbers, fetched from the device at once."""
    fetched = drawn[:2] if drawn.sampled_logprobs is drawn.logprobs else drawn
    tokens, logprobs, *truncated = torch.stack([values.double() for values in fetched]).tolist()
    return zip(map(int, tokens), logprobs, truncated[0] if truncated else logprobs, strict=True)


__all__ = ["AHEAD", "EXACT_CONTEXT", "EXACT_WIDTH", "NativeSampler"]
