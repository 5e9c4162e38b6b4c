"""What is judged ahead of time is judged as it would have been: the same verdicts, counts and errors, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from test_faults import FAULTY, alive, answers, faulty, wait_dead

from posttrain.errors import DataError, RewardError
from posttrain.records import sample_from_json, sample_to_json
from posttrain.rewards import Answer, Reward, RewardRunner, answer_of, load_reward
from posttrain.rewards.runner import Tally
from posttrain.types import Origin, Sample, Score, Verdict

pytestmark = pytest.mark.filterwarnings("ignore:reward")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def hand_over(runner: RewardRunner, reward: Reward, given: list[Answer], *, wait: bool = True) -> None:
    """Judge answers ahead, in this order, and wait until all are."""
    for answer in given:
        runner.judge_ahead(reward, answer)
    if wait:
        until(lambda: len(runner._ahead[reward.name]._found) == len(given))


Outcome = tuple[list[Verdict | None], dict[str, Any]]


def without_seconds(tally: Tally) -> dict[str, Any]:
    return {key: value for key, value in asdict(tally).items() if key != "seconds"}


def both(reward: Reward, given: list[Answer], *, workers: int = 1, **options: Any) -> tuple[Outcome, Outcome]:
    """Verdicts and tally with everything judged ahead, and with nothing."""
    outcomes = []
    for ahead in (True, False):
        with RewardRunner(workers=workers, **options) as runner:
            if ahead:
                hand_over(runner, reward, given[::-1])  # a sampler ends them in any order
            found, tally = runner.judge(reward, given)
            assert runner.settle().ahead == (len(given) if ahead else 0)
            outcomes.append((found, {**without_seconds(tally), "first": runner.first_failure(reward.name)}))
    return outcomes[0], outcomes[1]


def errors(reward: Reward, given: list[Answer], *, wait: bool = True, kind: type[Exception] = RewardError) -> tuple[str, str]:
    """What `judge` says when it refuses to go on, with answers judged ahead, and without; no worker is left."""
    said = []
    for ahead in (True, False):
        with RewardRunner() as runner:
            if ahead:
                hand_over(runner, reward, given, wait=wait)
            with pytest.raises(kind) as caught:
                runner.judge(reward, given)
            assert runner.pids() == []
            said.append(str(caught.value))
    return said[0], said[1]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("function", ["good", "raises", "exits", "segfaults", "writes_much"])
def test_the_same_verdicts_counts_and_first_failure(function: str, workers: int) -> None:
    with_, without = both(faulty(function), answers(12, bad=(5,)), workers=workers)
    assert with_ == without
    assert with_[1]["failed"] == (function != "good")
    assert with_[1]["retried"] >= with_[1]["failed"]


def test_a_hang_is_killed_once_ahead_and_once_when_asked_for() -> None:
    given = answers(6, bad=(2,))
    with_, without = both(faulty("sleeps", deadline=0.5), given)
    assert with_ == without
    assert (with_[1]["failed"], with_[1]["timed_out"], with_[1]["retried"]) == (1, 1, 1)


def test_what_failed_ahead_is_asked_once_more_and_in_a_fresh_worker(tmp_path: Path) -> None:
    """The function notes the process that asks: one try ahead, one at `judge`, in another; and one of every other answer."""
    file, log = tmp_path / "mine.py", tmp_path / "log"
    file.write_text(
        "import os\n"
        f"def f(answer):\n    open({str(log)!r}, 'a').write(f'{{answer.index}} {{os.getpid()}}\\n')\n"
        "    if answer.index == 3:\n        raise ValueError('no')\n    return 1.0\n"
    )
    reward, given = load_reward(f"{file}:f"), answers(6)
    with RewardRunner() as runner:
        hand_over(runner, reward, given[1::2])
        _, tally = runner.judge(reward, given)
    asked = [line.split() for line in log.read_text().splitlines()]
    assert sorted(index for index, _ in asked) == ["0", "1", "2", "3", "3", "4", "5"]
    assert len({pid for index, pid in asked if index == "3"}) == 2
    assert (tally.judged, tally.failed, tally.retried) == (6, 1, 1)


def test_a_rate_of_failures_stops_it_with_the_same_words() -> None:
    with_, without = errors(faulty("raises"), answers(30, bad=tuple(range(0, 30, 2))))
    assert with_ == without
    assert "of its last" in with_


@pytest.mark.parametrize("bad", [(0, 1, 2, 3), (0, 1)])  # handed over in order: the worker is well again at the end
def test_hangs_stop_it_in_the_order_of_the_samples_though_others_succeeded_ahead(bad: tuple[int, ...]) -> None:
    """Answer 0 hung, hung again, and answer 1 hung: three in a row, whatever was judged before them in time."""
    with_, without = errors(faulty("sleeps", deadline=0.4), answers(4, bad=bad))
    assert with_ == without
    assert "3 times in a row" in with_


def test_a_function_that_cannot_be_loaded_is_refused_with_the_same_words(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def f(answer):\n    return 1.0\n")
    reward = load_reward(f"{file}:f")
    file.write_text("import no_such_module\n\n\ndef f(answer):\n    return 1.0\n")
    with_, without = errors(reward, answers(3), wait=False)
    assert with_ == without
    assert "no_such_module" in with_


def test_a_row_that_no_worker_can_read_is_refused_with_the_same_words() -> None:
    given = [Answer(text="a", info={"id": "row-5", "bad": {1, 2}})]
    with_, without = errors(faulty("good"), given, wait=False, kind=DataError)
    assert with_ == without
    assert "row-5" in with_


def test_an_answer_that_changed_is_judged_anew() -> None:
    """Dropped, added, regrouped, or changed in place: only what is equal is taken."""
    reward, given = faulty("returns"), [Answer(text="x", info={"bad": False, "tags": []}, index=i) for i in range(6)]
    with RewardRunner() as runner:
        hand_over(runner, reward, given)
        given[0].info["tags"].append("late")  # the very object that the runner was given
        asked = [
            given[0],
            replace(given[1], text="y"),
            replace(given[2], info={"bad": True, "kind": "nan"}),
            replace(given[3], group="other"),
            given[4],
            replace(given[4], index=77),
        ]
        found, tally = runner.judge(reward, asked)
        singles = runner.settle()
    assert found[0:2] + found[3:] == [Score(1.0)] * 5
    assert "nan" in found[2].reason  # type: ignore[union-attr]
    assert (tally.judged, tally.failed) == (6, 1)
    assert (singles.judged, singles.ahead) == (6, 1)


def test_a_verdict_is_found_after_the_answer_went_to_another_rank_and_back() -> None:
    written = [Origin.USER, Origin.POLICY]
    row = {"id": "a", "answer": 0.1, "nested": {"b": [1, None], "c": "é"}}
    sample = Sample(tokens=[4, 5], origin=written, trained=[False, True], group="0/0", query="a", index=3, info=row)
    again = sample_from_json(sample_to_json(sample))
    reward = faulty("good")
    with RewardRunner() as runner:
        hand_over(runner, reward, [answer_of(sample, str)])
        runner.judge(reward, [answer_of(again, str)])
        assert runner.settle().ahead == 1


def test_two_calls_share_what_was_judged_and_the_next_step_does_not() -> None:
    reward, given = faulty("good"), answers(6)
    with RewardRunner() as runner:
        hand_over(runner, reward, given)
        runner.judge(reward, given[:2])
        runner.judge(reward, given[2:4])
        assert (runner.settle().ahead, runner.starts) == (4, 1)
        runner.judge(reward, given[4:])
        assert runner.settle().ahead == 0


def test_answers_that_still_wait_are_judged_by_judge(tmp_path: Path) -> None:
    """The first is held up until `judge` has been called; nobody waits for the others' turn."""
    file, gate = tmp_path / "mine.py", tmp_path / "gate"
    file.write_text(
        "import os, time\n"
        "def f(answer):\n"
        f"    while answer.index == 5 and not os.path.exists({str(gate)!r}):\n        time.sleep(0.01)\n"
        "    return float(answer.index)\n"
    )
    reward, given = load_reward(f"{file}:f"), answers(6)
    with RewardRunner() as runner:
        hand_over(runner, reward, given[::-1], wait=False)
        threading.Timer(0.3, gate.touch).start()
        found, _ = runner.judge(reward, given)
        assert runner.settle().ahead == 1
    assert found == [Score(float(i)) for i in range(6)]


def test_another_reward_of_the_same_name_finds_nothing(tmp_path: Path) -> None:
    made = []
    for value in (1.0, 2.0):
        file = tmp_path / f"v{value:.0f}.py"
        file.write_text(f"def f(answer):\n    return {value}\n")
        made.append(replace(load_reward(f"{file}:f"), name="mine"))
    with RewardRunner() as runner:
        hand_over(runner, made[0], answers(3))
        assert runner.judge(made[1], answers(3))[0] == [Score(2.0)] * 3
        hand_over(runner, made[0], answers(3))
        hand_over(runner, made[1], answers(3))
        assert runner.judge(made[1], answers(3))[0] == [Score(2.0)] * 3
        assert runner.settle().ahead == 3


@pytest.mark.parametrize(
    "reward",
    [faulty("ranks"), faulty("ranks", scope="group"), Reward("here", lambda answer: 1.0, where="inline")],
    ids=["list", "group", "inline"],
)
def test_what_may_compare_answers_or_runs_here_waits_for_all(reward: Reward) -> None:
    with RewardRunner() as runner:
        for answer in answers(3):
            runner.judge_ahead(reward, answer)
        assert runner.starts == 0
        runner.judge(reward, answers(3))
        assert runner.settle().judged == 0


@pytest.mark.parametrize("function", ["sleeps", "spins", "giant_power"])
def test_close_waits_for_no_deadline_and_leaves_nothing(function: str) -> None:
    before = threading.active_count()
    runner, reward = RewardRunner(), faulty(function, deadline=600.0)
    hand_over(runner, reward, answers(4, bad=(1,)), wait=False)
    until(lambda: len(runner._ahead[reward.name]._found) == 1)  # answer 0 is judged: 1 is in hand
    pids = runner.pids()
    assert alive(pids[0])
    begun = time.monotonic()
    runner.close()
    assert time.monotonic() - begun < 10
    assert wait_dead(pids)
    assert threading.active_count() == before
    assert runner.pids() == []
    assert runner.judge(reward, answers(2))[0] == [Score(1.0)] * 2  # usable again, and nothing killed counts
    runner.close()


def test_a_program_that_closes_nothing_ends_and_takes_the_worker_along(tmp_path: Path) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(
        "import time, posttrain.rewards as r\n"
        "runner = r.RewardRunner()\n"
        f"reward = r.load_reward({str(FAULTY)!r} + ':sleeps')\n"
        "runner.judge(reward, [r.Answer(text='')])\n"
        "runner.judge_ahead(reward, r.Answer(text='', info={'bad': True}))\n"
        "time.sleep(0.3)\n"
        "print(runner.pids()[0], flush=True)\n"
    )
    source = str(Path(__import__("posttrain").__path__[0]).parent)
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": source}
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert wait_dead([int(run.stdout)])
