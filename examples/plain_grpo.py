"""GRPO in plain PyTorch: the cold-started model improves on its own answers, told only right or wrong.

    python examples/plain_grpo.py --model /tmp/cold-start --out /tmp/grpo

Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), on-policy with one update a batch and no KL term.
Of each prompt G answers are sampled; answer i has reward r_i and advantage

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        over its group, std with Bessel's correction
    L   = - (1/B) sum_i (1/n_i) sum_t rho[i,t] A_i,   rho = exp(logprob - logprob as sampled)

With one update the ratio rho is 1 and nothing is clipped, but its gradient is the policy gradient. Shapes: P prompts, G
answers of each, B = P G sequences, T tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from plain_sft import Batch, Row, collate, evaluate, load, prompt_tokens, sample, token_logprobs
from torch import Tensor

from posttrain.tasks.word_problems import rows, verify
from posttrain.types import Score


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """Rewards `[P, G]` -> advantages `[P, G]`; a group that agrees with itself gets zeros."""
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)


def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sequence-mean GRPO loss of one whole step, and the log-probabilities `[B, T]` it came from."""
    logprobs, mask = token_logprobs(model, batch), batch["mask"]
    change = torch.where(mask, logprobs - logprobs.detach(), 0.0)  # one update a batch: zeros, with a gradient
    values = torch.where(mask, -change.exp() * batch["advantages"][:, None], 0.0)  # [B, T]
    return (values.sum(1) / mask.sum(1)).mean(), logprobs


def rollout(
    model: Any, tokenizer: Any, prompts: list[Row], *, group: int, max_tokens: int, draws: torch.Generator
) -> tuple[Batch, dict[str, float]]:
    """Sample `group` answers of each prompt, judge them, and return the batch and what happened."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    repeated = [row for row in prompts for _ in range(group)]  # B rows, a group in consecutive ones
    contexts = [prompt_tokens(tokenizer, row) for row in repeated]
    written = sample(model, contexts, max_tokens=max_tokens, pad=pad, end=end, draws=draws)
    verdicts = [verify(tokenizer.decode(ids), row) for ids, row in zip(written, repeated, strict=True)]
    rewards_PG = torch.tensor([v.value if isinstance(v, Score) else 0.0 for v in verdicts]).view(-1, group)
    batch = collate(list(zip(contexts, written, strict=True)), pad)
    batch["advantages"] = group_advantages(rewards_PG).flatten()  # [B]
    return batch, {
        "reward": float(rewards_PG.mean()),
        "groups with signal": float((rewards_PG.std(1) > 0).float().mean()),
        "length": sum(map(len, written)) / len(written),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the cold-started model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--seed", type=int, default=0, help="decides prompts and samples")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="answers a prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--warm-up", type=int, default=10, help="steps over which the learning rate rises")
    parser.add_argument("--level", default="demo")
    parser.add_argument("--test", type=int, default=200, help="problems to evaluate on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model)
    test = rows("test", args.test, level=args.level)
    train = rows("train", args.steps * args.prompts, level=args.level, seed=args.seed)
    print(f"before {evaluate(model, tokenizer, test)}")
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    draws = torch.Generator().manual_seed(args.seed)
    started = time.perf_counter()
    for step in range(args.steps):
        prompts = train[step * args.prompts : (step + 1) * args.prompts]
        batch, facts = rollout(model, tokenizer, prompts, group=args.group, max_tokens=args.max_tokens, draws=draws)
        value, _ = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / args.warm_up)
        optimiser.step()
        optimiser.zero_grad()
        told = " ".join(f"{name} {number:.3f}" for name, number in facts.items())
        print(f"step {step + 1} {told} seconds {time.perf_counter() - started:.1f}", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"after {evaluate(model, tokenizer, test)}")


if __name__ == "__main__":
    main()
