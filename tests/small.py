"""Whole runs that take a second: a small random model, a few rows of every kind, rewards that differ between answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.method import Method, Optimizer
from posttrain.rewards import Answer, Reward
from posttrain.run import Run
from posttrain.types import Sampling

CONTEXT = 128
"""Tokens that the small model can hold."""


def save_small_model(folder: Path, *, seed: int = 0) -> Path:
    """A random model of the embedded one's vocabulary, saved with its tokenizer."""
    from transformers import AutoTokenizer

    from posttrain import tiny
    from posttrain.models.load import save
    from posttrain.models.random import random_model

    tokenizer = AutoTokenizer.from_pretrained(str(tiny.path()))
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    ends = {"tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return save(random_model("llama", seed=seed, bos_token_id=None, **shape, **ends), tokenizer, folder)


# --------------------------------------------------------------------------------------------------------------
# Rows.


def user(text: str) -> list[dict[str, str]]:
    """A prompt of one message."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    """A completion of one message."""
    return [{"role": "assistant", "content": text}]


def demonstrations(count: int = 8) -> list[dict[str, Any]]:
    """Sums with their answers, of different lengths; every second one is marked as hard."""
    return [
        {
            "id": f"sum-{i}",
            "prompt": user(f"What is {i} + {10 ** (i % 3)}?"),
            "completion": assistant(f"It is {i + 10 ** (i % 3)}." + " Really." * (i % 4)),
            "answer": str(i + 10 ** (i % 3)),
            "hard": i % 2 == 1,
        }
        for i in range(count)
    ]


def pairs(count: int = 8) -> list[dict[str, Any]]:
    """Sums with a right and a wrong answer."""
    rows = demonstrations(count)
    return [{"id": r["id"], "prompt": r["prompt"], "chosen": r["completion"], "rejected": assistant("No idea.")} for r in rows]


def rankings(count: int = 8) -> list[dict[str, Any]]:
    """Sums with three or four answers and their order."""
    answers = [assistant("No idea."), assistant("Well."), assistant("Perhaps it is 7.")]
    return [
        {
            "id": r["id"],
            "prompt": r["prompt"],
            "responses": [*answers[: 2 + i % 2], r["completion"]],
            "ranking": [2 + i % 2, 1, 0, *([2] * (i % 2))],
        }
        for i, r in enumerate(demonstrations(count))
    ]


def stepped(count: int = 8) -> list[dict[str, Any]]:
    """Sums in three steps, of which some are wrong and one has no label."""
    return [
        {
            "id": f"steps-{i}",
            "prompt": user(f"What is {i} + 1?"),
            "steps": [f"I have {i}.", "I add 1.", f"It is {i + 1}."],
            "labels": [1, None if i == 3 else i % 2, 0.5],
        }
        for i in range(count)
    ]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------
# Rewards: functions of the text alone, so that a repeated run judges alike.


def parity(answer: Answer) -> float:
    """1 for half of all answers, as if by chance."""
    return float(sum(answer.text.encode()) % 2)


def unless_hard(answer: Answer) -> float:
    """`parity`, and 0 for every answer to a hard row."""
    return 0.0 if answer.info["hard"] else parity(answer)


def one(answer: Answer) -> float:
    """The same for all."""
    return 1.0


PARITY = Reward("parity", parity, where="inline")
UNLESS_HARD = Reward("unless_hard", unless_hard, where="inline")


# --------------------------------------------------------------------------------------------------------------
# Runs.


def small_run(method: Method, model: Path, out: Path, **changes: Any) -> Run:
    """Four steps of two rows; methods that sample write four answers of at most eight tokens and are judged by `parity`."""
    sampled = any(part.method.rows == "prompts" for part in method.parts().values())
    data = {"pairs": pairs, "rankings": rankings, "steps": stepped}.get(method.rows, demonstrations)()
    settings: dict[str, Any] = {
        "method": method,
        "model": model,
        "data": data,
        "out": out,
        "steps": 4,
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "save_every": 2,
        "sampling": Sampling(max_tokens=8),
        "optimizer": Optimizer(lr=1e-2),
        "rewards": (PARITY,) if sampled else (),
        "quiet": True,
    }
    return Run(**{**settings, **changes})


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A run's metrics, without what depends on the clock."""
    found = [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
    clock = ("time/", "tokens_per_second", "overlap/")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in found]


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of a model folder."""
    from safetensors.torch import load_file

    return {f"{file.name}:{key}": value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Are two sets of tensors equal bit for bit?"""
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
