"""The live display: on a terminal, in a log, and quiet."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from posttrain.report.live import Live, by_phase, readout
from posttrain.report.names import duration, number, shares


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


METRICS = {
    "reward": 0.4125,
    "reward_low": 0.37,
    "reward_high": 0.455,
    "kl": 0.0031,
    "entropy": 0.52,
    "length": 38.2,
    "signal": 0.625,
    "tokens_per_second": 1240.4,
}


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=200, color_system=None, highlight=False), text


def test_the_line_holds_what_a_person_wants_to_know() -> None:
    assert readout(METRICS) == [
        "reward 0.412 [0.37, 0.455]",
        "KL 0.0031",
        "entropy 0.52",
        "length 38",
        "signal 62.5 %",
        "1,240 tokens/s",
    ]
    assert readout({"loss": 0.5, "accuracy": 0.75}) == ["loss 0.5", "accuracy 75.0 %"]
    assert readout({"reward": float("nan"), "length": float("nan")}) == ["reward –", "length –"]
    assert readout({}) == []


def test_a_reward_that_a_loss_implies_does_not_stand_for_the_loss() -> None:
    """Preference methods log the mean of their implicit rewards; those who sample log how sure it is."""
    implied = {"loss": 0.621, "accuracy": 0.75, "reward": -0.187, "length": 2.0}
    assert readout(implied) == ["loss 0.621", "accuracy 75.0 %", "length 2"]
    assert readout({**implied, "signal": 0.5})[0] == "reward -0.187"
    assert readout({**implied, "reward_low": -0.2, "reward_high": 0.1})[0] == "reward -0.187 [-0.2, 0.1]"


def test_one_step_and_none() -> None:
    where, text = console(terminal=False)
    with Live("sft", 1, console=where) as live:
        live.update(0, {})
    with Live("sft", 1, console=where):
        pass
    lines = text.getvalue().splitlines()
    assert lines[1].startswith("sft done: 1 step in ")
    assert lines[2] == "sft was finished before, nothing to do"


def test_a_log_gets_plain_lines_now_and_then() -> None:
    clock = Clock()
    where, text = console(terminal=False)
    with Live("grpo", 100, console=where, every_seconds=10, clock=clock) as live:
        for step in range(100):
            clock.now += 1.0
            live.update(step, METRICS, {"sample": 0.6, "update": 0.3, "other": 0.1})
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/100", "11/100", "21/100"]
    assert lines[-2].startswith("grpo 100/100 (100 %) | reward 0.412 [0.37, 0.455] | KL 0.0031")
    assert "time: sample 60 %, update 30 %, other 10 %" in lines[-2]
    assert lines[-1] == "grpo done: 100 steps in 1 min 40 s"
    assert len(lines) == 12
    assert "1 min 30 s left" not in lines[0]
    assert "1 min 39 s left" in lines[0]
    assert "\x1b" not in text.getvalue()


def test_the_time_left_is_that_of_steps_done_here() -> None:
    """After a resume at step 50, the steps of the earlier process do not count as fast ones."""
    clock = Clock()
    with Live("sft", 60, quiet=True, clock=clock) as live:
        assert live.seconds_left() is None
        for step in (50, 51):
            clock.now += 4.0
            live.update(step, {})
        assert live.seconds_left() == pytest.approx(32.0)


def test_a_terminal_gets_a_bar_and_two_lines() -> None:
    where, text = console(terminal=True)
    with Live("grpo [1/2]", 4, console=where) as live:
        live.update(0, METRICS, {"sample": 0.5, "other": 0.5})
        live.warn("No signal [bold] for 5 steps")
        live.update(3, METRICS, {"sample": 0.5, "other": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert "grpo [1/2]" in shown, "a title is no markup"
    assert "4/4 (100 %)" in shown
    assert "KL 0.0031" in shown
    assert "sample 50 %, other 50 %" in shown
    assert "! No signal [bold] for 5 steps" in shown


def test_a_warning_is_said_once_whatever_its_numbers() -> None:
    where, text = console(terminal=False)
    with Live("s", 4, console=where) as live:
        live.warn("No signal for the last 5 steps: KL 0.01")
        live.warn("No signal for the last 12 steps: KL 3e-05")
        live.warn("Reward is flat")
    assert text.getvalue().count("No signal") == 1
    assert text.getvalue().count("Reward is flat") == 1


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Live("s", 2, quiet=True) as live:
        live.update(0, METRICS, {"other": 1.0})
        live.warn("something")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_an_interrupted_stage_says_where_it_stopped() -> None:
    where, text = console(terminal=False)
    live = Live("s", 9, console=where).__enter__()
    live.update(0, {}, None)
    live.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "s stopped after 1 of 9 steps" in text.getvalue()


def test_shares_add_up() -> None:
    assert shares({"a": 1.0, "b": 1.0, "c": 1.0}) == {"a": 34, "b": 33, "c": 33}
    assert shares({"a": 0.996, "b": 0.004}) == {"a": 100, "b": 0}
    assert shares({"a": 0.0, "b": 0.0}) == {"a": 0, "b": 0}
    assert shares({}) == {}
    for parts in range(1, 40):
        assert sum(shares({str(i): 1.0 + i % 3 / 7 for i in range(parts)}).values()) == 100
    assert by_phase({"sample": 2.0, "other": 1.0}) == "sample 67 %, other 33 %"


def test_numbers_are_readable() -> None:
    assert [number(x) for x in (0.0, 0.5, 1234.4, 0.00001234, float("inf"), None)] == [
        "0",
        "0.5",
        "1,234",
        "1.23e-05",
        "–",
        "–",
    ]
    assert [duration(x) for x in (0.44, 59.4, 60, 3599.6, 7260, None)] == [
        "0.4 s",
        "59 s",
        "1 min 0 s",
        "1 h 0 min",
        "2 h 1 min",
        "–",
    ]
