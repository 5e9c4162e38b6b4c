"""Rows that judges make: soft-labelled pairs, judgements to learn from (FARE, arXiv:2510.17793), and new prompts."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import ConfigError, DataError, RewardError
from posttrain.records import sample_from_json
from posttrain.rewards import Reward
from posttrain.samplers.scripted import ScriptedSampler
from posttrain.synthesis import MAKERS
from posttrain.synthesis.judgements import Judgements, curriculum, keep_one, keep_probability, rollout_batches
from posttrain.synthesis.maker import Workshop
from posttrain.synthesis.preferences import Preferences
from posttrain.synthesis.prompts import Prompts, ngrams, shared
from posttrain.types import Sample, Sampling

WORDS = ["red", "blue fish", "a green bird sings", "no"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def workshop(folder: Path, model: Path, rows: list[dict[str, Any]], answers: Any, *, samples: int, **more: Any) -> Workshop:
    """A workshop whose start writes what `answers` says: texts by sample number, or a function of the prompt's text and it."""
    folder.mkdir(parents=True, exist_ok=True)
    shop = Workshop({"data": rows}, {"start": model}, folder, samples=samples, sampling=Sampling(max_tokens=64), quiet=True, **more)
    who = shop.model()

    def written(prompt: Sample, index: int) -> list[int]:
        text = answers(who.renderer.decode(prompt.tokens), index) if callable(answers) else answers[index % len(answers)]
        return [*who.tokenizer(text, add_special_tokens=False)["input_ids"], who.renderer.stop_tokens[0]]

    shop._opened["start"] = replace(who, sampler=ScriptedSampler(written))  # type: ignore[arg-type]
    return shop


def judge_file(folder: Path, body: str) -> str:
    """A judge of the user's own: `worth(answer)` is the log-odds of an answer."""
    file = folder / "judge.py"
    file.write_text(
        "import math, re, pathlib\n"
        f"{body}\n"
        "def judge(text, options):\n"
        "    shown = re.findall(r'```\\n(.*?)\\n```', text, re.DOTALL)\n"
        "    with pathlib.Path(__file__).with_name('asked.txt').open('a') as out: out.write('x')\n"
        "    odds = [worth(answer, text) for answer in shown]\n"
        "    if None in odds: return None\n"
        "    total = sum(math.exp(x) for x in odds)\n"
        "    return [math.log(0.9 * math.exp(x) / total) for x in odds]\n"
    )
    return f"{file}:judge"


LENGTH = "def worth(answer, text): return len(answer) / 10"


def asked(folder: Path) -> int:
    file = folder / "asked.txt"
    return len(file.read_text()) if file.exists() else 0


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_makers_are_listed() -> None:
    assert {"judgements", "preferences", "prompts"} <= set(MAKERS)


# ---------------------------------------------------------------------------------------------------------- preferences


def test_pairs_carry_the_judges_probability(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": f"q{i}", "prompt": user(f"Say something {i}.")} for i in range(3)]
    shop = workshop(tmp_path / "stage", small_model, rows, WORDS[:2], samples=2)
    made = Preferences(judge=judge_file(tmp_path, LENGTH)).make(shop)
    assert len(made.rows) == 3
    for number, row in enumerate(made.rows):
        assert (row["id"], row["prompt"]) == (f"q{number}", user(f"Say something {number}."))
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("blue fish", "red")
        assert row["columns"]["preference"] == pytest.approx(sigmoid(0.6))
        assert sample_from_json(row["chosen_sample"]).tokens != sample_from_json(row["rejected_sample"]).tokens
    assert made.metrics["consistent"] == 1.0
    assert made.metrics["on_neither"] == pytest.approx(0.1)
    records = made.records["judgements"]
    assert len(records) == 3
    wanted = {"id", "prompt", "answers", "template", "principle", "orders", "p", "neither", "judge", "versions", "error", "pair"}
    assert wanted <= set(records[0])
    assert records[0]["judge"].startswith("scripted:judge.py:judge@")
    json.dumps(records)


def test_a_judge_of_slots_makes_no_pair(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": "q", "prompt": user("Say something.")}]
    spec = judge_file(tmp_path, "def worth(answer, text): return float(text.index(answer) < text.index('Answer 2:'))")
    made = Preferences(judge=spec).make(workshop(tmp_path / "stage", small_model, rows, ["reddish", "bluish"], samples=2))
    assert made.rows == []
    assert made.records["judgements"][0]["p"] == 0.5
    assert made.records["judgements"][0]["orders"][0] != 0.5
    assert made.metrics["consistent"] == 0.0


def test_more_than_two_answers(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": "q", "prompt": user("Say something.")}]
    spec = judge_file(tmp_path, LENGTH)

    def made(**fields: Any) -> Any:
        return Preferences(judge=spec, **fields).make(workshop(tmp_path / "stage", small_model, rows, WORDS, samples=4))

    every = made()
    assert len(every.rows) == 6
    best = made(keep="best").rows
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in best] == [("a green bird sings", "no")]
    (ranking,) = made(keep="ranking").rows
    assert ranking["ranking"] == [2, 1, 0, 3]
    assert [one[0]["content"] for one in ranking["responses"]] == WORDS
    near = [row for row in every.rows if {row["chosen"][0]["content"], row["rejected"][0]["content"]} == {"red", "no"}]
    assert near[0]["columns"]["preference"] == pytest.approx(sigmoid(0.1))
    assert len(made(threshold=0.1).rows) == 5  # sigmoid(0.1) is within 0.1 of one half
    assert "columns" not in made(soft=False).rows[0]
    clamped = made(clamp=0.4).rows
    assert sorted(row["columns"]["preference"] for row in clamped) == pytest.approx([sigmoid(0.1)] + [0.6] * 5)
    lettered = made(template="multiple-choice")
    assert len(lettered.records["judgements"]) == 1
    assert sorted(lettered.records["judgements"][0]["order"]) == [0, 1, 2, 3]
    expected = sorted(sigmoid(abs(len(a) - len(b)) / 10) for i, a in enumerate(WORDS) for b in WORDS[:i])
    assert sorted(row["columns"]["preference"] for row in lettered.rows) == pytest.approx(expected)


def test_principles_are_drawn_and_averaged(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": f"q{i}", "prompt": user(f"Say something {i}.")} for i in range(12)]
    spec = judge_file(tmp_path, "def worth(answer, text): return (len(answer) if 'longer' in text else -len(answer)) / 10")
    principles = ("Which is longer?", "Which is shorter?")

    def made(**fields: Any) -> Any:
        shop = workshop(tmp_path / "stage", small_model, rows, WORDS[:2], samples=2)
        return Preferences(judge=spec, principles=principles, **fields).make(shop)

    one = made()
    assert {record["principle"] for record in one.records["judgements"]} == set(principles)
    assert {row["chosen"][0]["content"] for row in one.rows} == {"red", "blue fish"}
    both = made(ensemble=2)
    assert len(both.records["judgements"]) == 24
    assert both.rows == []  # the two principles cancel out to 0.5


def test_a_killed_stage_asks_nothing_twice(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": f"q{i}", "prompt": user(f"Say something {i}.")} for i in range(3)]
    spec = judge_file(tmp_path, LENGTH)
    first = Preferences(judge=spec).make(workshop(tmp_path / "stage", small_model, rows, WORDS[:2], samples=2))
    before = asked(tmp_path)
    again = Preferences(judge=spec).make(workshop(tmp_path / "stage", small_model, rows, WORDS[:2], samples=2))
    assert before == asked(tmp_path) == 6
    assert again.rows == first.rows
    assert again.metrics["asked"] == 0


def test_failures_are_counted_and_too_many_stop_the_stage(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": f"q{i}", "prompt": user(f"Say something {i}.")} for i in range(4)]
    few = judge_file(tmp_path, "def worth(answer, text): return None if 'something 2' in text else len(answer) / 10")
    made = Preferences(judge=few).make(workshop(tmp_path / "stage", small_model, rows, WORDS[:2], samples=2))
    assert (len(made.rows), made.metrics["unread"]) == (3, 1.0)
    (tmp_path / "b").mkdir()
    all_of_them = judge_file(tmp_path / "b", "def worth(answer, text): return None")
    with pytest.raises(RewardError, match="failed on 4 of 4 prompts; the first error: the script gave no answer"):
        Preferences(judge=all_of_them).make(workshop(tmp_path / "stage", small_model, rows, WORDS[:2], samples=2))


class Together:
    """One of two ranks in one process: gathers wait for each other."""

    def __init__(self, rank: int, slots: list[Any], meet: threading.Barrier) -> None:
        self.rank, self.size, self._slots, self._meet = rank, 2, slots, meet

    def all_gather_json(self, value: Any, *, name: str = "") -> list[Any]:
        self._slots[self.rank] = json.loads(json.dumps(value))
        self._meet.wait(30)
        found = list(self._slots)
        self._meet.wait(30)
        return found


def test_two_ranks_judge_a_share_each_and_make_the_same(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": f"q{i}", "prompt": user(f"Say something {i}.")} for i in range(5)]
    spec = judge_file(tmp_path, LENGTH)
    alone = Preferences(judge=spec).make(workshop(tmp_path / "alone" / "stage", small_model, rows, WORDS[:2], samples=2))
    slots, meet = [None, None], threading.Barrier(2)
    shops = [
        workshop(tmp_path / "both" / "stage", small_model, rows, WORDS[:2], samples=2, world=Together(rank, slots, meet))
        for rank in range(2)
    ]
    before = asked(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda shop: Preferences(judge=spec).make(shop), shops)
    assert asked(tmp_path) - before == 10  # both orders of five prompts, none twice
    assert first.rows == second.rows == alone.rows
    assert first.records == second.records == alone.records


def prefers_short(answer: Any) -> float:
    return -float(len(answer.text))


def test_agreement_with_the_stages_rewards_is_shown(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": f"q{i}", "prompt": user(f"Say something {i}.")} for i in range(3)]
    rewards = (Reward("short", prefers_short, where="inline"),)
    shop = workshop(tmp_path / "stage", small_model, rows, WORDS[:2], samples=2, rewards=rewards)
    assert Preferences(judge=judge_file(tmp_path, LENGTH)).make(shop).metrics["agreement"] == 0.0


def test_the_start_or_a_model_of_the_stage_may_judge(tmp_path: Path, small_model: Path) -> None:
    rows = [{"id": "q", "prompt": user("Hi")}]
    assert Preferences().needs() == ("judge",)
    assert Preferences(judge="start").needs() == ()
    file = tmp_path / "short.yaml"
    file.write_text("short: {text: '{prompt} {first} {second}?', options: [A, B]}\n")
    shop = Workshop({"data": rows}, {"start": small_model, "judge": small_model}, tmp_path / "s", samples=2, quiet=True)
    shop = replace(shop, sampling=Sampling(max_tokens=4))
    for name in ("", "start"):
        made = Preferences(judge=name, template=f"{file}:short").make(shop)
        assert made.metrics["judgements"] == 1
        assert made.records["judgements"][0]["judge"].startswith("local:small@")
        assert 0 < made.records["judgements"][0]["p"] < 1


@pytest.mark.parametrize("fields", [{"clamp": 0.5}, {"threshold": -0.1}, {"ensemble": 2}, {"template": "pairwize"}])
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Preferences(**fields)


# ----------------------------------------------------------------------------------------------------------- judgements

ROW = {"prompt": user("Is 3 + 4 = 7 right?\nFind the steps."), "answer": "yes", "labels": ["yes", "no"], "task": "check"}
RIGHT = "<think>3 + 4 is 7.</think><answer>yes</answer>"
OTHER = "<think>It adds up.</think><answer>yes</answer>"
WRONG = "<think>It is 8.</think><answer>no</answer>"
MUMBLE = "<think>It is yes.</think>"


def test_keeping_one_right_sample_has_the_gradient_of_the_log_pass_rate() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    right, logits = torch.tensor([True, False, True]), torch.log(p).requires_grad_()
    weight = torch.where(right, p, 0) / p[right].sum()  # of the one that is kept
    (expected,) = torch.autograd.grad((weight * logits.log_softmax(-1)).sum(), logits)
    assert expected.tolist() == pytest.approx([0.214286, -0.300000, 0.085714], abs=5.1e-7)
    passed = logits.softmax(-1)[right].sum()
    assert passed.item() == pytest.approx(0.7)
    (direct,) = torch.autograd.grad(passed.log(), logits)
    assert direct.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_one_of_the_right_ones_is_kept_and_all_are_equally_likely() -> None:
    right = [True, False, True, True]
    counts = Counter(keep_one(right, i / 300) for i in range(300))
    assert counts == {0: 100, 2: 100, 3: 100}
    assert keep_one([False, False], 0.3) is None
    assert keep_one([False, True], 0.999999) == 1


def test_the_chance_to_be_kept() -> None:
    found = [keep_probability(p, 4) for p in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert found == pytest.approx([0.3439, 0.7599, 0.9375, 0.9919, 0.9999], abs=1e-12)
    chances = [math.comb(4, n) * 0.5**4 / keep_probability(0.5, 4) for n in range(1, 5)]
    assert chances == pytest.approx([0.266667, 0.400000, 0.266667, 0.066667], abs=5.1e-7)
    outcomes = [[bool(n >> k & 1) for k in range(4)] for n in range(16)]  # of a coin, all equally likely
    kept = [sum(right) for right in outcomes if keep_one(right, 0.5) is not None]
    assert len(kept) / 16 == keep_probability(0.5, 4)
    assert [kept.count(n) / len(kept) for n in range(1, 5)] == pytest.approx(chances)


def test_easy_inputs_come_first_and_equal_ones_keep_their_order() -> None:
    assert curriculum([0.25, 1, 0.5, 0.75, 1]) == [1, 4, 3, 2, 0]
    assert curriculum([0.5] * 4) == [0, 1, 2, 3]
    assert curriculum([]) == []


def test_rounds_share_no_input_and_have_the_mix_of_the_whole() -> None:
    tasks = ["pair"] * 33 + ["step"] * 24 + ["check"] * 18 + ["rate"] * 11
    parts = rollout_batches(tasks, 4)
    assert sorted(place for part in parts for place in part) == list(range(len(tasks)))
    for part in parts:
        counts = Counter(tasks[place] for place in part)
        assert all(abs(counts[task] - tasks.count(task) / 4) < 1 for task in set(tasks))


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{**ROW, "id": f"q{i}"} for i in range(count)]


def made_of(tmp_path: Path, model: Path, answers: list[list[str]], **fields: Any) -> Any:
    """One round over inputs with these K samples each."""
    flat = [text for group in answers for text in group]
    shop = workshop(tmp_path / "round", model, rows_of(len(answers)), flat, samples=len(answers[0]))
    return Judgements(**fields).make(shop), shop


def test_each_kept_input_has_one_right_target(tmp_path: Path, small_model: Path) -> None:
    answers = [[WRONG, RIGHT, MUMBLE, WRONG], [WRONG, MUMBLE, WRONG, WRONG], [RIGHT] * 4, [RIGHT, RIGHT, WRONG, MUMBLE]]
    made, shop = made_of(tmp_path, small_model, answers, direct=0.0)
    assert [row["id"] for row in made.rows] == ["q2", "q3", "q0"]
    assert [row["pass_rate"] for row in made.rows] == [1.0, 0.5, 0.25]
    for row in made.rows:
        sample = sample_from_json(row["sample"])
        assert shop.text(sample) == RIGHT
        assert list(sample.trained) == [False] * sample.prompt_length + [True] * len(sample.completion)
    shares = {key: value for key, value in made.metrics.items() if key.startswith("passed_")}
    assert shares == {f"passed_{n}_of_4": share for n, share in enumerate((0.25, 0.25, 0.25, 0.0, 0.25))}
    assert (made.metrics["kept"], made.metrics["unparsed"]) == (3.0, 3 / 16)


def test_the_text_of_samples_that_are_not_kept_changes_nothing(tmp_path: Path, small_model: Path) -> None:
    first, _ = made_of(tmp_path, small_model, [[WRONG, RIGHT, MUMBLE, WRONG]], direct=0.0)
    other, _ = made_of(tmp_path, small_model, [[MUMBLE, RIGHT, WRONG, MUMBLE]], direct=0.0)
    assert first.rows == other.rows


def test_which_right_sample_is_kept_is_drawn_for_each_input(tmp_path: Path, small_model: Path) -> None:
    made, shop = made_of(tmp_path, small_model, [[RIGHT, OTHER]] * 40, direct=0.0)
    counts = Counter(shop.text(sample_from_json(row["sample"])) for row in made.rows)
    assert set(counts) == {RIGHT, OTHER}
    assert 8 < counts[RIGHT] < 32


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_is_answered_without_a_critique(tmp_path: Path, small_model: Path, share: float) -> None:
    made, shop = made_of(tmp_path, small_model, [[RIGHT, WRONG]] * 60, direct=share)
    texts = Counter(shop.text(sample_from_json(row["sample"])) for row in made.rows)
    alone = texts["<answer>yes</answer>"]
    assert alone + texts[RIGHT] == 60
    assert alone == pytest.approx(60 * share, abs=0 if share in (0, 1) else 12)
    for row in made.rows:
        sample = sample_from_json(row["sample"])
        prompt = shop.model().renderer.decode(sample.tokens[: sample.prompt_length])
        assert ("Give the verdict alone." in prompt) == row["direct"]
        assert not any(sample.trained[: sample.prompt_length])


def test_a_row_may_bring_its_direct_prompt(tmp_path: Path, small_model: Path) -> None:
    row = {**ROW, "id": "q", "direct_prompt": user("Is 3 + 4 = 7 right?")}
    shop = workshop(tmp_path / "round", small_model, [row], [RIGHT], samples=1)
    (found,) = Judgements(direct=1.0).make(shop).rows
    text = shop.model().renderer.decode(sample_from_json(found["sample"]).tokens)
    assert "Is 3 + 4 = 7 right?<|end|>" in text


def test_rounds_use_their_part_and_unfit_rows_are_refused(tmp_path: Path, small_model: Path) -> None:
    seen = []
    for batch in range(3):
        shop = workshop(tmp_path / "round", small_model, rows_of(10), [RIGHT], samples=1)
        seen.append({row["id"] for row in Judgements(batch=batch, batches=3).make(shop).rows})
    assert sum(map(len, seen)) == len(set().union(*seen)) == 10
    with pytest.raises(DataError, match="expected 'answer', its gold verdict"):
        Judgements().make(workshop(tmp_path / "round", small_model, [{"id": "q", "prompt": user("Hi")}], [RIGHT], samples=1))
    for fields in ({"direct": 1.5}, {"batch": 1}, {"batch": -1, "batches": 2}):
        with pytest.raises(ConfigError):
            Judgements(**fields)


# -------------------------------------------------------------------------------------------------------------- prompts


def test_overlap_is_the_share_of_ngrams() -> None:
    one, other = ngrams("Ivan has 4 bags. How many?", 3), ngrams("Ivan has 4 cups. How many?", 3)
    assert len(one) == 4
    assert shared(one, other) == 0.25
    assert shared(ngrams("How many", 3), ngrams("how MANY?", 3)) == 1.0


def test_new_prompts_are_no_copies(tmp_path: Path, small_model: Path) -> None:
    seeds = [
        {"id": f"s{i}", "prompt": user(text)} for i, text in enumerate(("How many cups does Mia have?", "How old is Tom now?"))
    ]
    written = [
        "How many cups does Mia have now?",
        "Where is the red bird today?",
        "No.",
        "Where is the red bird today, Tom?",
        "What does a green pen cost?",
    ]
    shown: list[str] = []

    def answers(prompt: str, index: int) -> str:
        shown.append(prompt)
        return written[index % 5]

    shop = workshop(tmp_path / "new", small_model, seeds, answers, samples=5)
    made = Prompts(count=2, shown=2).make(shop)
    assert [row["prompt"] for row in made.rows] == [user(written[1]), user(written[4])]
    assert [row["id"] for row in made.rows] == ["new-0", "new-1"]
    assert sorted(made.rows[0]["seeds"]) == ["s0", "s1"]
    assert {key: made.metrics[key] for key in ("prompts", "written", "short", "copies", "cut")} == {
        "prompts": 2.0, "written": 5.0, "short": 1.0, "copies": 2.0, "cut": 0.0,
    }  # fmt: skip
    assert "```\nHow old is Tom now?\n```" in shown[0]


def test_a_model_that_repeats_itself_is_not_asked_for_ever(tmp_path: Path, small_model: Path) -> None:
    seeds = [{"id": "s", "prompt": user("How old is Tom now?")}]
    made = Prompts(count=5, rounds=3).make(workshop(tmp_path / "new", small_model, seeds, ["Where is the red bird?"], samples=1))
    assert len(made.rows) == 1
    assert made.metrics["written"] == 5 + 4 + 4
