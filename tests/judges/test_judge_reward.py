"""A judge as a reward: scores in [-1, 1], and samples that are masked where it has none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from posttrain.errors import ConfigError, RewardError
from posttrain.judges import ScriptedJudge
from posttrain.rewards import Answer, RewardRunner, named_rewards, score
from posttrain.rewards.judge import JudgeReward
from posttrain.rewards.reward import Reward
from posttrain.types import InfraError, Sample, Score


def script(text: str, options: tuple[str, ...]) -> list[float] | None:
    """Rates 8 where 7, 8 and 9 have 0.2, 0.5 and 0.1; breaks at 'broken' and is silent at 'silent'."""
    if "broken" in text:
        return None
    p = [0.0] * 10 if "silent" in text else [0.0] * 6 + [0.2, 0.5, 0.1, 0.0]
    return [math.log(x) if x else -math.inf for x in p]


def sample(group: str) -> Sample:
    return Sample(
        tokens=[1, 5, 6],
        origin=[3, 5, 5],
        trained=[False, True, True],
        group=group,
        info={"prompt": [{"role": "user", "content": group}]},
    )


def test_the_score_is_the_expected_rating() -> None:
    reward = Reward("judge", JudgeReward("script", judge=ScriptedJudge(script)), where="inline")
    assert reward.takes_list
    answers = [Answer(text="a", prompt="q"), Answer(text="b", messages=[{"role": "user", "content": "broken"}])]
    good, bad = reward.fn(answers)
    assert good.value == pytest.approx(0.527778, abs=1e-6)
    assert isinstance(bad, InfraError)


@pytest.mark.parametrize("trouble", ["broken", "silent"])
def test_a_judge_without_a_rating_masks_the_sample(trouble: str) -> None:
    reward = Reward("judge", JudgeReward("script", judge=ScriptedJudge(script)), where="inline")
    samples = [sample("fine") for _ in range(9)] + [sample(trouble)]
    with RewardRunner() as runner:
        judged, report = score([reward], samples, str, runner=runner)
    assert [type(one.verdicts["judge"]) for one in judged] == [Score] * 9 + [InfraError]
    assert judged[-1].reward is None
    assert not any(judged[-1].trained)
    assert all(one.reward == pytest.approx(0.527778, abs=1e-6) and any(one.trained) for one in judged[:9])
    assert report.num_masked == 1


def test_a_judge_that_never_answers_stops_the_run() -> None:
    reward = Reward("judge", JudgeReward("script", judge=ScriptedJudge(script)), where="inline")
    with RewardRunner() as runner, pytest.raises(RewardError, match="the judge gave no rating"):
        score([reward], [sample("broken") for _ in range(10)], str, runner=runner)


def test_it_has_a_name_for_recipes(tmp_path: Path, small_model: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def rates(text, options):\n    return [-9.0] * 9 + [-0.01] if 'longer' in text else [-0.01] + [-9.0] * 9\n")
    (reward,) = named_rewards([f"judge:{file}:rates*0.5"])
    assert (reward.name, reward.weight, reward.where) == ("judge", 0.5, "inline")
    short, long = reward.fn([Answer(text="x", prompt="q"), Answer(text="a longer one", prompt="q")])
    assert short.value < -0.9 < 0.9 < long.value
    (local,) = named_rewards([f"judge:{small_model}?word-problem-check"])
    assert (local.fn.spec, local.fn.template) == (f"local:{small_model}", "word-problem-check")
    (verdict,) = local.fn([Answer(text="7", prompt="3 + 4?")])
    assert -1 <= verdict.value <= 1
    (remote,) = named_rewards(["judge:openai:http://host:8000/v1#some/judge?rating-reasoned@90s*2"])
    assert (remote.fn.spec, remote.fn.template) == ("openai:http://host:8000/v1#some/judge", "rating-reasoned")
    assert (remote.deadline, remote.weight) == (90.0, 2.0)


def test_impossible_ones_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no values"):
        named_rewards(["judge:tiny?pairwise"])
    with pytest.raises(ConfigError, match="nearest: 'rating'"):
        named_rewards(["judge:tiny?ratings"])
    with pytest.raises(ConfigError, match="write judge:FOLDER"):
        named_rewards(["judge:"])
