"""Samples are judged: verdicts become numbers, weights and gates one reward, failures a mask."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.rewards import (
    Answer,
    MathsExact,
    Reward,
    RewardRunner,
    answer_of,
    load_reward,
    named_rewards,
    score,
)
from posttrain.types import InfraError, Origin, Sample, Score, Verdict, Wrong

FAULTY = Path(__file__).with_name("faulty.py")
WORDS = ["<end>", "p", "q", "s", "w", "u", "o", "c", "t", "f", "n"]


def decode(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def sample(text: str, *, group: str = "g", length: int = 1, finish: str = "stop", **info: object) -> Sample:
    written = [WORDS.index(letter) for letter in text] * length + ([0] if finish == "stop" else [])
    return Sample(
        tokens=[1, 2, *written],
        origin=[Origin.USER, Origin.TEMPLATE, *[Origin.POLICY] * len(written)],
        trained=[False, False, *[True] * len(written)],
        group=group,
        finish=finish,
        info=dict(info),
    )


def constant(value: float | Verdict | None, name: str, **fields: object) -> Reward:
    def fn(answer: Answer) -> float | Verdict | None:
        return value

    return Reward(name, fn, where="inline", **fields)  # type: ignore[arg-type]


def test_an_answer_is_the_text_without_its_stop_token() -> None:
    answer = answer_of(sample("sw", group="g3", answer="7", rewards={}), decode, stop_tokens={0})
    assert (answer.text, answer.prompt, answer.num_tokens, answer.group) == ("sw", "pq", 3, "g3")
    assert answer.info == {"answer": "7"}
    assert answer_of(sample("sw"), decode).text == "sw<end>"
    assert answer_of(sample("sw", finish="length"), decode, stop_tokens={4}).text == "sw"


def test_verdicts_have_the_numbers_of_the_task() -> None:
    samples = [sample(letter) for letter in "swuoctf"]
    rewards = [load_reward(f"{FAULTY}:verdicts")]
    with RewardRunner() as runner:
        plain, _ = score(rewards, samples, decode, runner=runner, stop_tokens={0})
        values = {"Wrong": -1.0, "Overlong": -0.5}
        told, report = score(rewards, samples, decode, runner=runner, stop_tokens={0}, values=values)
        with pytest.raises(ConfigError, match="nearest: 'Wrong'"):
            score(rewards, samples, decode, runner=runner, values={"Worng": 1.0})
    assert [s.reward for s in plain] == [0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert [s.reward for s in told] == [0.5, -1.0, 0.0, -0.5, 0.0, 1.0, -1.0]
    assert told[1].verdicts == {"verdicts": Wrong()}
    assert dict(report.kinds["verdicts"]) == {"Score": 2, "Wrong": 2, "Unparseable": 1, "Overlong": 1, "Crashed": 1}
    assert report.means["verdicts"] == pytest.approx((0.5 - 1 - 0.5 + 1 - 1) / 7)


def test_weights_add_up() -> None:
    rewards = [constant(1.0, "a", weight=2.0), constant(0.5, "b", weight=-1.0), constant(9.0, "shown", weight=0.0)]
    with RewardRunner() as runner:
        found, report = score(rewards, [sample("s")], decode, runner=runner)
    assert found[0].reward == pytest.approx(2.0 * 1.0 - 1.0 * 0.5)
    assert found[0].info["rewards"] == {"a": 1.0, "b": 0.5, "shown": 9.0}
    assert report.metrics()["reward/shown/mean"] == 9.0


@pytest.mark.parametrize(
    ("gate", "expected", "closed"),
    [(1.0, 1.5, 0), (0.0, 0.0, 1), (-1.0, -0.5, 1), (Wrong(), 0.0, 1), (None, 1.0, 0)],
)
def test_a_closed_gate_counts_zero(gate: float | Verdict | None, expected: float, closed: int) -> None:
    rewards = [constant(1.0, "right", gate="format"), constant(gate, "format", weight=0.5)]
    with RewardRunner() as runner:
        found, report = score(rewards, [sample("s")], decode, runner=runner)
    assert found[0].reward == expected
    assert report.closed["right"] == closed
    assert found[0].verdicts["right"] == Score(1.0)  # still told


def test_gates_behind_gates() -> None:
    rewards = [constant(1.0, "a", gate="b"), constant(1.0, "b", gate="c"), constant(0.0, "c")]
    with RewardRunner() as runner:
        assert score(rewards, [sample("s")], decode, runner=runner)[0][0].reward == 0.0


def test_rewards_that_do_not_fit_together_are_refused() -> None:
    with RewardRunner() as runner:
        for rewards, words in [
            ([constant(1.0, "a", gate="formt"), constant(1.0, "format")], "nearest: 'format'"),
            ([constant(1.0, "a", gate="b"), constant(1.0, "b", gate="a")], "circle"),
            ([constant(1.0, "a", gate="a")], "circle"),
            ([constant(1.0, "a"), constant(1.0, "a")], "own name"),
        ]:
            with pytest.raises(ConfigError, match=words):
                score(rewards, [sample("s")], decode, runner=runner)


def test_a_failed_sample_is_masked_and_its_group_is_not() -> None:
    samples = [sample("s", group="g0", bad=i == 3) for i in range(16)]
    rewards = [load_reward(f"{FAULTY}:raises", weight=0.0), constant(1.0, "other")]
    with RewardRunner() as runner:
        found, report = score(rewards, samples, decode, runner=runner)
    assert [s.reward for s in found] == [1.0] * 3 + [None] + [1.0] * 12
    assert found[3].trained == [False] * len(found[3])
    assert isinstance(found[3].verdicts["raises"], InfraError)
    assert found[3].info["rewards"] == {"other": 1.0}
    assert all(s.trained == samples[0].trained for i, s in enumerate(found) if i != 3)
    assert (report.num_samples, report.num_masked, report.num_unjudged) == (16, 1, 0)
    assert "poison" in report.failures["raises"]
    assert report.metrics()["reward/raises/failed"] == 1.0


def test_nothing_to_say_is_not_zero() -> None:
    rewards = [constant(None, "silent"), constant(2.0, "loud")]
    with RewardRunner() as runner:
        spoken, _ = score(rewards, [sample("s")], decode, runner=runner)
        silent, report = score(rewards[:1], [sample("s")], decode, runner=runner)
    assert spoken[0].reward == 2.0
    assert list(spoken[0].verdicts) == ["loud"]
    assert silent[0].reward is None
    assert not any(silent[0].trained)
    assert (report.num_unjudged, report.num_masked) == (1, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_group_rewards_see_whole_groups(workers: int) -> None:
    # shuffled groups of 3, 2 and 1; the value is the size of the group, and 0.01 for each shorter answer in it
    samples = [
        sample("s", group=group, length=length) for group, length in zip("abacab", [3, 1, 1, 1, 2, 2], strict=True)
    ]
    rewards = [load_reward(f"{FAULTY}:ranks", scope="group")]
    with RewardRunner(workers=workers) as runner:
        found, _ = score(rewards, samples, decode, runner=runner)
    assert [s.reward for s in found] == pytest.approx([3.02, 2.0, 3.0, 1.0, 3.01, 2.01])


def test_query_rewards_see_all_prompts_of_a_question() -> None:
    samples = [sample("s", group=f"g{i}").with_(query="q") for i in range(3)]
    with RewardRunner() as runner:
        found, _ = score([load_reward(f"{FAULTY}:ranks", scope="query")], samples, decode, runner=runner)
    assert [s.reward for s in found] == [3.0, 3.0, 3.0]


def test_no_samples() -> None:
    with RewardRunner() as runner:
        found, report = score([load_reward(f"{FAULTY}:good")], [], decode, runner=runner)
    assert found == []
    assert report.num_samples == 0


def test_a_row_that_is_not_json_is_named() -> None:
    with RewardRunner() as runner, pytest.raises(DataError, match="row-5"):
        score([load_reward(f"{FAULTY}:good")], [sample("s", id="row-5", thing=object())], decode, runner=runner)


def test_a_worker_imports_nothing_heavy() -> None:
    source = str(Path(__import__("posttrain").__path__[0]).parent)
    code = "import sys, posttrain.rewards.worker, posttrain.rewards, posttrain.tasks; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": source}, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "numpy", "transformers", "sympy", "math_verify", "reasoning_gym", "matplotlib", "datasets"}
    assert heavy & set(done.stdout.split()) == set()


# ---------------------------------------------------------------------------------------------- loading


def test_a_file_is_read_and_not_run_here(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'a').write('x')\n"
        "from posttrain.rewards import Answer\n"
        "def one(answer):\n    return 1.0\n"
        "def many(answers):\n    return [2.0] * len(answers)\n"
        "def annotated(batch: 'list[Answer]'):\n    return [3.0] * len(batch)\n"
        "def none():\n    return 1.0\n"
    )
    rewards = [load_reward(f"{file}:{name}") for name in ("one", "many", "annotated")]
    assert [reward.takes_list for reward in rewards] == [False, True, True]
    assert not (tmp_path / "ran").exists()
    with RewardRunner() as runner:
        assert [runner.judge(reward, [Answer(text="")] * 2)[0] for reward in rewards] == [
            [Score(value)] * 2 for value in (1.0, 2.0, 3.0)
        ]
    assert (tmp_path / "ran").read_text() == "xxx"
    for spec, words in [
        (f"{file}:man", "nearest: 'many'"),
        (f"{tmp_path}/mien.py:one", r"nearest: 'mine\.py'"),
        (f"{file}:none", "no parameter"),
        (f"{file}", r"write file\.py:function"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load_reward(spec)
    with pytest.raises(ConfigError, match="never run here"):
        load_reward(f"{file}:one", where="inline")
    with pytest.raises(ConfigError, match="list"):
        load_reward(f"{file}:one", scope="group")


def shorter(answer: Answer, limit: int = 3) -> bool:
    return answer.num_tokens < limit


def test_functions_of_a_module_and_partials_are_found_by_the_worker() -> None:
    short, long = Answer(text="", num_tokens=2), Answer(text="", num_tokens=9)
    with RewardRunner() as runner:
        assert runner.judge(Reward("short", shorter), [short, long])[0] == [Score(1.0), Wrong()]
        ten = Reward("ten", functools.partial(shorter, limit=10))
        assert runner.judge(ten, [short, long])[0] == [Score(1.0)] * 2


def test_what_a_worker_could_not_find_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="no name another process"):
        Reward("inner", lambda answer: 1.0)
    with pytest.raises(ConfigError, match="not JSON"):
        Reward("odd", functools.partial(shorter, limit=object()))


@pytest.mark.parametrize(
    "fields",
    [{"scope": "all"}, {"weight": float("nan")}, {"deadline": 0.0}, {"where": "thread"}, {"answers_per_call": 0}],
)
def test_impossible_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="found"):
        Reward("a", MathsExact(), **fields)  # type: ignore[arg-type]


def test_rewards_by_name() -> None:
    found = named_rewards(["maths-exact", "format*0.5", "length:64,16*-2", f"{FAULTY}:good*0.1"])
    assert [(reward.name, reward.weight) for reward in found] == [
        ("maths-exact", 1.0), ("format", 0.5), ("length", -2.0), ("good", 0.1),
    ]  # fmt: skip
    for spec, words in [
        ("mathsexact", "nearest: 'maths-exact'"),
        ("format*x", "a number"),
        ("length:3", "length:64,16"),
    ]:
        with pytest.raises(ConfigError, match=words):
            named_rewards([spec])


def test_a_name_may_hold_its_deadline(tmp_path: Path) -> None:
    file = tmp_path / "mine@2s.py"
    file.write_text("def f(answer):\n    return 1.0\n")
    found = named_rewards([f"{file}:f@5s*0.5", "maths@0.5s", "format"])
    expected = [("f", 5.0, 0.5), ("maths", 0.5, 1.0), ("format", 30.0, 1.0)]
    assert [(reward.name, reward.deadline, reward.weight) for reward in found] == expected
    with pytest.raises(ConfigError, match="above 0"):
        named_rewards(["maths@0s"])
