"""The fixed cost of a step: a model with next to no arithmetic, so that what is left is the trainer's own work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from posttrain.models.model import LanguageModel

from . import dpo, grpo, sft
from .measure import Row, paired
from .setting import Setting, ragged

SHAPE = "nothing"


def rows(setting: Setting) -> Iterator[Row]:
    """The comparisons, and the worst of them as `overhead`."""
    steps = 5 if setting.quick else 50
    rows = ragged(sft.BATCH * (steps + 1), low=8, high=16)
    work = [rows[i : i + sft.BATCH] for i in range(0, len(rows), sft.BATCH)]
    answers = ragged(2 * dpo.PAIRS * (steps + 1), low=4, high=8)
    triples = [(answers[i][:4], answers[i], answers[i + 1]) for i in range(0, len(answers), 2)]
    pairs = [triples[i : i + dpo.PAIRS] for i in range(0, len(triples), dpo.PAIRS)]
    asked = grpo.prompts(2, 8)

    def nothing(seed: int = 0) -> LanguageModel:
        return setting.load(SHAPE, seed=seed)

    mine = {"policy": nothing(), "reference": nothing(1).frozen_copy()}
    sft_sides = sft.ours(nothing(), work, "exact", per="step"), sft.trl(nothing(), work, per="step")
    cases = [
        ("overhead_sft", "8 rows of 8 to 16 tokens", *sft_sides),
        ("overhead_dpo", "4 pairs of 8 to 16 tokens", dpo.ours(mine, pairs, "exact"), dpo.trl(nothing(), nothing(1), pairs)),
        (
            "overhead_grpo",
            "2 prompts x 4 answers x 8 tokens, sampled",
            grpo.ours(nothing(), asked, 4, 8, steps),
            grpo.trl(nothing(), asked, 4, 8, steps),
        ),
    ]
    found = []
    for key, what, ours, peer in cases:
        words = f"{setting.words(SHAPE)}, {what}; both fp32"
        unit = f"{setting.unit}ms/step"
        found.append(paired(key, words, ours, peer, rounds=setting.rounds, peer_name="TRL", unit=unit, goal=2.0))
        yield found[-1]
    if all(row.ratio is not None for row in found):
        worst = min(found, key=lambda row: row.ratio or 0.0)
        yield replace(worst, key="overhead", what=f"the worst of SFT, DPO and GRPO: {worst.key}; {worst.what}")


__all__ = ["rows"]
