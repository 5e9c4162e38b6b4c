"""One update: counts -> read -> loss -> backward -> update.

Every denominator is counted over the whole update and all ranks before the first backward pass, so the gradient does not
depend on how the batch is cut.  Gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError, nearest
from posttrain.forward import read
from posttrain.method import Method, Optimizer, Part
from posttrain.pack import micro_batches
from posttrain.types import Batch, Readings, State, Term, View

if TYPE_CHECKING:
    from posttrain.distributed.world import World
    from posttrain.models.model import LanguageModel

Parameters = dict[str, nn.Parameter]
"""Trained parameters by full name (`policy/model.layers.0...`), in a fixed order."""


@dataclass(frozen=True)
class Ready:
    """One part's batch, credited and ready to be stepped on."""

    name: str  # "" for a plain method
    part: Part
    weight: float
    batch: Batch  # all ranks' rows
    seen: Readings  # views read once, for all rows
    state: State

    @property
    def method(self) -> Method:
        """The part's method."""
        return self.part.method

    def label(self, metric: str) -> str:
        """A metric's name: `rl/loss` in a sum, `loss` alone."""
        return f"{self.name}/{metric}" if self.name else metric


@dataclass
class Tally:
    """Sums and counts of metrics, added over micro-batches, updates and ranks, divided when read."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        """Add `total` over `count` elements."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self, world: World) -> dict[str, float]:
        """The mean of every metric over all ranks; metrics of nothing are left out."""
        if world.size > 1:
            everyone = world.all_gather_json({"sums": self.sums, "counts": self.counts})
            whole = Tally()
            for part in everyone:
                for name, total in part["sums"].items():
                    whole.add(name, total, part["counts"][name])
            return {name: whole.sums[name] / count for name, count in whole.counts.items() if count}
        return {name: self.sums[name] / count for name, count in self.counts.items() if count}


def _metric(batch: Batch, value: Tensor, live: Tensor) -> tuple[float, float]:
    """Sum and count of a metric: over trained tokens, live rows `[B]` or pairs, by its shape."""
    value = value.detach()
    if value.ndim == 2 and value.shape == batch.mask.shape:
        return float(value[batch.mask].sum()), float(batch.mask.sum())
    if value.ndim == 1 and len(value) == batch.num_rows:
        return float(value[live].sum()), float(live.sum())
    return float(value.sum()), float(value.numel())


def _on_policy_views(views: Mapping[str, View], seen: Readings) -> dict[str, str]:
    """Views that were left to the update, and the live view of the same model that gives their readings."""
    aliases = {}
    for name, view in views.items():
        if not view.once or name in seen:
            continue
        wanted = {quantity.name for quantity in view.reads}
        for other, live in views.items():
            plain = not live.once and live.model == view.model and not live.inputs and not live.embeddings
            if plain and wanted <= {quantity.name for quantity in live.reads}:
                aliases[name] = other
                break
    return aliases


def _seen(models: Mapping[str, LanguageModel], ready: Ready, batch: Batch, rows: Tensor, chunk_bytes: int | None) -> Readings:
    """All readings of a micro-batch: those made before, those of this update, and on-policy aliases of them."""
    views = ready.method.views()
    aliases = _on_policy_views(views, ready.seen)
    live = {name: view for name, view in views.items() if name not in aliases}
    seen = read(models, batch, live, given=ready.seen.rows(rows), chunk_bytes=chunk_bytes)
    for name, other in aliases.items():
        values = getattr(seen, other).values
        seen = seen.plus(name, {quantity.name: values[quantity.name].detach() for quantity in views[name].reads})
    return seen


def _counts(ready: Ready, terms: Mapping[str, Term], pieces: Sequence[Batch], world: World) -> dict[str, float]:
    """The denominator of every term over all micro-batches and ranks."""
    device = ready.batch.tokens.device
    counts = torch.zeros(len(terms), dtype=torch.float64, device=device)
    for batch in pieces:
        counts += torch.stack([term.reduce(batch)[1].to(torch.float64) for term in terms.values()])
    counts = world.all_sum(counts)
    return {name: float(count) for name, count in zip(terms, counts.tolist(), strict=True)}


def _scalar(
    ready: Ready, batch: Batch, values: Mapping[str, Tensor], counts: Mapping[str, float], tally: Tally
) -> Tensor:
    """The part of the loss that this micro-batch brings; metrics are added to `tally`."""
    terms = ready.method.terms(ready.state)
    total = batch.logprobs.new_zeros(())
    for name, term in terms.items():
        if name not in values:
            raise ConfigError(f"term '{name}' has no value in what loss returned{nearest(name, values)}")
        weights, _ = term.reduce(batch)
        if values[name].shape != weights.shape:
            found, wanted = tuple(values[name].shape), tuple(weights.shape)
            raise ConfigError(f"loss gave '{name}' the shape {found}; its reduction weighs {wanted}")
        live = weights != 0  # removed, not multiplied by zero: a masked value may be anything
        summed = (torch.where(live, values[name], 0) * weights).sum()
        if counts[name]:
            total = total + summed * (ready.weight * term.weight / counts[name])
            tally.add(ready.label(name), float(summed.detach()), 0.0)
    rows = batch.mask.any(-1)  # [B]
    for name, value in values.items():
        if name not in terms:
            tally.add(ready.label(name), *_metric(batch, value, rows))
    return total


def accumulate(
    models: Mapping[str, LanguageModel],
    ready: Ready,
    chosen: Sequence[list[int]],
    *,
    token_budget: int,
    chunk_bytes: int | None = None,
    world: World,
    tally: Tally,
) -> None:
    """Add the gradient of one part over the units `chosen` (this rank's) to the parameters' `.grad`."""
    cuts = micro_batches(ready.batch, chosen, token_budget)
    terms = ready.method.terms(ready.state)
    pieces = [ready.batch.rows(rows) for rows in cuts]  # narrow tensors only: cut once, for counts and for the loss
    counts = _counts(ready, terms, pieces, world)
    for name, count in counts.items():
        if world.rank == 0 and count:
            tally.add(ready.label(name), 0.0, count)
    for rows, batch in zip(cuts, pieces, strict=True):
        seen = _seen(models, ready, batch, rows, chunk_bytes)
        values = ready.method.loss(batch, seen, ready.state)
        total = _scalar(ready, batch, values, counts, tally)
        if total.requires_grad:
            total.backward()


def gradient_norm(parameters: Parameters) -> float:
    """The L2 norm of all gradients together, before clipping."""
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    if not grads:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))


def first_non_finite(parameters: Parameters) -> str | None:
    """The name of the first parameter whose gradient holds NaN or infinity."""
    for name, parameter in parameters.items():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return None


def learning_rate(optimizer: Optimizer, update: int, total: int) -> float:
    """The rate of update number `update` (from 0) of `total`: linear warm-up, then the schedule."""
    peak = optimizer.lr or 0.0
    warmup = optimizer.warmup if optimizer.warmup >= 1 else optimizer.warmup * total
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    done = min(1.0, (update - warmup) / max(1.0, total - warmup))
    if optimizer.schedule == "linear":
        return peak * (1 - done * (1 - optimizer.final))
    if optimizer.schedule == "cosine":
        return peak * (optimizer.final + (1 - optimizer.final) * 0.5 * (1 + math.cos(math.pi * done)))
    return peak


MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, by torch's names."""


@dataclass
class Stepper:
    """AdamW over named parameters; its moments are tensors by name, so that they save and load without pickle.

    The arithmetic is torch's fused kernel; `torch.optim.AdamW` around it costs a small step a twentieth of its time.
    """

    settings: Optimizer
    parameters: Parameters
    total: int
    updates: int = 0
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """`MOMENTS` of each parameter that had a gradient."""

    def clip_and_step(self, norm: float) -> float:
        """Clip to the settings' norm, update, clear the gradients.  Returns the learning rate used."""
        live = {name: parameter for name, parameter in self.parameters.items() if parameter.grad is not None}
        if self.settings.clip and norm > self.settings.clip:
            grads = [parameter.grad for parameter in live.values() if parameter.grad is not None]
            torch._foreach_mul_(grads, self.settings.clip / (norm + 1e-6))
        rate = learning_rate(self.settings, self.updates, self.total)
        alike: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, parameter in live.items():
            alike.setdefault((parameter.device, parameter.dtype), []).append(name)
        for names in alike.values():
            self._update(names, rate)
        self.updates += 1
        self.clear()
        return rate

    @torch.no_grad()
    def _update(self, names: Sequence[str], rate: float) -> None:
        """One step of some parameters, all on one device and of one dtype."""
        s, parameters = self.settings, [cast("Tensor", self.parameters[name]) for name in names]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        steps, means, squares = zip(*(self._moments(name) for name in names), strict=True)
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters, grads, means, squares, [], steps,
            lr=rate, beta1=s.beta1, beta2=s.beta2, weight_decay=s.weight_decay, eps=s.eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _moments(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        own = self.moments.get(name)
        if own is None:
            parameter = self.parameters[name]
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            fresh = (step, torch.zeros_like(parameter), torch.zeros_like(parameter))
            own = self.moments[name] = dict(zip(MOMENTS, fresh, strict=True))
        return own["step"], own["exp_avg"], own["exp_avg_sq"]

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The moments by parameter name."""
        return {f"{name}:{key}": self.moments[name][key] for name in self.parameters if name in self.moments for key in MOMENTS}

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """The inverse of `tensors`."""
        self.updates = updates
        for name, parameter in self.parameters.items():
            if f"{name}:{MOMENTS[0]}" in tensors:
                self.moments[name] = {key: tensors[f"{name}:{key}"].to(parameter.device) for key in MOMENTS}


@dataclass
class Outcome:
    """What an update did."""

    metrics: dict[str, float]
    skipped: str | None = None  # name of the first non-finite gradient, where the update was left out


def update(
    models: Mapping[str, LanguageModel],
    stepper: Stepper,
    work: Sequence[tuple[Ready, Sequence[list[int]]]],
    *,
    token_budget: int,
    chunk_bytes: int | None = None,
    world: World,
    tally: Tally,
) -> Outcome:
    """One optimiser step on the sum of all parts in `work`, each with the units (this rank's) to step on.

    A non-finite gradient leaves the weights as they were and is named in the outcome.
    """
    parameters = stepper.parameters
    metrics: dict[str, float] = {}
    stepper.clear()
    separate = len(work) > 1 or any(ready.part.clip is not None for ready, _ in work)
    total: dict[str, Tensor] = {}
    for ready, chosen in work:
        accumulate(models, ready, chosen, token_budget=token_budget, chunk_bytes=chunk_bytes, world=world, tally=tally)
        world.all_sum_gradients(parameters.values())
        if separate:
            norm = gradient_norm(parameters)
            metrics[ready.label("gradient_norm")] = norm
            scale = min(1.0, ready.part.clip / (norm + 1e-6)) if ready.part.clip else 1.0
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    grad = parameter.grad * scale
                    total[name] = grad if name not in total else total[name] + grad
            stepper.clear()
    if separate:
        for name, parameter in parameters.items():
            parameter.grad = total.get(name)
    norm = gradient_norm(parameters)
    only = work[0][0].label("gradient_norm") if len(work) == 1 else "gradient_norm"
    metrics.setdefault(only, norm)
    if not math.isfinite(norm):
        culprit = first_non_finite(parameters) or "the gradient norm"
        stepper.clear()
        return Outcome(metrics, skipped=culprit)
    metrics["learning_rate"] = stepper.clip_and_step(norm)
    return Outcome(metrics)


Progress = Callable[[str, int, int], None]
"""`(phase, done, total)`: told while long work goes on."""
