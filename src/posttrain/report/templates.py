"""The pages' templates, and what makes text that others wrote fit for a page."""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING

from posttrain.report.names import duration, number
from posttrain.report.results import points

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

__all__ = ["clean", "marked", "template_of"]

MARKS = re.compile(r"(<\|[^<>|\s]{1,40}\|>)")
"""Special tokens as chat templates write them."""


def template_of(file: str) -> Template:
    """One of this package's templates.  Whatever it prints is escaped; a name that nothing was given for is an error."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(number=number, duration=duration, points=points)
    environment.filters.update(clean=clean, marked=marked)
    return environment.from_string(resources.files("posttrain.report").joinpath(file).read_text(encoding="utf-8"))


def clean(text: object, limit: int = 6000) -> str:
    """Text that a model wrote, fit for a page: control characters are made visible, long text is cut with a note."""
    shown = re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        "\ufffd",
        str(text).replace("\r\n", "\n"),
    )
    if len(shown) <= limit:
        return shown
    return f"{shown[:limit]}\n… {len(shown) - limit:,} more characters"


def marked(text: object) -> Markup:
    """Clean text as HTML, special tokens such as `<|end|>` set apart from what the model says.

    Example:
        >>> str(marked("7 < 8<|end|>"))
        '7 &lt; 8<span class="mark">&lt;|end|&gt;</span>'
    """
    from markupsafe import Markup, escape

    parts = MARKS.split(clean(text))
    return Markup("").join(
        Markup('<span class="mark">{}</span>').format(part) if place % 2 else escape(part) for place, part in enumerate(parts)
    )
