"""What the infrastructure does wrong is retried, then marked, counted and kept from everything else."""

from __future__ import annotations

import gc
import math
import os
import time
from pathlib import Path

import psutil
import pytest

from posttrain.errors import RewardError
from posttrain.rewards import Answer, Limits, Reward, RewardRunner, load_reward
from posttrain.types import InfraError, Score, Timeout

FAULTY = Path(__file__).with_name("faulty.py")


def faulty(function: str, **fields: object) -> Reward:
    return load_reward(f"{FAULTY}:{function}", **{"deadline": 20.0, **fields})


def answers(count: int, bad: tuple[int, ...] = (), **info: object) -> list[Answer]:
    return [Answer(text=f"a{i}", info={"id": i, "bad": i in bad, **info}, index=i, num_tokens=i) for i in range(count)]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_dead(pids: list[int], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    "function",
    ["raises", "exits", "sys_exits", "segfaults", "allocates", "writes_much"],
)
def test_one_poisonous_answer_among_sixteen_marks_only_that_one(function: str) -> None:
    with RewardRunner() as runner:
        found, tally = runner.judge(faulty(function), answers(16, bad=(5,)))
    assert [index for index, verdict in enumerate(found) if isinstance(verdict, InfraError)] == [5]
    assert [verdict for index, verdict in enumerate(found) if index != 5] == [Score(1.0)] * 15
    assert found[5] is not None
    assert found[5].reason
    assert (tally.judged, tally.failed, tally.timed_out) == (16, 1, 0)
    assert tally.retried >= 1


def test_a_list_that_fails_is_asked_for_again_as_it_was(tmp_path: Path) -> None:
    """Never as lists of one, to which a function that compares answers would say something else."""
    seen = tmp_path / "seen"
    both = [*answers(4), *answers(4, bad=(3,))]
    for answer in both:
        answer.info["file"] = str(seen)  # type: ignore[index]
    with RewardRunner(max_failure_rate=0.9) as runner:
        found, tally = runner.judge(faulty("raises_in_list", answers_per_call=4), both)
    assert found[:4] == [Score(1.0)] * 4
    assert all(isinstance(verdict, InfraError) for verdict in found[4:])
    assert seen.read_text().split() == ["4", "4", "4"]
    assert (tally.judged, tally.failed, tally.retried) == (8, 4, 4)


@pytest.mark.parametrize("where", ["process", "inline"])
@pytest.mark.parametrize(("returned", "words"), [([1.0], "1 value for 6 answers"), (1.0, "a float, not a list of 6 values")])
def test_a_list_function_that_breaks_its_contract_stops_at_once(
    where: str, returned: object, words: str, tmp_path: Path
) -> None:
    """It is not asked again, with a shorter list least of all."""
    if where == "process":
        file = tmp_path / "mine.py"
        file.write_text(f"def f(answers):\n    return {returned}\n")
        reward = load_reward(f"{file}:f")
    else:
        reward = Reward("f", lambda answers: returned, where="inline")
    with RewardRunner(max_failure_rate=1.0) as runner:
        with pytest.raises(RewardError, match=f"'f' returned {words}"):
            runner.judge(reward, answers(6))
        assert runner.starts == (1 if where == "process" else 0)


def test_a_hang_is_told_at_its_first_deadline_and_given_up_after_three() -> None:
    runner = RewardRunner(max_failure_rate=0.9)
    begun = time.monotonic()
    with (
        runner,
        pytest.warns(UserWarning, match=r"reward 'sleeps': no answer within 0\.3 s; retrying in a fresh process") as told,
        pytest.raises(RewardError, match=r"no answer within 0\.3 s, 3 times in a row and no success.*@0\.6s"),
    ):
        runner.judge(faulty("sleeps", deadline=0.3), answers(9, bad=tuple(range(9))))
    assert len(told) == 1
    assert time.monotonic() - begun < 3 * 0.3 + 8  # three deadlines, and starting three workers on a busy machine


@pytest.mark.filterwarnings("ignore:reward")
def test_hangs_between_successes_do_not_stop_it() -> None:
    with RewardRunner(max_failure_rate=0.9) as runner:
        found, tally = runner.judge(faulty("sleeps", deadline=0.3), answers(6, bad=(1, 2)))
    assert [index for index, verdict in enumerate(found) if isinstance(verdict, Timeout)] == [1, 2]
    assert tally.timed_out == 2


@pytest.mark.filterwarnings("ignore:reward")
@pytest.mark.parametrize("function", ["sleeps", "spins", "giant_power"])
def test_a_hang_is_killed_at_the_deadline_and_marked_timeout(function: str) -> None:
    with RewardRunner() as runner:
        begun = time.monotonic()
        found, tally = runner.judge(faulty(function, deadline=0.7), answers(16, bad=(3,)))
        spent = time.monotonic() - begun
    assert [index for index, verdict in enumerate(found) if isinstance(verdict, Timeout)] == [3]
    assert sum(verdict == Score(1.0) for verdict in found) == 15
    assert (tally.failed, tally.timed_out, tally.retried) == (1, 1, 1)
    assert spent < 0.7 * 2 + 8  # the two tries, and starting three workers on a busy machine


@pytest.mark.parametrize("kind", ["nan", "inf", "huge", "beyond-float32", "text", "dict", "list", "complex"])
def test_what_is_no_finite_number_is_a_failure_of_the_reward(kind: str) -> None:
    with RewardRunner() as runner:
        found, tally = runner.judge(faulty("returns"), answers(10, bad=(0,), kind=kind))
    assert isinstance(found[0], InfraError)
    assert "returned" in found[0].reason
    assert found[1:] == [Score(1.0)] * 9
    assert tally.failed == 1


def test_the_reason_is_the_first_traceback() -> None:
    with RewardRunner() as runner:
        found, _ = runner.judge(faulty("raises"), answers(16, bad=(5,)))
        assert "ValueError: poison in a5" in found[5].reason  # type: ignore[union-attr]
        first = runner.first_failure("raises")
    assert "faulty.py" in first
    assert "worker.py" not in first, "the lines between the process and the function are nobody's business"
    assert first == first.rstrip()
    assert first.count("File ") == 1


def test_a_fresh_worker_answers_what_a_worn_one_could_not() -> None:
    with RewardRunner() as runner:
        found, tally = runner.judge(faulty("fails_once_a_process"), answers(5))
        assert found == [Score(1.0)] * 5
        assert (tally.failed, tally.retried) == (0, 2)
        assert runner.starts == 2


def test_a_flood_of_output_fills_neither_memory_nor_disk() -> None:
    process, before_disk = psutil.Process(), psutil.disk_usage("/tmp").used
    gc.collect()
    before = process.memory_info().rss
    with RewardRunner() as runner:
        found, tally = runner.judge(faulty("prints_much", deadline=60.0), answers(2, bad=(1,)))  # 200 MB
        grown, kept = process.memory_info().rss - before, runner.printed("prints_much")
        worker = psutil.Process(runner.pids()[0]).memory_info().rss
    assert found == [Score(1.0)] * 2
    assert tally.failed == 0
    assert grown < 30e6
    assert worker < 150e6
    assert psutil.disk_usage("/tmp").used - before_disk < 150e6
    assert len(kept) <= 8000
    assert kept.endswith("the last line\n")


@pytest.mark.parametrize("bad", [(), (0,)])
def test_children_die_with_their_worker(tmp_path: Path, bad: tuple[int, ...]) -> None:
    file = tmp_path / "pids"
    expected = 8 if bad else 4
    with RewardRunner() as runner:
        found, _ = runner.judge(faulty("leaves_children"), answers(1, bad=bad, file=str(file)))
        assert isinstance(found[0], InfraError) == bool(bad)
        pids = [int(line) for line in file.read_text().split()]
        assert len(pids) == expected
        if not bad:
            assert all(alive(pid) for pid in pids)
    assert wait_dead(pids)


def test_a_worker_that_gathers_children_is_replaced() -> None:
    with RewardRunner() as runner:
        found, _ = runner.judge(faulty("forks_one"), answers(20))
        assert found == [Score(1.0)] * 20
        assert runner.starts >= 2
        left = psutil.Process().children(recursive=True)
        assert len(left) <= 11
    assert wait_dead([child.pid for child in left])


def test_secrets_of_the_environment_are_not_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "CANARY")
    with RewardRunner() as runner:
        assert runner.judge(faulty("sees_secret"), answers(1))[0] == [Score(0.0)]
    with RewardRunner(limits=Limits(env=("OPENAI_API_KEY",))) as runner:  # and are, where they are named
        assert runner.judge(faulty("sees_secret"), answers(1))[0] == [Score(1.0)]


def test_standard_streams_are_no_way_to_the_parent() -> None:
    with RewardRunner() as runner:
        assert runner.judge(faulty("reads_stdin"), answers(3))[0] == [Score(0.0)] * 3
        assert runner.judge(faulty("forges"), answers(3))[0] == [Score(0.0)] * 3


def test_above_the_rate_the_run_stops_and_says_why() -> None:
    with RewardRunner(max_failure_rate=0.2) as runner, pytest.raises(RewardError) as caught:
        runner.judge(faulty("raises"), answers(16, bad=(1, 4, 5, 9)))
    message = str(caught.value)
    assert "reward 'raises' failed on 4 of its last 16" in message
    assert "25%" in message
    assert "allowed 20%" in message
    assert "ValueError: poison in a1" in message


def test_below_the_rate_it_goes_on_and_the_window_spans_calls() -> None:
    with RewardRunner(max_failure_rate=0.2) as runner:
        for _ in range(3):
            runner.judge(faulty("raises"), answers(16, bad=(1, 4, 5)))
        with pytest.raises(RewardError, match="failed on 13 of its last 62"):
            runner.judge(faulty("raises"), answers(16, bad=(0, 1, 2, 3, 4, 5)))


def test_a_reward_of_which_nothing_succeeds_stops_at_once() -> None:
    with RewardRunner() as runner, pytest.raises(RewardError, match="failed on 3 of its last 3"):
        runner.judge(faulty("raises"), answers(3, bad=(0, 1, 2)))


@pytest.mark.filterwarnings("ignore:reward")
def test_hangs_everywhere_stop_the_run_long_before_every_deadline() -> None:
    with RewardRunner() as runner, pytest.raises(RewardError, match=r"no answer within 0\.1 s"):
        runner.judge(faulty("sleeps", deadline=0.1), answers(500, bad=tuple(range(500))))


def test_a_function_that_cannot_be_loaded_stops_the_run_with_its_traceback(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module_anywhere\n\ndef reward(answer):\n    return 1.0\n")
    with RewardRunner() as runner, pytest.raises(RewardError, match="could not be loaded") as caught:
        runner.judge(load_reward(f"{file}:reward"), answers(2))
    assert "no_such_module_anywhere" in str(caught.value)


def test_a_script_that_trains_when_imported_is_told_to_guard_it(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(
        "from posttrain.rewards import Answer, RewardRunner, load_reward\n"
        "def reward(answer):\n    return 1.0\n"
        "RewardRunner().judge(load_reward(__file__ + ':reward'), [Answer(text='')])\n"
    )
    with RewardRunner() as runner, pytest.raises(RewardError, match="__main__"):
        runner.judge(load_reward(f"{file}:reward"), answers(1))


def test_a_group_that_fails_is_marked_as_a_whole_and_no_other() -> None:
    members = [Answer(text=str(i), group=f"g{i // 4}", info={"bad": i == 9}, index=i) for i in range(24)]
    with RewardRunner() as runner:
        found, tally = runner.judge(faulty("poison_in_group", scope="group"), members)
    assert [index for index, verdict in enumerate(found) if isinstance(verdict, InfraError)] == [8, 9, 10, 11]
    assert (tally.judged, tally.failed) == (24, 4)


def test_a_worker_lives_from_call_to_call_and_dies_at_close() -> None:
    runner = RewardRunner()
    reward = faulty("good")
    runner.judge(reward, answers(3))
    pids = runner.pids()
    runner.judge(reward, answers(3))
    assert runner.pids() == pids
    assert runner.starts == 1
    runner.close()
    assert wait_dead(pids)
    assert runner.judge(reward, answers(1))[0] == [Score(1.0)]  # usable again
    runner.close()


def test_a_worker_killed_from_outside_is_replaced() -> None:
    with RewardRunner() as runner:
        runner.judge(faulty("good"), answers(3))
        os.kill(runner.pids()[0], 9)
        found, tally = runner.judge(faulty("good"), answers(3))
    assert found == [Score(1.0)] * 3
    assert tally.failed == 0


def test_several_workers_give_the_same_verdicts_in_order() -> None:
    with RewardRunner(workers=3) as runner:
        found, tally = runner.judge(faulty("raises"), answers(40, bad=(7, 21)))
        assert len(runner.pids()) == 3
    assert [index for index, verdict in enumerate(found) if isinstance(verdict, InfraError)] == [7, 21]
    assert tally.judged == 40


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    import signal
    import subprocess
    import sys

    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time, posttrain.rewards as r\n"
        "runner = r.RewardRunner()\n"
        f"runner.judge(r.load_reward({str(FAULTY)!r} + ':good'), [r.Answer(text='')])\n"
        "print(runner.pids()[0], flush=True)\n"
        "time.sleep(600)\n"
    )
    source = str(Path(__import__("posttrain").__path__[0]).parent)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": source}
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_dead([worker])


def test_a_fork_of_the_trainer_does_not_touch_the_trainers_workers() -> None:
    with RewardRunner() as runner:
        reward = faulty("good")
        runner.judge(reward, answers(2))
        child = os.fork()
        if child == 0:
            ok = runner.judge(reward, answers(2))[0] == [Score(1.0)] * 2
            runner.close()
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        found, _ = runner.judge(reward, answers(2))
        assert found == [Score(1.0)] * 2
        assert runner.starts == 1


def test_files_of_a_worker_are_gone_after_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with RewardRunner() as runner:
        runner.judge(faulty("writes_much"), answers(12, bad=(0,)))
        assert list(tmp_path.glob("posttrain-reward-*"))
        assert all(file.stat().st_size <= 64 << 20 for file in tmp_path.rglob("*") if file.is_file())
    assert not list(tmp_path.iterdir())


def test_inline_failures_are_marked_too() -> None:
    def odd(answer: Answer) -> float:
        if answer.index == 2:
            raise KeyError("no such thing")
        return math.nan if answer.index == 4 else 1.0

    with RewardRunner() as runner:
        found, tally = runner.judge(Reward("odd", odd, where="inline"), answers(16))
    assert [index for index, verdict in enumerate(found) if isinstance(verdict, InfraError)] == [2, 4]
    assert (tally.failed, tally.retried) == (2, 2)
