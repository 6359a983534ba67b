"""A row of a dataset → canonical `Example`, or `RowError(line, field, hint)`.

Owns: what a row may look like, and how bad ones are reported. The upload endpoint and the trainer read files through
`read_rows`, so a row means the same to both. Must not tokenize: chat templates belong to the model.

To add a format: one function that turns a JSON object into an `Example`, and its entry in `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from shared.schemas import FileReport, RowProblem

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat, as the model's template takes it. `trained` turns carry the loss."""

    message: dict[str, Any]
    trained: bool


@dataclass(frozen=True, slots=True)
class Chat:
    """Rendered by the base model's chat template; loss on the trained turns."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """`prompt` conditions, `completion` (and the end of sequence) carries the loss. A text row has an empty prompt."""

    prompt: str
    completion: str


Example = Chat | Completion


class RowError(Exception):
    """A row that cannot be trained on. `field` is a JSON path such as `messages[1].role`."""

    def __init__(self, line: int, field: str, message: str, hint: str) -> None:
        super().__init__(f"line {line}: {field}: {message}" if field else f"line {line}: {message}")
        self.line = line
        self.field = field
        self.message = message
        self.hint = hint

    def problem(self) -> RowProblem:
        return RowProblem(line=self.line, field=self.field, message=self.message, hint=self.hint)


class _Bad(Exception):
    """Raised inside a format function: (field, message, hint); `read_rows` adds the line."""


def chat(row: dict[str, Any]) -> Chat:
    """`{"messages":[{role,content,weight?,tool_calls?}],"tools"?}`, loss on assistant turns of weight 1."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise _Bad("messages", f"found {_found(messages)}", "a non-empty array of {role, content} objects")
    turns = tuple(_turn(message, f"messages[{i}]") for i, message in enumerate(messages))
    if not any(turn.trained for turn in turns):
        raise _Bad("messages", "no assistant message to learn from", "add one with role assistant and weight 1")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Bad("tools", f"found {_found(tools)}", "an array of tool definitions (JSON objects)")
    return Chat(turns, tuple(tools))


def completion(row: dict[str, Any]) -> Completion:
    """`{"prompt","completion"}`, loss on the completion."""
    prompt, answer = row["prompt"], row.get("completion")
    if not isinstance(prompt, str):
        raise _Bad("prompt", f"found {_found(prompt)}", "a string")
    if not isinstance(answer, str) or not answer:
        raise _Bad("completion", f"found {_found(answer)}", "a non-empty string")
    return Completion(prompt, answer)


def text(row: dict[str, Any]) -> Completion:
    """`{"text"}`, loss on all of it."""
    if not isinstance(row["text"], str) or not row["text"]:
        raise _Bad("text", f"found {_found(row['text'])}", "a non-empty string")
    return Completion("", row["text"])


#: The key that marks a row's format → the function that reads it.
FORMATS: dict[str, Callable[[dict[str, Any]], Example]] = {"messages": chat, "prompt": completion, "text": text}


def read_rows(stream: BinaryIO, *, max_row_bytes: int) -> Iterator[tuple[int, Example | RowError]]:
    """Yield (1-based line, Example or RowError) in constant memory; blank lines are passed over.

    The first good row decides the file's format. An empty file yields one RowError at line 1.
    """
    marker: str | None = None
    seen = False
    for line, raw in _lines(stream, max_row_bytes):
        if raw is not None and not raw.strip():
            continue
        seen = True
        try:
            if raw is None:
                raise _Bad("", f"the line is longer than {max_row_bytes:,} bytes", "split the row or shorten it")
            row = _object(raw)
            found = _marker(row)
            if marker is not None and found != marker:
                raise _Bad(found, f"a {found!r} row in a file of {marker!r} rows", "keep one format in a file")
            example = FORMATS[found](row)
        except _Bad as bad:
            yield line, RowError(line, *bad.args)
        else:
            marker = found
            yield line, example
    if not seen:
        yield 1, RowError(1, "", "the file is empty", "one JSON object a line, such as " + _SAMPLE)


def check_file(stream: BinaryIO, *, max_row_bytes: int) -> FileReport:
    """Parse every row; count the good ones, count the bad ones, keep the first `MAX_PROBLEMS` of those."""
    rows, bad, format_ = 0, 0, None
    problems: list[RowProblem] = []
    for _, row in read_rows(stream, max_row_bytes=max_row_bytes):
        if isinstance(row, RowError):
            bad += 1
            if len(problems) < MAX_PROBLEMS:
                problems.append(row.problem())
        else:
            rows += 1
            format_ = format_ or ("chat" if isinstance(row, Chat) else "completion" if row.prompt else "text")
    return FileReport(rows=rows, bad_rows=bad, format=format_, problems=problems)


def describe(report: FileReport) -> str:
    """The problems of a file in one sentence, for an error message."""
    shown = "; ".join(
        f"line {p.line}: {p.field + ': ' if p.field else ''}{p.message} (allowed: {p.hint})"
        for p in report.problems[:5]
    )
    more = report.bad_rows - min(5, len(report.problems))
    return f"{report.bad_rows} bad row{'s' * (report.bad_rows != 1)}: {shown}" + (f"; and {more} more" if more else "")


_SAMPLE = '{"messages":[{"role":"user","content":"…"},{"role":"assistant","content":"…"}]}'


def _lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes), or None for a line over `limit`, of which no more than `limit` bytes are ever held."""
    number = 0
    while raw := stream.readline(limit + 1):
        number += 1
        if len(raw) <= limit or raw.endswith(b"\n"):
            yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            continue
        while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
            pass
        yield number, None


def _object(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Bad("", f"byte {error.start + 1} of the line is not UTF-8", "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise _Bad(
            "", f"not JSON at column {error.colno}: {error.msg}", "one JSON object a line, such as " + _SAMPLE
        ) from None
    except ValueError as error:
        raise _Bad("", f"not JSON that we can hold: {error}", "numbers of at most 4,300 digits") from None
    except RecursionError:
        raise _Bad("", "the JSON is nested too deeply", "one flat JSON object a line, such as " + _SAMPLE) from None
    if not isinstance(row, dict):
        raise _Bad("", f"found {_found(row)}", "one JSON object a line, such as " + _SAMPLE)
    if b"\\ud" in raw.lower() and not _is_unicode(row):
        raise _Bad("", "found half of a surrogate pair (\\ud8xx alone)", "whole characters")
    return row


def _marker(row: dict[str, Any]) -> str:
    for key in FORMATS:
        if key in row:
            return key
    keys = ", ".join(_found(key) for key in sorted(row)[:6]) or "none"
    raise _Bad("", f"found keys {keys}", 'one of "messages"; "prompt" and "completion"; "text"')


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise _Bad(where, f"found {_found(message)}", "an object with role and content")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise _Bad(f"{where}.role", f"found {_found(role)}", "one of " + ", ".join(ROLES))
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
        raise _Bad(f"{where}.content", f"found {_found(content)}", "a string")
    weight = message.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise _Bad(f"{where}.weight", f"found {_found(weight)}", "0 or 1")
    if "weight" in message and role != "assistant":
        raise _Bad(f"{where}.weight", f"found on a {role} message", "weight only on assistant messages")
    plain = {key: value for key, value in message.items() if key != "weight"} | {"content": content or ""}
    return Turn(plain, trained=role == "assistant" and weight == 1)


def _joined(parts: list[Any], where: str) -> str:
    """OpenAI's content parts; only text can be trained on here."""
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _Bad(f"{where}.content[{i}]", f"found {_found(part)}", 'text parts: {"type":"text","text":"…"}')
    return "".join(part["text"] for part in parts)


def _is_unicode(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _found(value: Any) -> str:
    """A value as it is shown in a message: JSON, so that control characters are escaped."""
    shown = json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None else shown if len(shown) <= 40 else shown[:39] + "…"
