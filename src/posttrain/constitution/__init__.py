"""A constitution: principles in words by which a model criticises, revises and compares answers.

>>> [principle.name for principle in load_constitution()][:3]
['helpful', 'avoid-harm', 'honest']
"""

from posttrain.constitution.principles import Principle, drawn, load_constitution
from posttrain.constitution.prompts import Example, critique_prompt, elicitation, fault_of, load_examples, revision_prompt

__all__ = [
    "Example",
    "Principle",
    "critique_prompt",
    "drawn",
    "elicitation",
    "fault_of",
    "load_constitution",
    "load_examples",
    "revision_prompt",
]
