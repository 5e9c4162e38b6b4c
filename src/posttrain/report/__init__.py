"""What a person sees of a run: live progress, files of numbers and samples, warnings in words, and one HTML page."""

from posttrain.report.journal import Journal
from posttrain.report.live import Live
from posttrain.report.names import shares
from posttrain.report.page import write_report
from posttrain.report.statistics import (
    Interval,
    bootstrap_interval,
    clustered_interval,
    mean_interval,
    paired_difference,
    pass_at_k,
    pass_at_k_interval,
    proportion_interval,
)
from posttrain.report.summary import Summary, read_summary, write_summary
from posttrain.report.warnings import warnings_in_words

__all__ = [
    "Interval",
    "Journal",
    "Live",
    "Summary",
    "bootstrap_interval",
    "clustered_interval",
    "mean_interval",
    "paired_difference",
    "pass_at_k",
    "pass_at_k_interval",
    "proportion_interval",
    "read_summary",
    "shares",
    "warnings_in_words",
    "write_report",
    "write_summary",
]
