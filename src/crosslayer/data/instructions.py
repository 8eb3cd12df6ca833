"""Instructions in three forms, each row a prompt and the completion that is trained on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)
FORMS = (("messages",), ("prompt", "completion"), ("instruction", "output"))
INSTRUCTION_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output")


def prompt_of(instruction: str, context: str = "") -> str:
    """The prompt of an instruction: the headings of the Alpaca format, without its preamble (our choice: a small model
    spends no context on a constant sentence)."""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def instruction_form(rows: Rows) -> tuple[str, ...] | None:
    """The columns that make the rows instructions; None when they are none."""
    return next((form for form in FORMS if set(form) <= set(rows.columns)), None)


def to_prompts(rows: Rows) -> Dataset:
    """Any of the three forms as `prompt` and `completion`: texts, or lists of messages for `messages`.

    A conversation becomes one row for each of its answers, with all that was said before as its prompt. Raises
    DataError, naming the row, for a text that is missing, empty or no text.
    """
    from datasets import Dataset

    form = instruction_form(rows)
    if form is None:
        raise DataError(
            f"{rows.label}: columns {', '.join(map(repr, rows.columns))} are no instruction data; needed are "
            "instruction and output (and input), prompt and completion, or messages"
        )
    prompts: list[Any] = []
    completions: list[Any] = []
    openings = 0
    for row, place in zip(rows.content, rows.places, strict=True):
        where = f"{rows.label}, {place}"
        if form == ("messages",):
            messages = _messages(row.get("messages"), where)
            openings += messages[0]["role"] == "assistant"
            for turn, message in enumerate(messages):
                if turn and message["role"] == "assistant":
                    prompts.append(messages[:turn])
                    completions.append([message])
            continue
        first, second = (_text(row.get(column), column, where) for column in form)
        if form == ("instruction", "output"):
            context = row.get("input")
            if context is not None and not isinstance(context, str):
                raise DataError(f"{where}: column 'input' holds {context!r}, not text")
            first = prompt_of(first, context or "")
        prompts.append(first)
        completions.append(second)
    if openings:
        _log.warning(
            "%s: %d of %d conversations begin with an answer; it answers nothing and is not trained",
            rows.label,
            openings,
            len(rows),
        )
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {column!r} holds {value!r}, not text")
    return value


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    """A conversation with its contents as texts; it must end with an answer."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: messages must be a list of objects with role and content")
    checked = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]
    if len(checked) < 2 or checked[-1]["role"] != "assistant":
        raise DataError(f"{where}: messages must end with an answer of the role 'assistant'")
    return checked


def _message(message: dict[str, Any], where: str) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where}: role is {role!r}; give user, assistant, system or tool")
    if message.get("tool_calls"):
        raise DataError(f"{where}: tool_calls cannot be trained on; leave such conversations out")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where} ({role}): content is {content!r}, not text")
    return {"role": role, "content": content}


def _part(part: Any, where: str) -> str:
    """The text of a part: `{"type": "text", "text": ...}`, or a text itself."""
    if isinstance(part, dict) and part.get("type", "text") == "text":
        part = part.get("text")
    if not isinstance(part, str):
        raise DataError(f"{where}: content holds a part that is no text: {part!r}; only texts can be trained on")
    return part
