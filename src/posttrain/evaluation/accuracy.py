"""Accuracy of a model on a task: one greedy answer a question, and k sampled ones where asked.

accuracy          share of questions whose greedy answer is right (Wilson interval)
parsed            share of greedy answers that could be read
accuracy_parsed   accuracy among those
mean@k            mean over questions of the share of k sampled answers that are right (interval over questions, from 5 on)
pass@k            chance that one of k is right, unbiased (Chen et al., "Evaluating Large Language Models Trained on Code",
                  arXiv 2107.03374, equation 1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError
from posttrain.evaluation.examiner import entry
from posttrain.experience import row_identity
from posttrain.report.statistics import Interval, pass_at_k_interval, proportion_interval, share_interval
from posttrain.types import InfraError, Overlong, Row, Sample, Sampler, Sampling, Unparseable

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer
    from posttrain.rewards.reward import Reward


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found."""

    numbers: list[dict[str, Any]]
    """Entries of `summary.json`'s `evaluations`: model, task, split, n, metric, value, low, high (None: no interval)."""
    records: list[dict[str, Any]]
    """One a question: id, prompt, completion, reward, right, parsed (could the answer be read), answer, sampled_right (k)."""
    curves: list[dict[str, Any]] = field(default_factory=list)
    """What is better looked at than read: see `evaluation.examiner.curve`."""

    @property
    def headline(self) -> float:
        """The first number's value: greedy accuracy."""
        return float(self.numbers[0]["value"])


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, and how."""

    task: str
    """Name of the task, for the summary."""
    rows: Sequence[Row]
    """The questions."""
    rewards: tuple[Reward, ...]
    """What judges an answer; it is right when its reward reaches `pass_mark`."""
    split: str = "test"
    """Name of the split, for the summary."""
    samples: int = 0
    """k: sampled answers to each question beside the greedy one; 0 leaves them out."""
    temperature: float = 1.0
    """Of the sampled answers."""
    max_tokens: int = 64
    """Longest answer."""
    verdicts: Mapping[str, float] = field(default_factory=dict)
    """Numbers of verdicts that differ from 0."""
    pass_mark: float = 1.0
    """The reward from which an answer is right."""
    seed: int = 0
    """Of the sampled answers."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError(f"evaluation of '{self.task}' has no questions; give at least one row")

    def of(
        self,
        model: Any,
        tokenizer: Any,
        renderer: Renderer,
        *,
        model_name: str = "",
        sampler: Sampler | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Outcome:
        """Evaluate a model.

        Args:
            model: A `LanguageModel`; not looked at when `sampler` is given.
            tokenizer: Its tokenizer.
            renderer: Turns rows into prompts and tokens into text.
            model_name: How it is called in the summary: "base" or a stage's name.
            sampler: Writes the answers; by default the native one over `model`.
            progress: Told `(answers done, answers in all)`.
        """
        from posttrain.rewards.runner import RewardRunner
        from posttrain.samplers.native import NativeSampler

        write = sampler or NativeSampler(model, tokenizer, stop_tokens=renderer.stop_tokens, progress=progress)
        greedy = self._answers(write, renderer, Sampling(greedy=True, max_tokens=self.max_tokens), copies=1)
        drawn: list[Sample] = []
        if self.samples:
            sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens)
            drawn = self._answers(write, renderer, sampling, copies=self.samples)
        with RewardRunner(max_failure_rate=1.0) as runner:
            from posttrain.rewards.judging import score

            scored = score(
                self.rewards,
                [*greedy, *drawn],
                renderer.decode,
                runner=runner,
                values=self.verdicts,
                stop_tokens=renderer.stop_tokens,
            )[0]
        return self._outcome(scored[: len(greedy)], scored[len(greedy) :], renderer, model_name)

    def _answers(self, sampler: Sampler, renderer: Renderer, sampling: Sampling, *, copies: int) -> list[Sample]:
        prompts = []
        for number, row in enumerate(self.rows):
            prompt = renderer.prompt(row["prompt"], row.get("tools"))
            info = {key: value for key, value in row.items() if key not in ("prompt", "completion", "messages")}
            prompt = replace(prompt, group=str(number), query=row_identity(row, number), info=info)
            prompts += [replace(prompt, index=number * copies + copy) for copy in range(copies)]
        return sampler.sample(prompts, sampling=sampling, seed=self.seed, step=0)

    def _outcome(self, greedy: Sequence[Sample], drawn: Sequence[Sample], renderer: Renderer, name: str) -> Outcome:
        right = [self._right(sample) for sample in greedy]
        read = [_read(sample) for sample in greedy]
        n = len(greedy)
        found: dict[str, tuple[int, Interval]] = {
            "accuracy": (n, proportion_interval(sum(right), n)),
            "parsed": (n, proportion_interval(sum(read), n)),
        }
        if any(read):
            among = [ok for ok, parsed in zip(right, read, strict=True) if parsed]
            found["accuracy_parsed"] = (len(among), proportion_interval(sum(among), len(among)))
        k = self.samples
        tries = [[self._right(s) for s in drawn[q * k : (q + 1) * k]] for q in range(n)] if k else []
        if k:
            found[f"mean@{k}"] = (n, share_interval([sum(t) / k for t in tries]))
            found[f"pass@{k}"] = (n, pass_at_k_interval([(k, sum(t)) for t in tries], k))
        numbers = [entry(name, self.task, self.split, metric, count, interval) for metric, (count, interval) in found.items()]
        records = [
            {
                "kind": "evaluation",
                "model": name,
                "id": sample.query,
                "prompt": renderer.decode(sample.tokens[: sample.prompt_length]),
                "completion": renderer.decode(sample.completion),
                "reward": sample.reward,
                "right": bool(right[q]),
                "parsed": bool(read[q]),
                "answer": sample.info.get("answer"),
                "finish": sample.finish,
                "sampled_right": [int(ok) for ok in tries[q]] if k else None,
            }
            for q, sample in enumerate(greedy)
        ]
        return Outcome(numbers, records)

    def _right(self, sample: Sample) -> bool:
        return sample.reward is not None and sample.reward >= self.pass_mark - 1e-9


def _read(sample: Sample) -> bool:
    """Could the answer be read at all?"""
    return not any(isinstance(verdict, (Unparseable, Overlong, InfraError)) for verdict in sample.verdicts.values())
