"""GREEN: a report's matched findings against its errors, and the same controlled for length.

>>> green(matched=4, errors=2), green(matched=0, errors=0)
(0.6666666666666666, 0.0)
>>> length_controlled(0.328, words=150, reference_words=100)
0.21866666666666668
"""

from __future__ import annotations

from posttrain.errors import ConfigError

__all__ = ["green", "length_controlled"]


def green(matched: int, errors: int) -> float:
    """`m / (m + e)` in [0, 1]: findings that match the reference, over these and the clinically significant errors.

    0 where nothing matches, whatever the errors (never NaN).  Who counts is a judge that reads report and reference; it counts
    false and missed findings, wrong places and severities, comparisons that the reference lacks, and omitted ones.

    Raises:
        ConfigError: A count is negative.

    Source: "GREEN: Generative Radiology Report Evaluation and Error Notation", arXiv:2405.03595 (title and number are from
    memory), as used in CheXalign, arXiv:2410.07025.
    """
    if matched < 0 or errors < 0:
        raise ConfigError(f"found {matched} matched findings and {errors} errors; expected counts >= 0")
    return matched / (matched + errors) if matched else 0.0


def length_controlled(score: float, *, words: int, reference_words: int) -> float:
    """`score / max(words / reference_words, 1)`: a report longer than its reference is marked down, a shorter one is not rewarded.

    Raises:
        ConfigError: The reference has no words.

    Source: LC-GREEN in "Preference Fine-Tuning for Factuality in Chest X-Ray Interpretation Models Without Human Feedback",
    arXiv:2410.07025.
    """
    if words < 0 or reference_words < 1:
        raise ConfigError(f"found {words} words against {reference_words} of the reference; expected >= 0 and >= 1")
    return score / max(words / reference_words, 1.0)
