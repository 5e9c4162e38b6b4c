"""Supervised fine-tuning in plain PyTorch: 100 worked answers teach the embedded base model the answer format.

    python examples/plain_sft.py --out /tmp/cold-start

Nothing of the library is used but the model folder, the task's rows and its verifier, so that it can be read alone and
serve as an independent check of the library's own SFT. The loss is completion-only and token-mean:

    L = - (1/N) sum_{b,t} m[b,t] log p(token[b,t] | tokens[b,<t]),   N = sum m

where m marks what the assistant writes, its closing `<|end|>` included, and N counts the whole step. One division.
Shapes: B sequences, T tokens, V vocabulary. Index t speaks of token t.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import tiny
from posttrain.tasks.word_problems import rows, verify
from posttrain.types import Score, Unparseable

Row = dict[str, Any]
Batch = dict[str, Tensor]


def load(folder: Path) -> tuple[Any, Any]:
    """Model in fp32 and tokenizer from a Hugging Face folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def collate(examples: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    """(prompt tokens, completion tokens) pairs -> rectangles `[B, T]`, padded on the right."""
    length = max(len(prompt) + len(completion) for prompt, completion in examples)
    tokens = torch.full((len(examples), length), pad)
    mask = torch.zeros(len(examples), length, dtype=torch.bool)
    real = torch.zeros(len(examples), length, dtype=torch.bool)
    for b, (prompt, completion) in enumerate(examples):
        end = len(prompt) + len(completion)
        tokens[b, :end] = torch.tensor(prompt + completion)
        mask[b, len(prompt) : end] = True
        real[b, :end] = True
    return {"tokens": tokens, "mask": mask, "real": real}


def token_logprobs(model: Any, batch: Batch) -> Tensor:
    """Log-probability `[B, T]` of each token given those before it; 0 for the first, which has none."""
    logits = model(input_ids=batch["tokens"], attention_mask=batch["real"].long()).logits.float()  # [B, T, V]
    logprobs = logits[:, :-1].log_softmax(-1)  # position t-1 speaks of token t
    chosen = logprobs.gather(-1, batch["tokens"][:, 1:, None]).squeeze(-1)  # [B, T-1]
    return torch.cat((torch.zeros_like(chosen[:, :1]), chosen), dim=1)


def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The token-mean loss of one whole step, and the log-probabilities `[B, T]` it came from."""
    logprobs = token_logprobs(model, batch)
    return -logprobs[batch["mask"]].sum() / batch["mask"].sum(), logprobs


def prompt_tokens(tokenizer: Any, row: Row) -> list[int]:
    """The prompt, ready for the assistant to go on."""
    return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]


def demonstration(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """A row as (prompt tokens, completion tokens), from one rendering of the whole conversation."""
    tokens = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    prompt = prompt_tokens(tokenizer, row)
    assert tokens[: len(prompt)] == prompt
    return prompt, tokens[len(prompt) :]


@torch.no_grad()
def sample(
    model: Any, prompts: list[list[int]], *, max_tokens: int, pad: int, end: int, draws: torch.Generator | None = None
) -> list[list[int]]:
    """Complete each prompt with a KV cache: greedily, or at temperature 1 where `draws` is given."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])  # padded on the left: [B, T]
    real = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    inputs, positions, cache = tokens, (real.cumsum(1) - 1).clamp(min=0), None
    written: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_tokens):
        out = model(
            input_ids=inputs, attention_mask=real, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()  # [B, V]
        new = logits.argmax(-1) if draws is None else torch.multinomial(logits.softmax(-1), 1, generator=draws)[:, 0]
        written.append(new)
        done |= new == end
        if bool(done.all()):
            break
        inputs, positions = new[:, None], positions[:, -1:] + 1
        real = torch.cat((real, torch.ones_like(real[:, :1])), dim=1)
    completions = torch.stack(written, dim=1).tolist()  # [B, new tokens]
    return [row[: row.index(end) + 1] if end in row else row for row in completions]


def evaluate(model: Any, tokenizer: Any, test: list[Row], *, max_tokens: int = 80) -> dict[str, float]:
    """Share of right answers, and of answers that parse, when the model writes greedily."""
    verdicts = []
    for start in range(0, len(test), 50):
        part = test[start : start + 50]
        prompts = [prompt_tokens(tokenizer, row) for row in part]
        written = sample(
            model, prompts, max_tokens=max_tokens, pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id
        )
        verdicts += [verify(tokenizer.decode(ids), row) for ids, row in zip(written, part, strict=True)]
    right = sum(isinstance(verdict, Score) for verdict in verdicts)
    parsed = sum(not isinstance(verdict, Unparseable) for verdict in verdicts)
    return {"accuracy": right / len(test), "parsed": parsed / len(test)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=tiny.path(), help="folder of the model to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--seed", type=int, default=0, help="decides the order of the demonstrations")
    parser.add_argument("--demonstrations", type=int, default=100)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--level", default="demo")
    parser.add_argument("--test", type=int, default=200, help="problems to evaluate on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model)
    examples = [demonstration(tokenizer, row) for row in rows("demonstrations", args.demonstrations, level=args.level)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    shuffler = torch.Generator().manual_seed(args.seed)
    order: list[int] = []
    for step in range(args.steps):
        while len(order) < args.batch_size:
            order += torch.randperm(len(examples), generator=shuffler).tolist()
        batch = collate([examples[i] for i in order[: args.batch_size]], tokenizer.pad_token_id)
        order = order[args.batch_size :]
        value, _ = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step + 1} loss {float(value.detach()):.4f}", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(evaluate(model, tokenizer, rows("test", args.test, level=args.level)))


if __name__ == "__main__":
    main()
