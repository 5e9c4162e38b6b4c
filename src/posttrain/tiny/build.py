"""Build the embedded model from nothing: `python -m posttrain.tiny.build --out FOLDER --minutes 55`.

Documents of the procedural corpus are drawn in pools, sorted by length within a pool, cut into micro-batches with few
pads, and read once. Master weights, attention, norms and the loss are fp32; the matrix products are bf16. The learning
rate follows a cosine of whichever budget runs out first, minutes or tokens. A run that was stopped goes on from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.tiny.corpus import document
from posttrain.tiny.tokens import CHAT_TEMPLATE, train_tokenizer

__all__ = ["Build", "build", "main"]

POOL = 4096  # documents that are sorted by length together


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a build may spend and how it learns."""

    out: Path
    """Folder that receives the model, and `state.pt` while the build runs."""
    minutes: float = math.inf
    """Wall-clock budget of the training loop."""
    tokens: float = math.inf
    """Budget of trained tokens."""
    seed: int = 0
    """Seed of corpus, weights and order."""
    lr: float = 2e-3
    """Peak learning rate."""
    step_tokens: int = 7_500
    """Tokens of one optimiser step."""
    micro_tokens: int = 4096
    """Tokens of one forward and backward pass, pads included."""
    save_minutes: float = 4.0
    """Minutes between checkpoints."""


def fresh_model(seed: int, vocabulary: int, pad: int, end: int) -> Any:
    """A `LlamaForCausalLM` with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5,
        pad_token_id=pad, bos_token_id=None, eos_token_id=end, initializer_range=0.04,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x [B, H, T, D]`, halves paired as in Llama."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def half(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in bf16."""
    return F.linear(x.bfloat16(), weight.bfloat16())


def nll_sum(model: Any, tokens: Tensor, pad: int) -> Tensor:
    """Summed negative log-likelihood of `tokens [B, T]` after the first, pads left out.

    The forward of the Llama architecture over the model's own parameters, without a mask: pads stand on the right.
    """
    config, trunk = model.config, model.model
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    positions = torch.arange(length, dtype=torch.float32)
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()  # [T, D]
    x = F.embedding(tokens[:, :-1], trunk.embed_tokens.weight)  # [B, T, X]
    for layer in trunk.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = F.rms_norm(x, (config.hidden_size,), layer.input_layernorm.weight, config.rms_norm_eps)
        merged = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        q, k, v = half(h, merged).float().view(batch, length, heads + 2 * kv_heads, size).transpose(1, 2).split(
            (heads, kv_heads, kv_heads), dim=1
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeat = heads // kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + half(mixed.transpose(1, 2).reshape(batch, length, -1), attention.o_proj.weight).float()
        h = F.rms_norm(x, (config.hidden_size,), layer.post_attention_layernorm.weight, config.rms_norm_eps)
        gate, up = half(h, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))).chunk(2, dim=-1)
        x = x + half(F.silu(gate) * up, mlp.down_proj.weight).float()
    x = F.rms_norm(x, (config.hidden_size,), trunk.norm.weight, config.rms_norm_eps)
    logits = half(x, trunk.embed_tokens.weight).float()  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad, reduction="sum")


def micro_batches(tokenizer: Any, pool: int, settings: Build) -> Iterator[Tensor]:
    """Micro-batches `[B, T]` of one pool of documents, similar lengths together, in random order."""
    first = pool * POOL
    texts = [document(index, seed=settings.seed) for index in range(first, first + POOL)]
    documents = sorted(tokenizer(texts)["input_ids"], key=len)
    batches: list[list[list[int]]] = [[]]
    for ids in documents:
        if batches[-1] and (len(batches[-1]) + 1) * len(ids) > settings.micro_tokens:
            batches.append([])
        batches[-1].append(ids)
    random.Random(f"{settings.seed}/{pool}").shuffle(batches)
    for batch in batches:
        length = max(map(len, batch))
        yield torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids in batch])


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over the first 2 %, then a cosine down to 2 % of the peak."""
    if progress < 0.02:
        return peak * (0.05 + 0.95 * progress / 0.02)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save(model: Any, tokenizer: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model in bf16 as a Hugging Face folder, with `facts` beside it; the training model stays as it is."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tensors = model.state_dict().items()
    weights = {name: tensor.detach().bfloat16() for name, tensor in tensors if name != "lm_head.weight"}
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=128, do_sample=False
    )
    model.save_pretrained(folder, state_dict=weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    _portable_tokenizer(folder / "tokenizer_config.json")
    (folder / "build.json").write_text(json.dumps(facts, indent=1) + "\n")


def _portable_tokenizer(path: Path) -> None:
    """Write class name and chat template in the form that every reader of Hugging Face folders knows."""
    config = json.loads(path.read_text())
    config.update(tokenizer_class="PreTrainedTokenizerFast", chat_template=CHAT_TEMPLATE)
    path.write_text(json.dumps(config, indent=2) + "\n")
    (path.parent / "chat_template.jinja").unlink(missing_ok=True)


class Trainer:
    """Model, optimiser and counts of a build, with one method that takes an optimiser step."""

    def __init__(self, settings: Build, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.model = fresh_model(settings.seed, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        gains = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
        self.counts: dict[str, float] = {"pool": 0, "step": 0, "tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0}

    def progress(self) -> float:
        """Share of the budget that is spent."""
        return max(
            self.counts["seconds"] / 60 / self.settings.minutes,
            self.counts["tokens"] / self.settings.tokens,
        )

    def step(self, group: list[Tensor]) -> float:
        """One optimiser step on a list of micro-batches; returns the mean loss a token."""
        pad, wall, cpu = self.tokenizer.pad_token_id, time.perf_counter(), time.process_time()
        count = sum(int((tokens[:, 1:] != pad).sum()) for tokens in group)
        total = 0.0
        for tokens in group:
            loss = nll_sum(self.model, tokens, pad) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = learning_rate(self.settings.lr, self.progress())
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for name, amount in (
            ("step", 1), ("tokens", count),
            ("seconds", time.perf_counter() - wall), ("cpu_seconds", time.process_time() - cpu),
        ):  # fmt: skip
            self.counts[name] += amount
        return total

    def save(self, folder: Path, loss: float) -> None:
        """Write the model folder."""
        settings = asdict(self.settings).items()
        given = {f"{name} asked": value for name, value in settings if name != "out" and value != math.inf}
        facts = {**given, **self.counts, "documents": self.counts["pool"] * POOL, "loss": loss}
        save(self.model, self.tokenizer, folder, facts)

    def keep(self, path: Path) -> None:
        """Write everything that a resumed run needs, atomically."""
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "counts": self.counts}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def resume(self, path: Path) -> None:
        """Go on from `path`, at the start of the next pool."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.counts = state["counts"]


def build(settings: Build) -> None:
    """Train tokenizer and model and write them to `settings.out`."""
    from transformers import AutoTokenizer

    settings.out.mkdir(parents=True, exist_ok=True)
    state = settings.out / "state.pt"
    if state.exists():
        tokenizer = AutoTokenizer.from_pretrained(settings.out)
        trainer = Trainer(settings, tokenizer)
        trainer.resume(state)
    else:
        tokenizer = train_tokenizer(document(index, seed=settings.seed) for index in range(20_000))
        tokenizer.save_pretrained(settings.out)
        trainer = Trainer(settings, tokenizer)
    loss, saved = math.nan, time.monotonic()
    while trainer.progress() < 1:
        group: list[Tensor] = []
        for tokens in micro_batches(tokenizer, int(trainer.counts["pool"]), settings):
            group.append(tokens)
            if sum(batch.numel() for batch in group) < settings.step_tokens:
                continue
            value = trainer.step(group)
            group = []
            loss = value if math.isnan(loss) else 0.95 * loss + 0.05 * value
            if trainer.counts["step"] % 20 == 0:
                print(f"{trainer.progress():.3f} loss {loss:.4f} {json.dumps(trainer.counts)}", flush=True)
            if trainer.progress() >= 1:
                break
        trainer.counts["pool"] += 1
        if time.monotonic() - saved > 60 * settings.save_minutes:
            trainer.keep(state)
            trainer.save(settings.out, loss)
            saved = time.monotonic()
    trainer.save(settings.out, loss)
    state.unlink(missing_ok=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=math.inf, help="wall-clock budget of training")
    parser.add_argument("--tokens", type=float, default=math.inf, help="token budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    if math.isinf(options["minutes"]) and math.isinf(options["tokens"]):
        parser.error("found no budget; write --minutes or --tokens")
    build(Build(**options))


if __name__ == "__main__":
    main()
