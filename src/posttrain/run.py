"""A run is a frozen value, and `train` is the main path on one page.

rows --experience--> samples --score--> batch with credit --loss--> values per element --step--> new weights
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.allocator import keep_freed_memory
from posttrain.errors import ConfigError
from posttrain.method import Method, Optimizer
from posttrain.types import Row, Sampling

if TYPE_CHECKING:
    from posttrain.distributed.world import World
    from posttrain.evaluation.accuracy import Evaluation
    from posttrain.models.lora import Lora
    from posttrain.rewards.reward import Reward


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training stage: what learns, from what, how much, and where the results go."""

    method: Method
    """The objective; its fields are its hyper-parameters."""
    model: str | Path = "tiny"
    """The start: 'tiny', 'smollm2', a Hugging Face folder, a hub name, or another stage's output."""
    data: Sequence[Row] | Mapping[str, Sequence[Row]]
    """Rows, or named sets of rows where a sum's parts read different ones; the first feeds the method."""
    out: str | Path
    """The run folder; running again continues there."""
    rewards: tuple[Reward, ...] = ()
    """What scores samples, for methods that sample."""
    verdicts: Mapping[str, float] = field(default_factory=dict)
    """Numbers of verdicts that differ from 0, for instance {"Wrong": -1.0}; a task brings its own."""
    models: Mapping[str, str | Path] = field(default_factory=dict)
    """Other models by name (reference, critic, reward, teacher); a reference left out is the start itself."""
    steps: int | None = None
    """Rollout steps (batches of experience); left out, it follows from `epochs`."""
    epochs: float = 1.0
    """Passes over the rows, where `steps` is not given."""
    prompts_per_step: int = 8
    """Rows a step, over all ranks."""
    shuffle: bool = True
    """Take the rows in an order that is drawn anew each epoch; otherwise as they stand, a curriculum say."""
    samples_per_prompt: int = 8
    """Answers to each prompt, for methods that sample."""
    updates: int = 1
    """Passes over each batch (PPO's epochs)."""
    minibatches: int = 1
    """Cuts of each pass; every cut is one optimiser step."""
    sampling: Sampling = field(default_factory=Sampling)
    """How answers are drawn."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """AdamW and its schedule."""
    lora: Lora | None = None
    """Train an adapter instead of all weights (extra 'peft')."""
    seed: int = 0
    """Of everything that is drawn."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the weights and the arithmetic."""
    sampler: str = "native"
    """Who writes answers: 'native', 'vllm' (a server is started) or 'vllm:URL' (one that serves OUT/vllm/weights)."""
    precision: Literal["exact", "fast", "bf16"] = "exact"
    """Matrix products: 'exact' as torch does them, 'fast' float32 on the quickest back end, 'bf16' with float32 weights."""
    compile: bool = False
    """Compile what stands before and after attention by torch.compile, in precisions 'fast' and 'bf16', without LoRA."""
    token_budget: int = 0
    """Real tokens a forward may hold; 0 derives it from the model's size and the device."""
    max_length: int = 0
    """Longest row allowed, in tokens; 0 is the model's context.  Longer rows are an error, never cut."""
    save_every: int = 20
    """Steps between saves of the whole state; 0 saves at the end only."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 never."""
    evaluation: Evaluation | None = None
    """What `evaluate_every` evaluates; the best checkpoint by it is kept as `best`."""
    validation: Sequence[Row] = ()
    """Rows on which `evaluate_every` reads the loss, for methods that do not sample."""
    max_failure_rate: float = 0.2
    """Share of recent samples whose rewards may fail (infrastructure, not policy) before the run stops."""
    max_skipped: int = 5
    """Updates in a row that may be left out for non-finite gradients before the run stops."""
    monitor: int = 8
    """Samples a step on which KL from the start, entropy and the sampler's logprob gap are watched; 0 turns it off."""
    show: int = 3
    """Rendered samples printed before step 1."""
    writers: tuple[str, ...] = ()
    """More writers of metrics: 'tensorboard', 'wandb' (extras of those names)."""
    quiet: bool = False
    """No progress display."""
    trust_remote_code: bool = False
    """Run code that comes with a model's folder; off unless you have read it."""

    def __post_init__(self) -> None:
        positive = ("prompts_per_step", "samples_per_prompt", "updates", "minibatches")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; expected at least 1 (leave it out to go by epochs)")
        if self.steps is None and self.epochs <= 0:
            raise ConfigError(f"epochs is {self.epochs}; expected more than 0")
        if not self.sets():
            raise ConfigError("data names no set of rows; expected rows, or at least one named set")
        if self.evaluate_every and self.evaluation is None and not self.validation:
            found = f"evaluate_every is {self.evaluate_every} and there is nothing to evaluate"
            raise ConfigError(f"{found}; give an evaluation (a task has one) or validation rows")
        imitated = any(part.method.rows != "prompts" for part in self.method.parts().values())
        if self.evaluate_every and self.evaluation is None and not imitated:
            name = type(self.method).__name__
            raise ConfigError(f"{name} samples, so validation rows have no loss; give an evaluation (a task has one)")
        if self.compile and self.precision == "exact":
            raise ConfigError("compile=true and precision is 'exact', which stays torch's own arithmetic; add precision=bf16")
        if self.compile and self.lora is not None:
            raise ConfigError("compile=true and LoRA: the compiled layers know plain linear layers alone; leave one of the two out")
        if self.lora is not None and self.lora.dropout:
            raise ConfigError(f"lora.dropout is {self.lora.dropout}, and runs train without dropout; leave it out")
        object.__setattr__(self, "rewards", tuple(self.rewards))
        sampled = [part.method for part in self.method.parts().values() if part.method.rows == "prompts"]
        if sampled and not self.rewards:
            name = type(sampled[0]).__name__
            raise ConfigError(
                f"{name} learns from rewards and the run has none; give a task, or --reward file.py:function"
            )
        if len(sampled) == 0 and self.rewards:
            raise ConfigError(
                f"{type(self.method).__name__} does not sample, so rewards have no effect; leave them out"
            )
        for method in sampled:
            least = getattr(method, "least_samples", 1)
            if self.samples_per_prompt < least:
                raise ConfigError(
                    f"{type(method).__name__} compares the answers to one prompt: samples_per_prompt is "
                    f"{self.samples_per_prompt}, expected at least {least}"
                )

    def sets(self) -> dict[str, Sequence[Row]]:
        """The data sets by name; a plain list of rows is called 'data'."""
        return dict(self.data) if isinstance(self.data, Mapping) else {"data": self.data}


@dataclass(frozen=True)
class Result:
    """What a training stage left behind."""

    model: Path
    """The final weights, a Hugging Face folder."""
    best: Path | None
    """The best checkpoint by the run's evaluation, where there was one."""
    steps: int
    seconds: float
    metrics: dict[str, float]
    """Of the last step."""


def train(run: Run, *, world: World | None = None) -> Result:
    """Train, resuming where an interrupted run of the same folder stopped.

    Args:
        run: What to do.
        world: The ranks; by default those that the environment describes (torchrun), or this process alone.

    Raises:
        PosttrainError: What cannot be honoured is refused before step 1; see `errors`.
    """
    from posttrain.session import Session

    keep_freed_memory()
    began = time.perf_counter()
    with Session.open(run, world) as session:
        while session.step < session.total_steps:
            phases = session.phases()
            samples = session.experience(phases)
            samples = session.score(samples, phases)
            ready = session.credit(samples, phases)
            metrics = session.update(ready, phases)
            session.remember(ready, metrics)
            session.record(samples, metrics, phases)
            session.step += 1
            session.evaluate(phases)
            session.checkpoint(phases)
            session.show(metrics, phases)
        folder, best = session.finish()
        return Result(folder, best, session.step, time.perf_counter() - began, dict(session.metrics))


def resolved(run: Run) -> dict[str, Any]:
    """The run as JSON values: what is saved beside the results, and what a checkpoint is checked against."""
    from posttrain.resolve import digest, plain

    values = {
        name: getattr(run, name)
        for name in run.__dataclass_fields__
        if name not in ("data", "validation", "evaluation")
    }
    values["rows"] = {
        name: {"count": len(rows), "sha256": digest(plain(list(rows)))} for name, rows in run.sets().items()
    }
    return plain(values)


__all__ = ["Result", "Run", "replace", "resolved", "train"]
