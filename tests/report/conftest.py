"""A run folder with made-up numbers, shaped like a real one: base -> demonstrations -> reinforcement learning."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from posttrain.report.journal import Journal
from posttrain.report.statistics import clustered_interval, proportion_interval
from posttrain.report.summary import write_summary
from posttrain.types import Origin, Sample, Score, Unparseable

HOSTILE = "<script>alert('x')</script><img src=\"https://evil.example/p.png\" onerror=alert(1)>"
RECIPE = """name: word-problems
seed: 0
model: tiny
api_key: do-not-show-me
stages:
  - cold-start: {kind: train, method: SFT, data: demonstrations, steps: 60, learning_rate: 1.0e-3}
  - grpo: {kind: train, method: GRPO, start: cold-start, steps: 240, prompts: 16, samples: 8, kl: 0.0}
"""
PROBLEMS = 200


def decode(tokens: list[int]) -> str:
    """A stand-in for a tokenizer: a token is a character."""
    return "".join(chr(token) for token in tokens)


def sample(prompt: str, completion: str, reward: float, *, index: int = 0, finish: str = "stop") -> Sample:
    tokens = [ord(letter) for letter in prompt + completion]
    origin = [int(Origin.USER)] * len(prompt) + [int(Origin.POLICY)] * len(completion)
    verdict = Score(reward) if reward else Unparseable(reason="no answer line")
    return Sample(
        tokens=tokens,
        origin=origin,
        trained=[o == Origin.POLICY for o in origin],
        group=f"q{index // 4}",
        index=index,
        finish=finish,
        reward=reward,
        verdicts={"exact": verdict},
    )


def demonstrations(folder: Path, steps: int) -> None:
    noise = random.Random(1)
    with Journal(folder, resume_step=None) as journal:
        for step in range(steps):
            done = step / steps
            metrics = {
                "loss": 0.35 + 1.9 * math.exp(-5 * done) + noise.gauss(0, 0.03),
                "gradient_norm": 0.8 + 1.5 * math.exp(-4 * done) + abs(noise.gauss(0, 0.1)),
                "learning_rate": 1e-3 * min(1, (step + 1) / 5) * (1 - 0.9 * done),
                "tokens_per_second": 9300 + noise.gauss(0, 200),
            }
            journal.step(step, metrics, phases={"read": 0.05, "update": 0.41 + noise.random() / 50, "other": 0.021})


def reinforcement(folder: Path, steps: int) -> None:
    noise = random.Random(2)
    with Journal(folder, resume_step=None) as journal:
        for step in range(steps):
            done = step / steps
            skill = 0.22 + 0.45 * (1 - math.exp(-3 * done))
            rewards, groups = [], []
            for group in range(16):
                chance = min(1.0, max(0.0, noise.gauss(skill, 0.28)))
                rewards += [1.0 if noise.random() < chance else 0.1 * (noise.random() < 0.8) for _ in range(8)]
                groups += [group] * 8
            found = clustered_interval(rewards, groups)
            equal = [len(set(rewards[8 * g : 8 * g + 8])) == 1 for g in range(16)]
            metrics = {
                "reward": found.value,
                "reward_low": found.low,
                "reward_high": found.high,
                "loss": noise.gauss(0, 0.01),
                "kl": 0.06 * done + abs(noise.gauss(0, 0.002)),
                "entropy": 0.62 - 0.33 * done + noise.gauss(0, 0.02),
                "length": 34 + 9 * done + noise.gauss(0, 1.2),
                "truncated": max(0.0, 0.06 - 0.05 * done + noise.gauss(0, 0.01)),
                "signal": 1 - sum(equal) / 16,
                "parsed": min(1.0, 0.9 + 0.08 * done),
                "clip_fraction": 0.012 + abs(noise.gauss(0, 0.004)),
                "gradient_norm": 0.5 + abs(noise.gauss(0, 0.1)) if step != 77 else float("nan"),
                "skipped_updates": 1 if step == 77 else 0,
                "learning_rate": 2e-4,
                "tokens_per_second": 4100 + noise.gauss(0, 150),
                "grpo/advantage_std": 0.9 + noise.gauss(0, 0.02),
            }
            phases = {"sample": 0.6, "score": 0.03, "read": 0.11, "update": 0.27 + noise.random() / 30, "other": 0.017}
            journal.step(step, metrics, phases=phases, rewards=rewards)
            if step % 20 == 0:
                texts = [
                    sample("Tom has 3 apples.", f" 3 + {i} = {3 + i}\nAnswer: {3 + i}", rewards[i], index=i)
                    for i in range(8)
                ]
                journal.samples(step, texts, decode, count=4)


def evaluations(folder: Path) -> list[dict[str, object]]:
    """Per-question answers of three models, and the summary's entries about them."""
    noise = random.Random(3)
    hardness = [noise.random() for _ in range(PROBLEMS)]
    found: list[dict[str, object]] = []
    (folder / "evaluations").mkdir()
    for model, skill in (("base", 0.03), ("cold-start", 0.3), ("grpo", 0.64)):
        lines = []
        for number, hard in enumerate(hardness):
            right = noise.random() < max(0.0, min(1.0, skill + (0.5 - hard) * 0.8 * (skill > 0.1)))
            pens, boxes = number % 7 + 2, number % 9 + 3
            prompt = (
                f"Mia has {boxes} boxes with {pens} pens each. She gives {pens} pens to Ben. How many pens are left?"
            )
            answer = boxes * pens - pens
            said = answer if right else answer + 1 + number % 5
            steps = f"{boxes} * {pens} = {boxes * pens}\n{boxes * pens} - {pens} = {said}"
            worked = f"<think>\n{steps}\n</think>\nAnswer: {said}<|end|>"
            text = (
                worked
                if model != "base"
                else f"Mia went to the shop and bought {said} more pens, and then the pens were"
            )
            if number == 0:
                text += HOSTILE
            lines.append(
                {"kind": "evaluation", "model": model, "id": f"test-{number:04d}", "prompt": prompt, "completion": text}
                | {"reward": float(right), "answer": str(answer)}
            )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "evaluations" / f"{model}.jsonl").write_text(text)
        right = sum(int(line["reward"]) for line in lines)
        interval = proportion_interval(right, PROBLEMS)
        common = {"model": model, "task": "word_problems", "split": "test", "n": PROBLEMS}
        found.append(
            common | {"metric": "accuracy", "value": interval.value, "low": interval.low, "high": interval.high}
        )
        wide = min(1.0, 2.1 * interval.value)
        found.append(common | {"metric": "pass@8", "value": wide, "low": wide - 0.04, "high": min(1.0, wide + 0.04)})
    return found


def write_run(folder: Path) -> Path:
    """A finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    demonstrations(folder / "cold-start", 60)
    reinforcement(folder / "grpo", 240)
    (folder / "recipe.yaml").write_text(RECIPE)
    stages = [
        {
            "name": "cold-start",
            "kind": "train",
            "method": "SFT",
            "artifact": "cold-start/model",
            "seconds": 29.4,
            "metrics": {"loss": 0.36},
        },
        {
            "name": "grpo",
            "kind": "train",
            "method": "GRPO",
            "artifact": "grpo/model",
            "seconds": 251.0,
            "metrics": {"reward": 0.64},
        },
        {"name": "test", "kind": "evaluate", "method": None, "artifact": "evaluations", "seconds": 41.7, "metrics": {}},
    ]
    versions = {"posttrain": "0.1.0", "python": "3.11.9", "torch": "2.11.0", "transformers": "5.17.0"}
    write_summary(
        folder, name="word-problems", seed=0, versions=versions, stages=stages, evaluations=evaluations(folder)
    )
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be read and not changed."""
    return write_run(tmp_path_factory.mktemp("runs") / "word-problems")
