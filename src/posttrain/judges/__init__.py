"""Judges: models that say which answer is better or how good one is, behind one seam.

>>> from posttrain.judges import ScriptedJudge, pairwise, template_named
>>> judge = ScriptedJudge(lambda text, options: [-0.1, -2.5])
>>> [round(found.p, 3) for found in pairwise(judge, [("1 + 1?", "2", "3")], template_named("pairwise"))]
[0.5]
"""

from posttrain.judges.ask import Comparison, Rating, Selection, pairwise, rate, rubric, select, tournament
from posttrain.judges.cache import CachedJudge
from posttrain.judges.judge import Judge, Reply, ScriptedJudge, judge_named
from posttrain.judges.templates import Template, template_named
from posttrain.judges.verdicts import verdict_in

__all__ = [
    "CachedJudge",
    "Comparison",
    "Judge",
    "Rating",
    "Reply",
    "ScriptedJudge",
    "Selection",
    "Template",
    "judge_named",
    "pairwise",
    "rate",
    "rubric",
    "select",
    "template_named",
    "tournament",
    "verdict_in",
]
