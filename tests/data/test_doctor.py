"""The doctor finds each fault, and nothing where nothing is wrong; a sample in colour says what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import toy_tokenizers as toys
from toy_tokenizers import assistant, byte_level, user

from posttrain.data.chat import Renderer
from posttrain.data.colour import coloured, legend
from posttrain.data.doctor import Finding, diagnose
from posttrain.types import Origin


class Config:
    """The part of a model's configuration that is read."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def row(question: str, answer: str, number: int = 0) -> dict[str, Any]:
    return {"prompt": [user(question)], "completion": [assistant(answer)], "_source": f"a.jsonl:{number}"}


def serious(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.severity != "note"]


def test_nothing_is_wrong_with_a_good_template() -> None:
    tokenizer = byte_level(toys.CHATML_MARKED)
    config = Config(vocab_size=len(tokenizer), max_position_embeddings=100, eos_token_id=tokenizer.eos_token_id)
    assert diagnose(tokenizer, [row("1 + 1", "2")], config) == []


@pytest.mark.parametrize(
    ("template", "severity", "what"),
    [
        (None, "error", "no chat template"),
        (toys.NO_STOP, "error", "writes no stop token after an answer"),
        (toys.NEXT_HEADER_STOPS, "error", "writes no stop token after an answer"),
        (toys.CHATML_MARKED_WITHOUT_STOP, "error", "outside the template's generation markers"),
        (toys.DOUBLED_BOS, "error", "two begin-of-text tokens"),
        (toys.SPACE_PROMPT, "error", "disagree on a prompt's tokens"),
        (toys.NO_GENERATION_PROMPT, "error", "its generation prompt does not"),
        (toys.R1, "error", "even from the last answer"),
        (toys.QWEN3, "warning", "drops thinking from the history"),
        (toys.GEMMA, "warning", "takes no system message"),
        (toys.DROPS_SYSTEM, "warning", "takes no system message"),
        (toys.CHATML, "note", "no generation markers"),
    ],
)
def test_each_fault_of_a_template_is_found(template: str | None, severity: str, what: str) -> None:
    findings = diagnose(byte_level(template))
    assert [finding.severity for finding in findings if what in finding.what] == [severity], findings
    assert all(finding.advice for finding in findings)
    order = [("error", "warning", "note").index(finding.severity) for finding in findings]
    assert order == sorted(order)


def test_each_fault_of_a_tokenizer_is_found() -> None:
    tokenizer = byte_level(toys.CHATML_MARKED, pad_token="</s>")
    small = Config(vocab_size=10, eos_token_id=[3])
    findings = diagnose(tokenizer, None, small)
    assert any("embedding only 10 rows" in str(finding) for finding in findings)
    assert any("pad and eos are one token ('</s>')" in str(finding) for finding in findings)
    assert any("the model's eos token is [3]" in str(finding) for finding in findings)
    without = diagnose(byte_level(toys.CHATML_MARKED, eos_token=None))
    assert any("no eos token" in str(finding) for finding in without)
    assert any("no pad token" in str(f) for f in diagnose(byte_level(toys.CHATML_MARKED, pad_token=None)))
    both = diagnose(toys.with_bos(byte_level(toys.LLAMA3)))
    assert any("each write a begin-of-text token" in str(finding) for finding in both)


def test_each_fault_of_rows_is_found() -> None:
    tokenizer = byte_level(toys.CHATML_MARKED)
    rows = [
        row("1 + 1", "2", 1),
        row("1 + 1", "2", 2),
        row("long " * 100, "2", 3),
        row("empty", " ", 4),
        row("spelt out <|im_end|>", "2", 5),
        row("ends", "2<|im_end|>", 6),
        row("new line", "\n2", 7),
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("b")], "_source": "a.jsonl:8"},
        {"prompt": [user("only a prompt")], "_source": "a.jsonl:9"},
        {"text": "raw", "_source": "a.jsonl:10"},
    ]
    found = serious(diagnose(tokenizer, rows, Config(max_position_embeddings=60)))
    expected = [
        "1 of 10 rows have an empty answer (a.jsonl:4)",
        "1 of 10 rows cannot be rendered (a.jsonl:6); the first: message 1 (role 'assistant') already ends",
        "1 of 10 rows are longer than the context of 60 tokens (the longest, a.jsonl:3",
        "in 1 of 10 rows training and sampling disagree on the prompt's tokens (a.jsonl:7)",
        "1 of 10 rows repeat another row",
        "in 1 rows chosen and rejected are the same (a.jsonl:8)",
        "2 of 10 rows spell control tokens out in their contents (a.jsonl:5, a.jsonl:6)",
    ]
    assert len(found) == len(expected), found
    for what in expected:
        assert any(what in finding for finding in found), (what, found)
    assert "there are no rows" in serious(diagnose(tokenizer, []))[0]


def test_a_sample_in_colour() -> None:
    renderer = Renderer(byte_level(toys.CHATML))
    sample = renderer.conversation([user("日本 🙂"), assistant("4\n2")])
    text = coloured(sample, renderer.tokenizer)
    head, _, body = text.plain.partition("\n")
    assert head == legend().plain
    assert all(origin.name.lower() in head for origin in Origin)
    assert body.replace("⏎", "") == renderer.decode(sample.tokens)
    bare = coloured(sample, renderer.tokenizer, with_legend=False)
    reversed_spans = [bare.plain[span.start : span.end] for span in bare.spans if "reverse" in str(span.style)]
    assert reversed_spans == ["4⏎\n2<|im_end|>"]
    assert [bare.plain[span.start : span.end] for span in bare.spans if str(span.style) == "cyan"] == ["日本 🙂"]


def test_the_middle_of_a_long_sample_is_counted() -> None:
    renderer = Renderer(byte_level(toys.CHATML))
    sample = renderer.conversation([user("abc " * 500), assistant("the end")])
    shown = coloured(sample, renderer.tokenizer, with_legend=False, longest=100).plain
    whole = renderer.decode(sample.tokens)
    head, _, rest = shown.partition(" ... ")
    count, _, tail = rest.partition(" tokens ... ")
    assert len(shown) < 200
    assert whole.startswith(head.replace("⏎", ""))
    assert whole.endswith(tail.replace("⏎", ""))
    assert "the end" in tail
    kept = 2 * max(1, len(sample) * 100 // (2 * len(coloured(sample, renderer.tokenizer, with_legend=False).plain)))
    assert int(count.replace(",", "")) == len(sample) - kept
    assert coloured(sample, renderer.tokenizer, with_legend=False, longest=100_000).plain.replace("⏎", "") == whole
