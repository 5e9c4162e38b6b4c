"""A run in progress: the models, samplers and files behind `run.train`, one method for each line of its loop."""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings as python_warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain import held_out, monitor
from posttrain.capture import captured, restore
from posttrain.data.chat import renderer_of
from posttrain.distributed.world import ALONE_SECONDS, World
from posttrain.errors import ConfigError, NumericsError
from posttrain.experience import Desk
from posttrain.files import atomic_folder, atomic_write, make_folders, run_lock
from posttrain.manifest import whole, write_manifest
from posttrain.method import Method, Part, Sum, steps_alone
from posttrain.opening import build_steppers, first_look, refuse_changed
from posttrain.pack import pack, shuffled_minibatches, units
from posttrain.recall import Recall
from posttrain.report.journal import Journal
from posttrain.report.live import Live
from posttrain.report.trackers import open_trackers
from posttrain.report.warnings import warnings_in_words
from posttrain.resolve import digest
from posttrain.rewards.runner import RewardRunner
from posttrain.samplers.native import NativeSampler
from posttrain.score import prepare, shard
from posttrain.scoring import Overlap, score_everywhere
from posttrain.state import load_state, save_state
from posttrain.step import Outcome, Ready, Stepper, Tally, update
from posttrain.types import Row, Sample, State
from posttrain.wiring import (
    START,
    Cursor,
    build_models,
    build_sampler,
    derived_budget,
    recalls,
    threads,
    total_steps,
)

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer
    from posttrain.run import Run
    from posttrain.samplers.vllm import VllmSampler


class Phases(dict[str, float]):
    """Wall seconds of one step by phase; `other` is what no phase claimed, so that they add up."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Claim the time inside the block."""
        since = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - since

    def closed(self) -> dict[str, float]:
        """All phases with `other`."""
        spent = time.perf_counter() - self._began
        return {**self, "other": max(0.0, spent - sum(self.values()))}


@dataclass
class Work:
    """One part's samples on their way through a step."""

    name: str
    part: Part
    weight: float
    samples: list[Sample]
    rows: list[Row]


@dataclass
class Session:
    """Everything that a run holds while it runs; opened by `open`, saved by `checkpoint`, closed by `finish`."""

    run: Run
    out: Path
    world: World
    models: dict[str, Any]
    tokenizer: Any
    renderer: Renderer
    sampler: NativeSampler | VllmSampler
    steppers: dict[str, Stepper]
    cursors: dict[str, Cursor]
    overlap: Overlap | None
    journal: Journal
    live: Live
    total_steps: int
    token_budget: int
    identity: Any
    products: dict[str, Any]
    step: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    recall: dict[str, Recall] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=200))
    skipped: int = 0
    saved: int = -1

    # ------------------------------------------------------------------------------------------ opening

    @classmethod
    @contextlib.contextmanager
    def open(cls, run: Run, given: World | None = None) -> Iterator[Session]:
        """Build or restore a run; the folder is locked, reward workers and files are closed at the end."""
        from posttrain.run import resolved

        out = Path(run.out)
        make_folders(out)
        with contextlib.ExitStack() as stack:
            world = given or stack.enter_context(World.here())
            if world.rank == 0:
                stack.enter_context(run_lock(out))
            settings = resolved(run)
            identity = digest({k: v for k, v in settings.items() if k not in _FREE})
            refuse_changed(out, settings, free=_FREE)
            saved = load_state(out / "state", identity=identity)
            values = saved.values if saved else {}
            count = int(values.get("threads", torch.get_num_threads()))  # type: ignore[arg-type]
            stack.enter_context(threads(count))
            models, tokenizer, products = build_models(run, recorded=values.get("products"))
            renderer = renderer_of(models["policy"], tokenizer)
            budget = run.token_budget or int(values.get("token_budget", 0)) or derived_budget(models["policy"])  # type: ignore[arg-type]
            steps = total_steps(run)
            chief = world.rank == 0
            session = cls(
                run=run,
                out=out,
                world=world,
                models=models,
                tokenizer=tokenizer,
                renderer=renderer,
                sampler=build_sampler(run, models["policy"], tokenizer, renderer, world, stack),
                steppers=build_steppers(run, models, steps),
                cursors={name: Cursor(rows, run.seed, shuffle=run.shuffle) for name, rows in run.sets().items()},
                overlap=Overlap(
                    run.rewards,
                    renderer,
                    stack.enter_context(RewardRunner(max_failure_rate=run.max_failure_rate)),
                )
                if run.rewards
                else None,
                journal=stack.enter_context(
                    Journal(
                        out if chief else out / f".rank-{world.rank}",
                        resume_step=saved.step if saved else (0 if (out / "run.json").exists() else None),
                        stage=out.name,
                        trackers=open_trackers(run.writers, out, resume_step=saved.step if saved else None)
                        if chief
                        else (),
                    )
                ),
                live=stack.enter_context(Live(out.name, steps, quiet=run.quiet or not chief)),
                total_steps=steps,
                token_budget=budget,
                identity=identity,
                products=products,
                memory=run.method.begin(),
                recall=recalls(run, steps),
            )
            if chief:
                atomic_write(out / "run.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            if saved:
                restore(session, saved)
            else:
                first_look(
                    run, renderer, models, tokenizer, tokens=budget, rates=session.rates(), steps=steps, quiet=not chief
                )
            yield session

    # ------------------------------------------------------------------------------------------ the loop

    @property
    def real(self) -> torch.dtype:
        """The dtype of a batch's real-valued tensors."""
        return torch.float64 if self.run.dtype == "float64" else torch.float32

    def rates(self) -> list[float]:
        """The peak learning rate of every optimiser."""
        return [stepper.settings.lr or 0.0 for stepper in self.steppers.values()]

    def phases(self) -> Phases:
        """A new step's clock."""
        return Phases()

    def state(self, part: str = "", rows: Sequence[Row] = ()) -> State:
        """Where the run stands, for a method; a member of a sum sees its own memory."""
        main = next(iter(self.steppers.values()))
        prefix = f"{part}/" if isinstance(self.run.method, Sum) and part else ""
        return State(
            step=self.step,
            update=main.updates,
            total_steps=self.total_steps,
            seed=self.run.seed,
            metrics=self.metrics,
            memory={k.removeprefix(prefix): v for k, v in self.memory.items() if k.startswith(prefix)},
            rows=tuple(rows),
        )

    def _desk(self, numbered: int, method: Method) -> Desk:
        run = self.run
        scoring = self.overlap if method.rows == "prompts" else None
        return Desk(
            self.renderer,
            self.sampler,
            run.sampling,
            run.samples_per_prompt,
            run.seed,
            self.step,
            self.world,
            numbered=numbered,
            done=scoring.listener() if scoring is not None else None,
        )

    def _cursor(self, part: Part) -> Cursor:
        name = part.data or next(iter(self.cursors))
        if name not in self.cursors:
            raise ConfigError(f"a part reads data set '{name}', and the run has {sorted(self.cursors)}")
        return self.cursors[name]

    def experience(self, phases: Phases) -> list[Work]:
        """Rows become samples, for every part that weighs something now."""
        work: list[Work] = []
        numbered = 0  # samples of this step so far: the key of their randomness
        for name, part in self.run.method.parts().items():
            weight = part.weight_at(self.state())
            if weight == 0:
                continue
            if part.supply is not None:
                rows = list(part.supply(self.state()))
            else:
                rows = self._cursor(part).next(self.run.prompts_per_step)
            if not rows:
                continue
            desk = self._desk(numbered, part.method)
            samples = part.method.experience(desk, rows, self.state(name, rows))
            numbered += len(samples)
            for phase, seconds in desk.seconds.items():
                phases[phase] = phases.get(phase, 0.0) + seconds
            work.append(Work(name, part, weight, samples, rows))
        return work

    def score(self, work: list[Work], phases: Phases) -> list[Work]:
        """Samples get verdicts and a reward."""
        if self.overlap is None:
            return work
        with phases.of("score"):
            for each in work:
                if each.part.method.rows == "prompts":
                    each.samples = score_everywhere(
                        self.run.rewards,
                        each.samples,
                        self.renderer,
                        runner=self.overlap.runner,
                        world=self.world,
                        values=self.run.verdicts,
                    )
        tokens = sum(len(sample) for each in work if each.part.method.rows == "prompts" for sample in each.samples)
        self.overlap.settle(num_tokens=tokens, sample_seconds=phases.get("sample", 0.0), score_seconds=phases["score"])
        return work

    def credit(self, work: list[Work], phases: Phases) -> list[Ready]:
        """Samples become batches with credit."""
        out = []
        single = self.run.updates == 1 and self.run.minibatches == 1
        together = any(not steps_alone(each.part) for each in work)
        with phases.of("credit"):
            for place, each in enumerate(work):
                method = each.part.method
                first = not steps_alone(each.part) if together else place == 0  # nothing steps before this part
                batch = pack(each.samples, seed=self.run.seed, step=self.step, dtype=self.real)
                batch = batch.to(self.models["policy"].device)
                batch, seen, state = prepare(
                    self.models,
                    method,
                    batch,
                    self.state(each.name, each.rows),
                    token_budget=self.token_budget,
                    world=self.world,
                    on_policy=single and first,
                    recall=self.recall.get(each.name),
                )
                out.append(Ready(each.name, each.part, each.weight, batch, seen, state))
        return out

    def update(self, ready: list[Ready], phases: Phases) -> dict[str, float]:
        """All optimiser steps of this batch."""
        metrics: dict[str, float] = {}
        with phases.of("monitor"):
            metrics |= monitor.watch(self.models, ready, rows=self.run.monitor, start=START)
        tally = Tally()
        live = [r for r in ready if not monitor.without_signal(r)]
        together = [r for r in live if not steps_alone(r.part)]
        alone = [r for r in live if steps_alone(r.part)]
        left_out = 0.0
        with phases.of("update"):
            for turn in range(self.run.updates):
                cuts = {r.name: self._minibatches(r, turn) for r in together}
                for number in range(max((len(c) for c in cuts.values()), default=0)):
                    members = [(r, cuts[r.name][number]) for r in together if number < len(cuts[r.name])]
                    metrics |= self._update(members, "", tally)
                    left_out += metrics["skipped_updates"]
            for r in alone:
                stepper = r.name if r.part.optimizer is not None else ""
                metrics |= self._update([(r, units(r.batch, r.method.unit))], stepper, tally)
                left_out += metrics["skipped_updates"]
        return metrics | {"skipped_updates": left_out} | tally.means(self.world)

    def _minibatches(self, ready: Ready, turn: int) -> list[list[list[int]]]:
        key = (self.run.seed * 1_000_003 + self.step) * 1_009 + turn
        generator = torch.Generator().manual_seed(key % (1 << 62))
        return shuffled_minibatches(units(ready.batch, ready.method.unit), self.run.minibatches, generator)

    def _update(self, members: list[tuple[Ready, list[list[int]]]], stepper: str, tally: Tally) -> dict[str, float]:
        outcome: Outcome = update(
            self.models,
            self.steppers[stepper],
            [(ready, shard(chosen, self.world)) for ready, chosen in members],
            token_budget=self.token_budget,
            world=self.world,
            tally=tally,
        )
        self.sampler.policy_version = sum(s.updates for s in self.steppers.values())
        if outcome.skipped is None:
            self.skipped = 0
            return outcome.metrics | {"skipped_updates": 0.0}
        self.skipped += 1
        message = f"step {self.step}: the gradient of '{outcome.skipped}' is not finite; the update is left out"
        if self.world.rank == 0:
            where = monitor.write_replay(self.out, self.step, self.skipped, members, outcome.skipped)
            message += f" ({where})"
        if self.skipped >= self.run.max_skipped:
            raise NumericsError(f"{message}; {self.skipped} updates in a row, so the run stops")
        python_warnings.warn(message, stacklevel=2)
        return outcome.metrics | {"skipped_updates": 1.0}

    def remember(self, ready: list[Ready], metrics: dict[str, float]) -> None:
        """The method's memory after this step; what is not finite is not remembered."""
        method, metrics = self.run.method, {k: v for k, v in metrics.items() if math.isfinite(v)}
        if isinstance(method, Sum):
            for each in ready:
                prefix = f"{each.name}/"
                own = {name.removeprefix(prefix): v for name, v in metrics.items() if name.startswith(prefix)}
                found = each.method.remember(replace(each.state, metrics=own), each.batch, own)
                self.memory |= {prefix + key: v for key, v in found.items()}
        elif ready:
            first = ready[0]
            state = replace(first.state, metrics=metrics, memory=self.memory)
            self.memory = method.remember(state, first.batch, metrics)

    def record(self, work: list[Work], metrics: dict[str, float], phases: Phases) -> None:
        """Write the step's numbers and a few of its samples."""
        asked = [each for each in work if each.part.method.rows == "prompts"]
        for each in work:
            sampled = each.part.method.rows == "prompts"
            name = "" if sampled and len(asked) == 1 else each.name
            metrics |= monitor.sample_metrics(each.samples, name, groups=sampled)
        tokens = sum(len(s) for each in work for s in each.samples)
        metrics["tokens_per_second"] = tokens / max(1e-9, sum(phases.closed().values()))
        metrics |= self.overlap.metrics if self.overlap is not None else {}
        self.metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        rewards = [s.reward for each in work for s in each.samples if s.reward is not None]
        self.journal.step(self.step, metrics, phases=phases.closed(), rewards=rewards)
        if self.world.rank == 0 and asked:
            self.journal.samples(self.step, [s for each in work for s in each.samples], self.renderer.decode, count=4)
        self.history.append({"step": self.step, **metrics})

    def show(self, metrics: Mapping[str, float], phases: Phases) -> None:
        """The live line, and warnings in words."""
        self.live.update(self.step - 1, metrics, phases.closed())
        if self.step % 5 == 0 or self.step == self.total_steps:
            for warning in warnings_in_words(list(self.history)):
                self.live.warn(warning)

    def evaluate(self, phases: Phases) -> None:
        """Every `evaluate_every` steps: evaluate, and keep the best weights."""
        run = self.run
        if not run.evaluate_every or self.step % run.evaluate_every:
            return
        with phases.of("evaluate"):
            found = held_out.losses(self) if run.validation else {}
            value = -held_out.criterion(found)
            if run.evaluation is not None and self.world.rank == 0:
                policy = self.models["policy"]
                outcome = run.evaluation.of(policy, self.tokenizer, self.renderer, model_name=f"step {self.step}")
                value = found["evaluation"] = outcome.headline
            if self.world.rank == 0:
                self.journal.step(self.step - 1, found)
                if value > self.best.get("value", -math.inf):
                    self.best = {"value": value, "step": float(self.step)}
                    self._save_model(self.out / "best")
            self.world.barrier("the evaluation by rank 0", timeout_seconds=ALONE_SECONDS)

    # ------------------------------------------------------------------------------------------ state

    def checkpoint(self, phases: Phases) -> None:
        """Save the whole state, when it is time."""
        every = self.run.save_every
        if every and self.step % every == 0:
            with phases.of("save"):
                if self.world.rank == 0:
                    self._save()
                self.world.barrier("a save by rank 0", timeout_seconds=ALONE_SECONDS)

    def _save(self) -> None:
        tensors, values = captured(self)
        save_state(self.out / "state", self.step, tensors, values, identity=self.identity)
        self.saved = self.step

    def _save_model(self, folder: Path) -> None:
        from posttrain.models.load import save

        with atomic_folder(folder) as partial:
            save(self.models["policy"], self.tokenizer, partial)
            write_manifest(partial, {"identity": self.identity, "step": self.step})

    def finish(self) -> tuple[Path, Path | None]:
        """Save the final weights (once) and the state; returns the folders of the last and the best model."""
        model = self.out / "model"
        if self.world.rank == 0:
            if self.saved != self.step:
                self._save()
            if not whole(model, {"identity": self.identity, "step": self.step}):
                self._save_model(model)
        self.world.barrier("the final save", timeout_seconds=ALONE_SECONDS)
        best = self.out / "best"
        return model, best if best.exists() else None


_FREE = ("out", "save_every", "quiet", "show", "writers", "evaluate_every")
"""Settings that may differ when a run goes on: they do not touch the weights."""


__all__ = ["Phases", "Session", "Work"]
