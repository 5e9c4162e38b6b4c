"""The fixed cost of a step: a model with next to no arithmetic, so that what is left is the trainer's own work."""

from __future__ import annotations

from posttrain.models.model import LanguageModel
from posttrain.models.random import random_model

from . import dpo, grpo, sft
from .measure import Row, paired
from .sides import NOTHING, Setting, ragged, tokenizer


def nothing(seed: int = 0) -> LanguageModel:
    """One layer of width 16."""
    return random_model("llama", seed=seed, vocab_size=len(tokenizer()), **NOTHING)


def rows(setting: Setting) -> list[Row]:
    """The comparisons."""
    steps = 5 if setting.quick else 50
    shape = "Llama 1 layer d 16"
    rows = ragged(sft.BATCH * (steps + 1), low=8, high=16)
    work = [rows[i : i + sft.BATCH] for i in range(0, len(rows), sft.BATCH)]
    answers = ragged(2 * dpo.PAIRS * (steps + 1), low=4, high=8)
    triples = [(answers[i][:4], answers[i], answers[i + 1]) for i in range(0, len(answers), 2)]
    pairs = [triples[i : i + dpo.PAIRS] for i in range(0, len(triples), dpo.PAIRS)]
    asked = grpo.prompts(2, 8)
    mine = {"policy": nothing(), "reference": nothing(1).frozen_copy()}
    sft_sides = sft.ours(nothing(), work, "exact", per="step"), sft.trl(nothing(), work, per="step")
    cases = [
        ("overhead/sft", "8 rows of 8 to 16 tokens", *sft_sides),
        ("overhead/dpo", "4 pairs of 8 to 16 tokens", dpo.ours(mine, pairs, "exact"), dpo.trl(nothing(), nothing(1), pairs)),
        (
            "overhead/grpo",
            "2 prompts x 4 answers x 8 tokens, sampled",
            grpo.ours(nothing(), asked, 4, 8, steps),
            grpo.trl(nothing(), asked, 4, 8, steps),
        ),
    ]
    return [
        paired(key, f"{shape}, {what}; both fp32", ours, peer, rounds=setting.rounds, peer_name="TRL", unit="CPU ms/step")
        for key, what, ours, peer in cases
    ]
