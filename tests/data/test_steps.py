"""Where steps end in tokens: for many templates and tokenizers, and in answers that a policy wrote."""

from __future__ import annotations

import json
import math

import pytest
import toy_tokenizers as toys
from toy_tokenizers import byte_level, metaspace, user, words
from transformers import AutoTokenizer

from posttrain import tiny
from posttrain.data.chat import Renderer
from posttrain.data.rows import load_rows
from posttrain.data.steps import as_label, label_column, step_columns, written_ends
from posttrain.errors import DataError
from posttrain.experience import Desk
from posttrain.records import sample_to_json
from posttrain.tasks import word_problem_steps, word_problems
from posttrain.types import Sample

TEMPLATES = {"chatml": toys.CHATML, "llama3": toys.LLAMA3, "mistral": toys.MISTRAL, "gemma": toys.GEMMA, "qwen3": toys.QWEN3}
TOKENIZERS = {"byte level": byte_level, "trimmed": lambda t: byte_level(t, trim=True), "metaspace": metaspace, "words": words}
STEPS = ["So 1 + 1 is 2.", "Then é and 😀 and 3.", "The answer is 42."]


def desk(renderer: Renderer) -> Desk:
    return Desk(renderer)


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ", ""])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_label_stands_at_the_last_token_of_its_step(name: str, tokenizer: str, separator: str) -> None:
    if tokenizer == "words" and separator == "":
        pytest.skip("this tokenizer cuts at white space alone")
    renderer = Renderer(TOKENIZERS[tokenizer](TEMPLATES[name]))
    sample, ends = renderer.stepped({"prompt": [user("go")], "steps": STEPS, "separator": separator})
    assert sample.tokens == renderer.completion([user("go")], separator.join(STEPS)).tokens
    assert len(set(ends)) == 3
    assert all(sample.trained[end] for end in ends)
    first = sample.trained.index(True)
    if tokenizer == "words":  # unknown words are one token each: count them
        return
    for number, end in enumerate(ends):
        upto = "".join(renderer.decode(sample.tokens[first : end + 1]).split())
        less = "".join(renderer.decode(sample.tokens[first:end]).split())
        wanted = "".join("".join(STEPS[: number + 1]).split())
        assert upto.endswith(wanted)
        assert not less.endswith(wanted)


def test_a_token_that_holds_two_steps_is_refused() -> None:
    renderer = Renderer(byte_level(toys.CHATML))
    with pytest.raises(DataError, match="holds text of steps 0 and 1; expected another separator"):
        renderer.stepped({"prompt": [user("go")], "steps": ["The ans", "wer is 42."], "separator": ""})


def test_thinking_that_the_template_sets_out_anew_is_found() -> None:
    renderer = Renderer(byte_level(toys.QWEN3))
    steps = ["<think>one.", " two.", "</think>42"]
    sample, ends = renderer.stepped({"prompt": [user("go")], "steps": steps, "separator": ""})
    assert renderer.decode(sample.tokens[: ends[1] + 1]).endswith("<think>\none. two.")
    assert renderer.decode(sample.tokens[: ends[2] + 1]).endswith("42")


@pytest.fixture(scope="module")
def tiny_renderer() -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(str(tiny.path())))


def test_steps_of_word_problems(tiny_renderer: Renderer) -> None:
    for number, row in enumerate(word_problems.rows("train", 30, level="wide")):
        text = row["completion"][0]["content"]
        steps = word_problem_steps.written_steps(text, row)
        (sample,) = desk(tiny_renderer).steps([word_problem_steps.stepped_row(text, row, steps)])
        assert sample.tokens == tiny_renderer.demonstrations(row)[0].tokens
        assert sample.query == f"word-problems/train/{number}"
        ends = [t for t, end in enumerate(sample.columns["step_end"]) if end]
        labels = [label for label in sample.columns["step_label"] if not math.isnan(label)]
        assert labels == [1.0] * len(steps)
        pieces = [tiny_renderer.decode(sample.tokens[sample.prompt_length : t + 1]) for t in ends]
        assert pieces == [text[: step.end] for step in steps]
        answer = sample.completion[:-1]  # as if a policy had written it
        found = written_ends(answer, [step.end for step in steps], tiny_renderer.decode)
        assert [sample.prompt_length + t for t in found] == ends


def test_a_sample_that_a_policy_wrote_keeps_its_tokens(tiny_renderer: Renderer, tmp_path) -> None:
    prompt = tiny_renderer.prompt([user("What is 1 + 1?")])
    letters = [token for letter in "It is 2." for token in tiny_renderer.tokenizer(letter, add_special_tokens=False)["input_ids"]]
    written = [*letters, tiny_renderer.stop_tokens[0]]  # not as the tokenizer cuts it
    sample = Sample(
        tokens=prompt.tokens + written,
        origin=[*prompt.origin, *[5] * len(written)],
        trained=[False] * len(prompt) + [True] * len(written),
        logprobs=[0.0] * (len(prompt) + len(written)),
    )
    columns = step_columns(len(sample), [len(prompt) + len(letters) - 1], [0.5])
    columns["step_label"] = [None if math.isnan(label) else label for label in columns["step_label"]]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "a", "sample": sample_to_json(sample), "columns": columns}) + "\n", encoding="utf-8")
    (made,) = desk(tiny_renderer).steps(load_rows(path))
    assert made.tokens == sample.tokens
    assert made.query == "a"
    assert [t for t, end in enumerate(made.columns["step_end"]) if end] == [len(prompt) + len(letters) - 1]
    assert [label for label in made.columns["step_label"] if not math.isnan(label)] == [0.5]


def test_ends_of_steps_in_a_policys_tokens() -> None:
    pieces = {1: "a.", 2: " b", 3: ".", 4: " c. d."}

    def decode(ids):
        return "".join(pieces[i] for i in ids)

    assert written_ends([1, 2, 3, 4], [2, 5, 11], decode) == [0, 2, 3]
    with pytest.raises(DataError, match="steps 1 and 2 end in one token"):
        written_ends([1, 2, 3, 4], [5, 8, 11], decode)
    with pytest.raises(DataError, match="step 1 ends at character 12 of a text of 11"):
        written_ends([1, 2, 3, 4], [2, 12], decode)
    halves = {1: b"x", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"!"}
    assert written_ends([1, 2, 3, 4], [2, 3], lambda ids: b"".join(halves[i] for i in ids).decode(errors="replace")) == [2, 3]


def test_labels() -> None:
    assert [as_label(value, "it") for value in (True, 0, 0.25)] == [1.0, 0.0, 0.25]
    assert math.isnan(as_label(None, "it"))
    with pytest.raises(DataError, match=r"step 2 is -1; expected .*labels_of_ratings"):
        step_columns(5, [1, 2, 3], [1, 1, -1])
    with pytest.raises(DataError, match="2 labels for 3 steps"):
        step_columns(5, [1, 2, 3], [1, 1])
    with pytest.raises(DataError, match="3 values; expected 4"):
        label_column({"step_label": [1, None, None]}, 4)
    with pytest.raises(DataError, match="None; expected 4, one a token"):
        label_column({}, 4)
    with pytest.raises(DataError, match="a label at token 1, where 'step_end'"):
        label_column({"step_label": [None, 1.0], "step_end": [0, 0]}, 2)
    assert label_column({"step_label": [None, 1]}, 2)["step_end"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"steps": ["a", " "], "labels": [1, 1]}, "step 1 of 'steps' is blank"),
        ({"steps": ["a"], "labels": [1], "separator": 3}, "'separator' is 3; expected a string"),
        ({"steps": ["a"], "labels": [-1]}, r"label of step 0 is -1; expected a number from 0 \(wrong\) to 1"),
        ({"steps": ["a"], "labels": [1, 1]}, "a list of 1 labels"),
    ],
)
def test_rows_that_are_refused(row, message, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "x", **row}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_rows(path)
