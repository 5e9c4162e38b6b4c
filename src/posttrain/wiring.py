"""What a run is made of, built from its settings: models by name, the order of rows, sizes that are derived."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError, DataError
from posttrain.layout import Layout
from posttrain.method import Method, Optimizer
from posttrain.recall import Recall
from posttrain.samplers.native import NativeSampler
from posttrain.types import Row

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer
    from posttrain.distributed.world import World
    from posttrain.models.model import LanguageModel, Trunk
    from posttrain.run import Run
    from posttrain.samplers.vllm import VllmSampler

START = "start"
"""Name of the model that KL from the start is measured against."""


class AdaptersOff:
    """The policy with its adapters switched off, as a model of its own that costs no memory."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def trunk(self, layout: Layout, *, embeddings: Tensor | None = None, attention_layers: Sequence[int] = ()) -> Trunk:
        """As `LanguageModel.trunk`, without adapters."""
        with self._model.adapters_off():
            return self._model.trunk(layout, embeddings=embeddings, attention_layers=attention_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `LanguageModel.logits`, without adapters."""
        with self._model.adapters_off():
            return self._model.logits(hidden)


def wanted_models(method: Method) -> list[str]:
    """The models that a method's views read, in order, the policy first."""
    names = ["policy"]
    for part in method.parts().values():
        names += [view.model for view in part.method.views().values()]
    return list(dict.fromkeys(names))


def trained_models(method: Method) -> list[str]:
    """The models that learn."""
    return list(dict.fromkeys(name for part in method.parts().values() for name in part.method.trains))


def build_models(run: Run, *, recorded: Any = None) -> tuple[dict[str, LanguageModel], Any, dict[str, Any]]:
    """Load every model of a run.

    The policy is the run's `model`.  A reference (or any other frozen model) that `run.models` does not name is the start
    itself: the policy with its adapters off where these are fresh, else a copy (adapters that a run goes on with are part
    of its start).  A model that learns beside the policy (a critic) starts as the policy's copy with a head of its own, and
    with adapters of its own where the policy has fresh ones.

    Args:
        run: Whose models.
        recorded: How matrix products were computed in the part of the run that is continued.

    Returns:
        Models by name, the policy's tokenizer, and how matrix products are computed.
    """
    from posttrain.models.gemm import settle
    from posttrain.models.load import load

    def loaded(source: Any, lora: Any = None) -> tuple[LanguageModel, Any]:
        return load(source, dtype=run.dtype, lora=lora, trust_remote_code=run.trust_remote_code)

    def start() -> Any:
        return AdaptersOff(policy) if run.lora is not None else _copy_of(models, policy)

    policy, tokenizer = loaded(run.model, run.lora)
    models: dict[str, Any] = {"policy": policy}
    learning = trained_models(run.method)
    wanted = wanted_models(run.method)
    unknown = sorted(set(run.models) - set(wanted))
    if unknown:
        raise ConfigError(
            f"models names {unknown}, which {type(run.method).__name__} does not read (it reads {wanted})"
        )
    for name in wanted[1:]:
        if name in run.models:
            models[name] = loaded(run.models[name])[0]
        elif name in learning:
            models[name] = loaded(run.model, run.lora)[0]
        else:
            models[name] = start()
    if run.monitor and any(part.method.rows == "prompts" for part in run.method.parts().values()):
        models[START] = start()
    _add_heads(run, models)
    precision, record = settle(run.precision, recorded=recorded)
    if policy.device.type != "cpu" and precision == "fast":
        precision, record = "exact", {"choice": "exact"}  # the quick float32 products are the processor's
    for name, model in models.items():
        if name not in learning and not isinstance(model, AdaptersOff):
            model.module.requires_grad_(False)
            model.heads.requires_grad_(False)
        if not isinstance(model, AdaptersOff) and model.decoder is not None:
            model.use_precision(precision)
            model.use_compile(run.compile)
    if run.compile and precision == "exact":
        warnings.warn("compile has no effect: 'fast' is 'exact' here, which is never compiled; take precision=bf16", stacklevel=2)
    compiled = policy.compiled
    if recorded is not None and recorded.get("compiled", compiled) != compiled:
        here = "at hand" if compiled else "missing"
        warnings.warn(f"compiled kernels are {here}, unlike in the part of the run before: rounding differs", stacklevel=2)
    return models, tokenizer, {**record, "compiled": compiled}


def _copy_of(models: Mapping[str, LanguageModel], policy: LanguageModel) -> LanguageModel:
    """A frozen copy of the start; one is enough for all names that mean it."""
    for model in models.values():
        if getattr(model, "is_start", False):
            return model
    copy = policy.frozen_copy()
    copy.is_start = True  # type: ignore[attr-defined]
    return copy


def _add_heads(run: Run, models: Mapping[str, LanguageModel]) -> None:
    """Give a model the head that one of its views reads, where it has none yet."""
    for part in run.method.parts().values():
        for view in part.method.views().values():
            for head in {quantity.head for quantity in view.reads if quantity.head}:
                if head == "value":
                    models[view.model].add_value_head()
                elif head == "reward":
                    models[view.model].add_reward_head(seed=run.seed)
                elif head not in models[view.model].heads:
                    raise ConfigError(f"a view reads head '{head}' of '{view.model}', which has none of that name")


def build_sampler(
    run: Run, model: LanguageModel, tokenizer: Any, renderer: Renderer, world: World, stack: ExitStack
) -> NativeSampler | VllmSampler:
    """Who writes a run's answers; what it starts ends with the stack.

    Raises:
        ConfigError: The run names no sampler that there is, or one that does not go with its processes.
    """
    kind, _, url = run.sampler.partition(":")
    if kind == "native" and not url:
        return NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens)
    if kind != "vllm":
        raise ConfigError(f"sampler is '{run.sampler}'; it can be native, vllm, or vllm:http://HOST:PORT")
    if world.size > 1:
        raise ConfigError(f"sampler 'vllm' is driven by one process, and there are {world.size}; leave sampler=native")
    from posttrain.samplers.vllm import VllmSampler

    folder = Path(run.out) / "vllm"
    return stack.enter_context(VllmSampler(model, tokenizer, folder, stop_tokens=renderer.stop_tokens, url=url))


def trained_parameters(models: Mapping[str, LanguageModel], method: Method) -> dict[str, nn.Parameter]:
    """Every parameter that learns, by `model/name`, in a fixed order.

    A critic's output head and a reward model's are trained, the token head of such a model is not used and gets no gradient.
    """
    return {f"{name}/{key}": p for name in trained_models(method) for key, p in models[name].parameters().items()}


class Cursor:
    """The order in which rows are taken, and a count of rows taken: a new permutation each epoch, drawn from (seed, epoch), or as
    they stand."""

    def __init__(self, rows: Sequence[Row], seed: int, taken: int = 0, *, shuffle: bool = True) -> None:
        if not rows:
            raise DataError("a data set has no rows; expected at least one")
        self.rows = rows
        self.seed = seed
        self.taken = taken
        self.shuffle = shuffle
        self._epoch = -1
        self._order: list[int] = []

    def _at(self, number: int) -> Row:
        epoch, place = divmod(number, len(self.rows))
        if not self.shuffle:
            return self.rows[place]
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 62))
            self._order = torch.randperm(len(self.rows), generator=generator).tolist()
            self._epoch = epoch
        return self.rows[self._order[place]]

    def next(self, count: int) -> list[Row]:
        """The next `count` rows."""
        first, self.taken = self.taken, self.taken + count
        return [self._at(number) for number in range(first, first + count)]


def total_steps(run: Run) -> int:
    """Rollout steps of a run: as given, or from epochs over the first data set (at least 1)."""
    if run.steps is not None:
        return run.steps
    rows = len(next(iter(run.sets().values())))
    return max(1, round(run.epochs * rows / run.prompts_per_step))


def recalls(run: Run, steps: int) -> dict[str, Recall]:
    """A memory of frozen models' readings for every part of the method whose rows come more than once."""
    sets = run.sets()
    found = {}
    for name, part in run.method.parts().items():
        rows = sets.get(part.data or next(iter(sets)), ())
        again = part.supply is None and len(rows) < steps * run.prompts_per_step
        frozen = set(trained_models(run.method)) == set(part.method.trains)  # no other part trains what this one only reads
        if again and frozen and part.method.rows != "prompts":
            found[name] = Recall()
    return found


def derived_budget(model: LanguageModel) -> int:
    """Real tokens a forward and backward may hold.

    About 34 values of the hidden width are kept per token and layer; a processor gets 2 GB of them, a GPU a third of
    what is free.
    """
    per_token = 34 * 4 * model.hidden_size * model.num_layers
    room = 2e9
    if model.device.type == "cuda":
        room = torch.cuda.mem_get_info()[0] / 3
    return int(min(16_384 if model.device.type == "cpu" else 131_072, max(512, room / per_token)))


def derived_optimizer(run: Run, model: LanguageModel) -> Optimizer:
    """The run's optimiser with its learning rate filled in where none is given."""
    from posttrain.models.load import default_lr

    if run.optimizer.lr is not None:
        return run.optimizer
    kinds = {"prompts": "rl", "pairs": "preference", "rankings": "preference", "demonstrations": "sft", "steps": "sft"}
    first = next(iter(run.method.parts().values())).method
    return replace(run.optimizer, lr=default_lr(model.num_parameters, model.has_adapters, kinds[first.rows]))  # type: ignore[arg-type]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads inside; the number is part of a run's state, since it can change the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
