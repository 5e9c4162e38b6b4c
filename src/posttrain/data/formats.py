"""The row formats people have, and the one they become: lists of messages, with every other key untouched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.data.steps import as_label, joined
from posttrain.errors import DataError, nearest

__all__ = ["FORMATS", "RowFormat", "format_of", "need", "normalise"]

Kind = Literal["demonstrations", "pairs", "rankings", "steps", "prompts"]
Messages = list[dict[str, Any]]

_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_LISTS = frozenset({"messages", "conversations", "prompt", "completion", "chosen", "rejected", "responses", "ranking"})


@dataclass(frozen=True)
class RowFormat:
    """One way of writing a row."""

    name: str
    columns: tuple[str, ...]
    """The columns that tell it apart."""
    convert: Callable[[dict[str, Any]], dict[str, Any]]
    """The row with lists of messages in place of what the format has."""


class _Empty(DataError):
    """An answer without text."""


def _found(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{place} is {_found(value)}; expected an object with role and content")
    message = {key: item for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        return _sharegpt(message, place)
    if not isinstance(message.get("role"), str):
        raise DataError(f"{place} has the role {_found(message.get('role'))}; expected a string such as 'user' or 'assistant'")
    content = message.get("content")
    if not isinstance(content, str | list) and not (content is None and set(message) - {"role"}):
        raise DataError(f"{place} has the content {_found(content)}; expected a string or a list of parts")
    return message


def _sharegpt(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    speaker = str(message["from"])
    if speaker.lower() not in _SHAREGPT:
        raise DataError(f"{place} is from {speaker!r}{nearest(speaker.lower(), _SHAREGPT)}")
    if not isinstance(message.get("value"), str):
        raise DataError(f"{place} has the value {_found(message.get('value'))}; expected a string")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT[speaker.lower()], "content": message["value"], **rest}


def _messages(value: Any, column: str, role: str | None = None) -> Messages:
    """A list of messages; a plain string becomes one message of `role`, a single message a list of one."""
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping) and role is not None:
        return [_message(value, f"'{column}'")]
    if not isinstance(value, list | tuple):
        text = "a list of messages" if role is None else "a string or a list of messages"
        raise DataError(f"'{column}' is {_found(value)}; expected {text}")
    if not value:
        kind = _Empty if role == "assistant" else DataError
        raise kind(f"'{column}' is an empty list; expected at least one message")
    return [_message(item, f"'{column}'[{number}]") for number, item in enumerate(value)]


def _blank(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if set(message) - {"role", "content"}:  # tool calls, reasoning, ...
        return False
    return not content or (isinstance(content, str) and not content.strip())


def _answered(messages: Messages, column: str) -> Messages:
    """The messages, with an assistant among them, and none of the assistant's empty."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"'{column}' has no assistant message (roles: {[m['role'] for m in messages]}); expected at least one")
    if any(_blank(message) for message in answers):
        raise _Empty(f"'{column}' has an empty assistant message; expected text: remove the row")
    return messages


def _prompt(row: Mapping[str, Any]) -> Messages:
    messages = _messages(row["prompt"], "prompt", "user")
    if all(_blank(message) for message in messages):
        raise DataError("'prompt' is empty; expected text: remove the row, or give the rows as raw 'text'")
    return messages


def _completion(row: Mapping[str, Any], column: str) -> Messages:
    return _answered(_messages(row[column], column, "assistant"), column)


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "messages": _messages(row["messages"], "messages")}


def _conversations(row: dict[str, Any]) -> dict[str, Any]:
    messages = _messages(row["conversations"], "conversations")
    rest = {key: value for key, value in row.items() if key != "conversations"}
    system = rest.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        rest.pop("system")
    if "chosen" in row and "rejected" in row:
        return _pair({**rest, "prompt": messages})
    return {**rest, "messages": messages}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "prompt": _prompt(row),
        "chosen": _completion(row, "chosen"),
        "rejected": _completion(row, "rejected"),
    }


def _transcript(text: str, column: str) -> Messages:
    """A text in the form of HH-RLHF, "\\n\\nHuman: ...\\n\\nAssistant: ...", as messages."""
    marks = list(_HH_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise DataError(
            f"'{column}' is a text without a prompt beside it; expected a 'prompt' column, lists of messages, or "
            "text in the form '\\n\\nHuman: ...\\n\\nAssistant: ...'"
        )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[mark.group(1)], "content": text[mark.end() : end].strip()} for mark, end in zip(marks, ends, strict=True)
    ]


def _implicit_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Whole conversations: what they share from the start is the prompt."""
    sides = [
        _transcript(row[column], column) if isinstance(row[column], str) else _messages(row[column], column)
        for column in ("chosen", "rejected")
    ]
    chosen, rejected = sides
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and (shared >= min(len(chosen), len(rejected)) or chosen[shared - 1]["role"] == "assistant"):
        shared -= 1  # each side keeps an answer, and the prompt ends with somebody else's message
    if not shared:
        raise DataError(
            "'chosen' and 'rejected' share no first message, so there is no prompt; expected a 'prompt' column, or "
            "conversations that begin alike"
        )
    return {
        **row,
        "prompt": chosen[:shared],
        "chosen": _answered(chosen[shared:], "chosen"),
        "rejected": _answered(rejected[shared:], "rejected"),
    }


def _ranking(row: dict[str, Any]) -> dict[str, Any]:
    """`ranking` lists the indices of `responses`, best first."""
    responses, ranking = row["responses"], row["ranking"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise DataError(f"'responses' is {_found(responses)}; expected a list of at least two")
    if not isinstance(ranking, list) or sorted(ranking, key=repr) != sorted(range(len(responses)), key=repr):
        raise DataError(
            f"'ranking' is {_found(ranking)}; expected the numbers 0 to {len(responses) - 1}, each once, best response first"
        )
    answers = [_answered(_messages(item, "responses", "assistant"), "responses") for item in responses]
    return {**row, "prompt": _prompt(row), "responses": answers}


def _steps(row: dict[str, Any]) -> dict[str, Any]:
    """A worked answer in steps, each with a label; the completion is the steps, with the row's `separator` or a line's end."""
    column = "steps" if "steps" in row else "completions"
    completion = _answered([{"role": "assistant", "content": joined(row, column)}], column)
    steps, labels = row[column], row["labels"]
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise DataError(f"'labels' is {_found(labels)}; expected a list of {len(steps)} labels, one a step")
    for number, label in enumerate(labels):
        as_label(label, f"step {number}")
    rest = {key: value for key, value in row.items() if key != column}
    return {**rest, "prompt": _prompt(row), "completion": completion, "steps": steps, "labels": labels}


def _prompt_completion(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "prompt": _prompt(row), "completion": _completion(row, "completion")}


def _labelled_completion(row: dict[str, Any]) -> dict[str, Any]:
    """A completion that is wanted or not (KTO), or right with some probability (a reward model)."""
    label = row["label"]
    if isinstance(label, str) and label.strip().lower() in ("true", "false", "1", "0"):
        label = label.strip().lower() in ("true", "1")
    if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
        raise DataError(f"'label' is {_found(label)}; expected true (wanted), false (not wanted), or a number from 0 to 1")
    row = {**row, "label": bool(label) if label in (0, 1) else float(label)}
    if "prompt" in row:
        return _prompt_completion(row)
    whole = row["completion"]
    messages = _transcript(whole, "completion") if isinstance(whole, str) else _messages(whole, "completion")
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] == "assistant":
        raise DataError("'completion' holds no prompt; expected a 'prompt' column, or a conversation that ends with an answer")
    return {**row, "prompt": messages[:-1], "completion": _answered(messages[-1:], "completion")}


def _instruction(row: dict[str, Any]) -> dict[str, Any]:
    """Alpaca: instruction and input, a blank line between them, and the output."""
    asked = row["instruction"]
    given = row.get("input") or ""
    if not isinstance(asked, str) or not isinstance(given, str):
        raise DataError(f"'instruction' is {_found(asked)} and 'input' {_found(given)}; expected strings")
    rest = {key: value for key, value in row.items() if key not in ("instruction", "input", "output", "system")}
    prompt: Messages = [{"role": "user", "content": f"{asked}\n\n{given}" if given.strip() else asked}]
    if isinstance(row.get("system"), str) and row["system"].strip():
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    whole = {**rest, "prompt": prompt}
    _prompt(whole)
    if "output" in row:
        whole["completion"] = _completion(row, "output")
    return whole


def _question(row: dict[str, Any]) -> dict[str, Any]:
    """GSM8K: the number after `####` is the answer; the whole text is the solution and the completion."""
    solution = str(row["answer"]) if isinstance(row["answer"], int | float) else row["answer"]
    if not isinstance(solution, str):
        raise DataError(f"'answer' is {_found(solution)}; expected a string")
    rest = {key: value for key, value in row.items() if key not in ("question", "answer")}
    whole = {**rest, "prompt": _prompt({"prompt": row["question"]})}
    whole["completion"] = _completion({"answer": solution}, "answer")
    marked = re.search(r"####\s*(.+?)\s*\Z", solution, re.DOTALL)
    whole["solution"] = solution
    whole["answer"] = marked.group(1).replace(",", "") if marked else solution.strip()
    return whole


def _only_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "prompt": _prompt(row)}


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """The tokens that a policy wrote, as `records.sample_to_json` writes them."""
    if not isinstance(row["sample"], Mapping) or not {"tokens", "origin", "trained"} <= set(row["sample"]):
        raise DataError(f"'sample' is {_found(row['sample'])}; expected the record of a sample, with tokens, origin and trained")
    return row


def _text(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["text"], str):
        raise DataError(f"'text' is {_found(row['text'])}; expected a string")
    if not row["text"].strip():
        raise _Empty("'text' is empty; expected text: remove the row")
    return row


FORMATS: tuple[RowFormat, ...] = (
    RowFormat("conversation", ("messages",), _conversation),
    RowFormat("ShareGPT conversation", ("conversations",), _conversations),
    RowFormat("pair", ("prompt", "chosen", "rejected"), _pair),
    RowFormat("pair with the prompt inside", ("chosen", "rejected"), _implicit_pair),
    RowFormat("ranking", ("prompt", "responses", "ranking"), _ranking),
    RowFormat("step labels", ("prompt", "steps", "labels"), _steps),
    RowFormat("step labels", ("prompt", "completions", "labels"), _steps),
    RowFormat("labelled completion", ("completion", "label"), _labelled_completion),
    RowFormat("prompt and completion", ("prompt", "completion"), _prompt_completion),
    RowFormat("instruction and output", ("instruction", "output"), _instruction),
    RowFormat("question and answer", ("question", "answer"), _question),
    RowFormat("sample", ("sample",), _sample),
    RowFormat("prompt", ("prompt",), _only_prompt),
    RowFormat("instruction", ("instruction",), _instruction),
    RowFormat("raw text", ("text",), _text),
)
"""In order: the first whose columns a row has is the row's format."""


def format_of(row: Mapping[str, Any]) -> RowFormat:
    """The format of a row.

    Raises:
        DataError: The row has the columns of none; the message has the nearest names and the formats that are known.
    """
    for known in FORMATS:
        if all(row.get(column) is not None for column in known.columns):
            return known
    columns = [key for key in row if key != "_source"]
    names = {column for known in FORMATS for column in known.columns}
    hints = [f"{column!r}{nearest(column, names)}" for column in columns if "nearest" in nearest(column, names)]
    formats = "; ".join(dict.fromkeys(" + ".join(known.columns) for known in FORMATS))
    raise DataError(
        f"the columns are {columns}" + (f" ({', '.join(hints)})" if hints else "") + f"; expected one of: {formats}. "
        "Rename columns with --map new=old, for instance --map completion=response"
    )


def _parsed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Lists that a CSV file had to write as JSON text."""
    changed = dict(row)
    for key in _LISTS & set(row):
        value = row[key]
        if isinstance(value, str) and value.lstrip().startswith(('[{"', '["', "[{'", "[0", "[1", "[2")):
            try:
                changed[key] = json.loads(value)
            except ValueError:
                continue
    return changed


def normalise(rows: Sequence[Mapping[str, Any]], *, skip_invalid: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one format as rows of messages, and what is wrong with the rows that were left out.

    Raises:
        DataError: A row that is not of a known format, is not well formed, or is not of the first row's format.  Where
            `skip_invalid`, rows that are not well formed are left out instead.
    """
    made: list[dict[str, Any]] = []
    wrong: list[str] = []
    first: RowFormat | None = None
    for number, raw in enumerate(rows):
        row = _parsed(raw)
        place = str(row.get("_source", f"row {number}"))
        try:
            known = format_of(row)
        except DataError as cause:
            raise DataError(f"{place}: {cause}") from None
        first = first or known
        lacks = [column for column in first.columns if row.get(column) is None]
        if known.name != first.name and set(known.columns) < set(first.columns):
            found = ", ".join(key for key in row if not key.startswith("_"))
            raise DataError(f"{place} has no {' and no '.join(map(repr, lacks))} (found: {found})")
        if known.name != first.name:
            raise DataError(
                f"{place}: a row in the format '{known.name}' ({' + '.join(known.columns)}) among rows in the format "
                f"'{first.name}' ({' + '.join(first.columns)}, from {rows[0].get('_source', 'row 0')} on); expected "
                "one format a file: split the file"
            )
        try:
            made.append(known.convert(row))
        except DataError as cause:
            wrong.append(f"{place}: {cause}")
    if wrong and not skip_invalid:
        more = f"\n(and {len(wrong) - 5} more rows)" if len(wrong) > 5 else ""
        advice = "" if len(wrong) == 1 else "\n--skip-invalid (skip_invalid=True) leaves such rows out and counts them"
        raise DataError("\n".join(wrong[:5]) + more + advice)
    return made, wrong


_NEEDS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "demonstrations": ("answers to imitate", (("messages",), ("prompt", "completion"), ("text",), ("sample",))),
    "pairs": ("a better and a worse answer", (("prompt", "chosen", "rejected"), ("prompt", "responses", "ranking"))),
    "rankings": ("several answers and their order", (("prompt", "responses", "ranking"),)),
    "steps": ("worked answers in steps, each with a label", (("prompt", "steps", "labels"), ("sample", "columns"))),
    "prompts": ("prompts to answer", (("prompt",),)),
}


def need(rows: Sequence[Mapping[str, Any]], kind: Kind, name: str) -> None:
    """Refuse rows that cannot serve a method.

    Args:
        rows: Normalised rows.
        kind: What each row must hold.
        name: The method's name, for the message.

    Raises:
        DataError: There are no rows, or one lacks what the method learns from.
    """
    what, choices = _NEEDS[kind]
    expected = " or ".join(" + ".join(choice) for choice in choices)
    if not rows:
        raise DataError(f"{name} learns from {what}, and there are no rows; expected {expected}")
    for number, row in enumerate(rows):
        place = row.get("_source", f"row {number}")
        if not any(all(row.get(column) is not None for column in choice) for choice in choices):
            columns = [key for key in row if not str(key).startswith("_")]
            hint = ""
            if kind == "prompts" and "messages" in row:
                hint = "; a conversation becomes a prompt when its last answer moves to 'completion'"
            elif len(columns) > len(set(columns) & {"prompt", "id"}):
                hint = "; a column under another name is renamed with --map new=old"
            raise DataError(f"{place}: {name} learns from {what}: expected {expected}, found the columns {columns}{hint}")
        if kind == "demonstrations" and "messages" in row:
            try:
                _answered(row["messages"], "messages")
            except DataError as cause:
                raise DataError(f"{place}: {name} learns from {what}: {cause}") from None
