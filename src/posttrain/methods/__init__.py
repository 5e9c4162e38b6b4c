"""The methods, by name: one file each.

`METHODS` is a table of names; a class is imported when it is asked for, `info` reads its docstring without importing
anything heavy.

Example:
    >>> info("dpo").arxiv, info("dpo").family
    ('2305.18290', 'preference')
"""

from __future__ import annotations

import ast
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from posttrain.method import Method

METHODS: dict[str, str] = {
    "all_pairs": "reward.rankings:AllPairs",
    "anchored_sft": "sft.asft_anchored:AnchoredSFT",
    "best_of_k": "reward.rankings:BestOfK",
    "best_of_n": "policy.best_of_n:BestOfN",
    "bradley_terry": "reward.reward_model:BradleyTerry",
    "cispo": "policy.cispo:CISPO",
    "conservative_dpo": "preference.conservative_dpo:ConservativeDPO",
    "cpo": "preference.cpo:CPO",
    "dapo": "policy.dapo:DAPO",
    "dft": "sft.dft:DFT",
    "dpo": "preference.dpo:DPO",
    "dr_grpo": "policy.dr_grpo:DrGRPO",
    "exact_otr": "sft.otr:ExactOTR",
    "grpo": "policy.grpo:GRPO",
    "gspo": "policy.gspo:GSPO",
    "hinge_dpo": "preference.hinge_dpo:HingeDPO",
    "ift": "sft.ift:IFT",
    "ipo": "preference.ipo:IPO",
    "kto": "preference.kto:KTO",
    "length_normalised_dpo": "preference.length_normalised_dpo:LengthNormalisedDPO",
    "online_dpo": "preference.online_dpo:OnlineDPO",
    "orpo": "preference.orpo:ORPO",
    "otr": "sft.otr:OTR",
    "outcome_reward": "reward.outcome:OutcomeReward",
    "outcome_reward_last": "reward.outcome:OutcomeRewardLast",
    "plackett_luce": "reward.rankings:PlackettLuce",
    "ppo": "policy.ppo:PPO",
    "process_reward": "reward.process:ProcessReward",
    "r_dpo": "preference.r_dpo:RDPO",
    "reinforce_pp": "policy.reinforce_pp:ReinforcePP",
    "reinforce_pp_baseline": "policy.reinforce_pp:ReinforcePPBaseline",
    "relift": "hybrid.relift:ReLIFT",
    "rloo": "policy.rloo:RLOO",
    "robust_dpo": "preference.robust_dpo:RobustDPO",
    "sasr": "hybrid.sasr:SASR",
    "sft": "sft.sft:SFT",
    "simpo": "preference.simpo:SimPO",
    "spin": "preference.spin:SPIN",
    "sstoken": "sft.sstoken:SsToken",
    "superhf": "policy.superhf:SuperHF",
    "token_bradley_terry": "reward.token_pairs:TokenBradleyTerry",
}
"""Name to `family.file:Class`, sorted by name."""


@dataclass(frozen=True)
class Info:
    """What a method's docstring says of it."""

    name: str
    cls: str
    family: str
    file: str  # relative to the package, for instance methods/preference/dpo.py
    summary: str  # first line
    title: str  # of the paper
    arxiv: str  # its number


def _home(name: str) -> tuple[str, str, str]:
    """Family, file and class of a method.

    Raises:
        ConfigError: There is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"there is no method '{name}'{nearest(name, METHODS)}")
    module, _, cls = METHODS[name].partition(":")
    family, _, file = module.partition(".")
    return family, file, cls


def method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: There is no such method; the message names the nearest ones.
    """
    family, file, cls = _home(name)
    found: type[Method] = pkgutil.resolve_name(f"posttrain.methods.{family}.{file}:{cls}")
    return found


def docstring(path: Path, cls: str) -> str:
    """A class's docstring, read from its source."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            return ast.get_docstring(node) or ""
    return ""


@cache
def info(name: str) -> Info:
    """What a method's docstring says of it, without importing the method.

    Raises:
        ConfigError: There is no such method.
    """
    family, file, cls = _home(name)
    text = docstring(Path(__file__).parent / family / f"{file}.py", cls)
    source = re.search(r'^Source: "(?P<title>[^"]+)",\s+arXiv:(?P<arxiv>\d{4}\.\d{4,5})', text, re.MULTILINE)
    return Info(
        name=name,
        cls=cls,
        family=family,
        file=f"methods/{family}/{file}.py",
        summary=text.partition("\n")[0],
        title=" ".join(source["title"].split()) if source else "",
        arxiv=source["arxiv"] if source else "",
    )


_CLASSES = {home.partition(":")[2]: name for name, home in METHODS.items()}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return method(_CLASSES[name])
    raise AttributeError(f"module 'posttrain.methods' has no attribute '{name}'{nearest(name, _CLASSES)}")


def __dir__() -> list[str]:
    return sorted([*_CLASSES, "METHODS", "Info", "info", "method"])
