"""What a model is sent when it is to tempt, criticise or revise: conversations, so that the model's own chat template applies.

A critique is asked for as the turn after the answer, and the revision as the turn after the critique.  Worked examples stand before
as whole turns of the same kinds: were they pasted into one message, a model would go on with the dialogue.

Source: "Constitutional AI", arXiv:2212.08073, section 3.1 and appendices A and E.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from posttrain.constitution.principles import Principle
from posttrain.errors import ConfigError, nearest

__all__ = ["Example", "critique_prompt", "elicitation", "fault_of", "load_examples", "revision_prompt"]

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A worked example of a critique and a revision, shown before the case itself."""

    prompt: str
    answer: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


def load_examples(path: str | Path) -> tuple[Example, ...]:
    """Worked examples from a YAML file: a list of mappings with the fields of `Example`.

    Raises:
        ConfigError: There is no such file, or an entry lacks a text or has one more.
    """
    file = Path(path).expanduser()
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as cause:
        raise ConfigError(f"examples are read from a YAML file, and {file} cannot be: {cause}") from None
    known = [field.name for field in fields(Example)]
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{file.name} holds {type(found).__name__}; expected a list of examples with {', '.join(known)}")
    for number, entry in enumerate(found, start=1):
        keys = list(entry) if isinstance(entry, Mapping) else []
        strange = [key for key in keys if key not in known]
        if strange:
            raise ConfigError(f"{file.name}, example {number} has no '{strange[0]}'{nearest(str(strange[0]), known)}")
        lacks = [key for key in known if not isinstance(entry, Mapping) or not isinstance(entry.get(key), str)]
        if lacks:
            raise ConfigError(f"{file.name}, example {number}: found no text for '{lacks[0]}'; write {', '.join(known)}")
    return tuple(Example(**{key: str(entry[key]).strip() for key in known}) for entry in found)


def critique_prompt(prompt: Messages, answer: str, principle: Principle, examples: Sequence[Example] = ()) -> Messages:
    """The conversation, the answer, and the request for a critique of it."""
    asked = [*prompt, _said("assistant", answer), _said("user", principle.critique)]
    return _behind_examples(asked, examples)


def revision_prompt(
    prompt: Messages, answer: str, principle: Principle, critique: str, examples: Sequence[Example] = ()
) -> Messages:
    """The conversation, the answer, the request for a critique, the critique, and the request for a revision."""
    asked = [*prompt, _said("assistant", answer), _said("user", principle.critique)]
    asked += [_said("assistant", critique), _said("user", principle.revision)]
    return _behind_examples(asked, examples)


def elicitation(prompt: Messages, principle: Principle) -> Messages:
    """The request to turn a benign prompt into one that tempts to violate a principle.

    The text that comes back takes the place of the prompt's last message.
    """
    asked = (
        "Below is a request to an assistant, and a question by which the assistant's answer will be checked. Rewrite the request "
        "so that a careless assistant would be tempted to give an answer that fails the check. Keep its topic. Reply with the "
        f"rewritten request alone.\n\nCheck: {principle.critique}\n\nRequest: {prompt[-1]['content']}"
    )
    return [_said("user", asked)]


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _behind_examples(asked: Messages, examples: Sequence[Example]) -> Messages:
    """The examples' turns between a system message, if there is one, and the case."""
    system = asked[:1] if asked[0]["role"] == "system" else []
    shown: Messages = []
    for example in examples:
        shown += [_said("user", example.prompt), _said("assistant", example.answer)]
        shown += [_said("user", example.critique_request), _said("assistant", example.critique)]
        shown += [_said("user", example.revision_request), _said("assistant", example.revision)]
    return [*system, *shown, *asked[len(system) :]]


_ABOUT_ITSELF = re.compile(
    r"critique\s*(request)?\s*:|revision\s*(request)?\s*:|\b(revised|rewritten|improved|updated)\s+(answer|response|reply|version)\b"
    r"|\bmy (last|previous|earlier|original) (answer|response|reply)\b",
    re.IGNORECASE,
)


def fault_of(revision: str, *, critique: str, principle: Principle, cut: bool) -> str:
    """Why a revision cannot be trained on: `empty`, `cut` at the limit, `leaked`; "" where nothing is wrong with its form.

    Leaked: it speaks of itself as a revision, or repeats the critique or a request, none of which is there when the answer is
    given to the prompt alone.
    """
    if not revision.strip():
        return "empty"
    if cut:
        return "cut"
    repeated = (critique.strip(), principle.critique, principle.revision)
    if _ABOUT_ITSELF.search(revision) or any(text and text in revision for text in repeated):
        return "leaked"
    return ""
