"""A sample in colour: what is trained, who wrote what, and every control token."""

from __future__ import annotations

from collections.abc import Iterator
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


def coloured(
    sample: Sample, tokenizer: PreTrainedTokenizerFast, *, with_legend: bool = True, longest: int = 0
) -> Text:
    """A sample as text for a terminal: trained tokens reversed, a colour an origin, special tokens as they are spelt.

    Args:
        sample: What to show.
        tokenizer: Whose tokens they are.
        with_legend: Put a line that explains the styles above it.
        longest: About how many characters are shown; the middle of a longer sample is counted in tokens instead.  0 shows all.

    Returns:
        Rich text; its `plain` is the decoded sample, below the legend.  New lines are shown as `⏎` before they break.
    """
    from rich.text import Text

    text = Text()
    if with_legend:
        text.append_text(legend()).append("\n")
    whole = list(_runs(sample, tokenizer, 0, len(sample)))
    characters = sum(len(shown) for shown, _ in whole)
    if not longest or characters <= longest:
        for shown, style in whole:
            text.append(shown, style=style)
        return text
    side = max(1, len(sample) * longest // (2 * characters))  # tokens that are kept at each end
    for shown, style in _runs(sample, tokenizer, 0, side):
        text.append(shown, style=style)
    text.append(f" ... {len(sample) - 2 * side:,} tokens ... ", style="dim italic")
    for shown, style in _runs(sample, tokenizer, len(sample) - side, len(sample)):
        text.append(shown, style=style)
    return text


def _runs(sample: Sample, tokenizer: PreTrainedTokenizerFast, start: int, stop: int) -> Iterator[tuple[str, str]]:
    """Text and style of tokens `start` to `stop`; those of one style are decoded together: a character may be several."""
    while start < stop:
        look = (sample.origin[start], sample.trained[start])
        end = start + 1
        while end < stop and (sample.origin[end], sample.trained[end]) == look:
            end += 1
        style = _STYLES[Origin(look[0])] + (f" {_TRAINED}" if look[1] else "")
        decoded = tokenizer.decode(sample.tokens[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield str(decoded).replace("\n", "⏎\n"), style
        start = end
