"""A sample in colour: what is trained, who wrote what, and every control token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.types import Origin, Sample

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerFast

__all__ = ["coloured", "legend"]

_STYLES = {
    Origin.CONTEXT: "bright_black",
    Origin.TEMPLATE: "magenta",
    Origin.SYSTEM: "yellow",
    Origin.USER: "cyan",
    Origin.TOOL: "blue",
    Origin.POLICY: "green",
    Origin.DEMONSTRATION: "green",
    Origin.PREFIX: "bright_yellow",
}
_TRAINED = "bold reverse"


def legend() -> Text:
    """Which style means which origin, and what is trained."""
    from rich.text import Text

    text = Text()
    for origin, style in _STYLES.items():
        text.append(origin.name.lower(), style=style)
        text.append("  ")
    text.append("trained", style=_TRAINED)
    return text


def coloured(sample: Sample, tokenizer: PreTrainedTokenizerFast, *, with_legend: bool = True) -> Text:
    """A sample as text for a terminal: trained tokens reversed, a colour an origin, special tokens as they are spelt.

    Args:
        sample: What to show.
        tokenizer: Whose tokens they are.
        with_legend: Put a line that explains the styles above it.

    Returns:
        Rich text; its `plain` is the decoded sample, below the legend.  New lines are shown as `⏎` before they break.
    """
    from rich.text import Text

    text = Text()
    if with_legend:
        text.append_text(legend()).append("\n")
    start = 0
    while start < len(sample):  # runs of one style are decoded together: a character may be several tokens
        look = (sample.origin[start], sample.trained[start])
        end = start + 1
        while end < len(sample) and (sample.origin[end], sample.trained[end]) == look:
            end += 1
        style = _STYLES[Origin(look[0])] + (f" {_TRAINED}" if look[1] else "")
        decoded = tokenizer.decode(sample.tokens[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(str(decoded).replace("\n", "⏎\n"), style=style)
        start = end
    return text
