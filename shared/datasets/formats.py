"""Parse a row of a dataset to an `Example`, or report it as a `RowError`.

Owns: the row formats, and how invalid rows are reported. The upload endpoint and the trainer both read files through
`read_rows`, so both accept the same rows. File types are in `shared.datasets.readers`. Must not tokenize: chat
templates belong to the model.

To add a format, write a function that converts a JSON object to an `Example`, and add it to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from shared.datasets import readers
from shared.datasets.readers import found as _found
from shared.schemas.requests import MethodName
from shared.schemas.results import FileReport, RowProblem

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat, in the form that chat templates take. The loss is computed on `trained` turns."""

    message: dict[str, Any]
    trained: bool


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, to be rendered by the base model's chat template. The loss is on the trained turns."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion. The loss is on `completion` and the end-of-sequence token.

    A text row has an empty prompt.
    """

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to the same prompt, the preferred one and the rejected one."""

    chosen: Chat | Completion
    rejected: Chat | Completion


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A text or a pair of texts, and its label. An integer label is converted to a string of digits."""

    text: str
    pair: str | None
    label: str


Example = Chat | Completion | Preference | LabelledExample


class RowError(Exception):
    """A row that cannot be trained on. `field` is a JSON path such as `messages[1].role`.

    With `ends_file`, the rest of the file could not be read, so an unknown number of rows is missing.
    """

    def __init__(self, line: int, field: str, message: str, hint: str, *, ends_file: bool = False) -> None:
        super().__init__(f"line {line}: {field}: {message}" if field else f"line {line}: {message}")
        self.line = line
        self.field = field
        self.message = message
        self.hint = hint
        self.ends_file = ends_file

    def problem(self) -> RowProblem:
        return RowProblem(line=self.line, field=self.field, message=self.message, hint=self.hint)


class _Bad(Exception):
    """Raised by a format function with (field, message, hint); `read_rows` adds the line."""


def chat(row: dict[str, Any]) -> Chat:
    """Parse `{"messages":[{role,content,weight?,tool_calls?}],"tools"?}`; loss on assistant turns of weight 1."""
    messages = _non_empty(row, "messages", "a non-empty array of {role, content} objects")
    return _conversation(row, "messages", [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)])


def sharegpt(row: dict[str, Any]) -> Chat:
    """Parse a ShareGPT chat: `{"conversations":[{from,value,weight?}],"system"?,"tools"?}`."""
    messages = _non_empty(row, "conversations", "a non-empty array of {from, value} objects")
    turns = [_sharegpt_turn(message, f"conversations[{i}]") for i, message in enumerate(messages)]
    return _conversation(row, "conversations", [*_system(row), *turns])


def instruction(row: dict[str, Any]) -> Chat:
    """Parse an Alpaca row, `{"instruction","input"?,"output","system"?}`, to a chat with one question.

    The question is the instruction, a blank line, and the input. Alpaca's own prompt ("Below is an instruction …") is
    not used, because the tuned model will be called with its chat template.
    """
    task, context, output = row["instruction"], row.get("input"), row.get("output")
    if not isinstance(task, str) or not task:
        raise _Bad("instruction", f"found {_found(task)}", "a non-empty string")
    if not isinstance(context, str | None):
        raise _Bad("input", f"found {_found(context)}", "a string, or leave it out")
    if not isinstance(output, str) or not output:
        raise _Bad("output", f"found {_found(output)}", "a non-empty string")
    question = {"role": "user", "content": f"{task}\n\n{context}" if context else task}
    return Chat((*_system(row), Turn(question, False), Turn({"role": "assistant", "content": output}, True)))


def completion(row: dict[str, Any]) -> Completion:
    """Parse `{"prompt","completion"}`; loss on the completion."""
    prompt, completed = row["prompt"], row.get("completion")
    if not isinstance(prompt, str):
        raise _Bad("prompt", f"found {_found(prompt)}", "a string")
    if not isinstance(completed, str) or not completed:
        raise _Bad("completion", f"found {_found(completed)}", "a non-empty string")
    return Completion(prompt, completed)


def text(row: dict[str, Any]) -> Completion:
    """Parse `{"text"}`; loss on the whole text."""
    return Completion("", _string(row, "text"))


def preference(row: dict[str, Any]) -> Preference:
    """Parse `{"prompt","chosen","rejected"}`: all strings, or messages.

    With messages, both answers may begin with the prompt; `prompt` may then be absent.
    """
    prompt, keys = row.get("prompt"), ("chosen", "rejected")
    if isinstance(row["chosen"], str):
        if not isinstance(prompt, str):
            raise _Bad("prompt", f"found {_found(prompt)}", "a string, because the answers are strings")
        for key in keys:
            if not isinstance(row.get(key), str) or not row[key]:
                raise _Bad(key, f"found {_found(row.get(key))}", "a non-empty string")
        return _preference(*(Completion(prompt, row[key]) for key in keys))
    answers = [_turns(row, key) for key in keys]
    before = [Turn({"role": "user", "content": prompt}, False)] if isinstance(prompt, str) else []
    if isinstance(prompt, str) and all(len(answer) > 1 for answer in answers):
        before = []  # UltraFeedback repeats the prompt at the start of both conversations
    elif prompt is not None and not isinstance(prompt, str):
        before = _turns(row, "prompt")
        if all(answer[: len(before)] == before for answer in answers):
            before = []
    tools = row.get("tools") or []
    return _preference(*(_answer(before, answer, key, tools) for key, answer in zip(keys, answers, strict=True)))


def preferred_output(row: dict[str, Any]) -> Preference:
    """Parse OpenAI's format, `{"input":{"messages","tools"?},"preferred_output":[…],"non_preferred_output":[…]}`."""
    prompt = row.get("input")
    if not isinstance(prompt, dict) or "messages" not in prompt:
        raise _Bad("input", f"found {_found(prompt)}", 'an object with "messages"')
    before, tools = _turns(prompt, "messages"), prompt.get("tools") or []
    keys = ("preferred_output", "non_preferred_output")
    return _preference(*(_answer(before, _turns(row, key), key, tools) for key in keys))


def labelled(row: dict[str, Any]) -> LabelledExample:
    """Parse `{"text","text_pair"?,"label"}`. The texts may have GLUE's names instead (`PAIRS`).

    The label is a string or an integer; `1` and `"1"` are the same label, because CSV has only strings.
    """
    label = row["label"]
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise _Bad("label", f"found {_found(label)}", "a string or an integer")
    label = str(label)
    if not label.strip() or not label.isprintable() or len(label) > LONGEST_LABEL:
        raise _Bad("label", f"found {_found(label)}", f"a name of 1 to {LONGEST_LABEL} printable characters")
    complete = next((pair for pair in PAIRS if all(name in row for name in pair if name is not None)), None)
    first, second = complete or next((pair for pair in PAIRS if pair[0] in row), PAIRS[-1])
    is_single = second is None or (second == "text_pair" and row.get(second) is None)
    return LabelledExample(_string(row, first), None if is_single else _string(row, str(second)), label)


#: Parser of each format, by the key that identifies it (the marker). The order matters, because the first key that a
#: row has wins: a preference also has a `prompt` and may have `messages`; Alpaca's rows also have a `text`, which holds
#: the rendered prompt.
FORMATS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "chosen": preference,
    "preferred_output": preferred_output,
    "messages": chat,
    "conversations": sharegpt,
    "prompt": completion,
    "instruction": instruction,
    "label": labelled,
    "text": text,
}
#: Names of the one or two texts of a classification row, ours first, then those of GLUE's datasets. The first entry
#: whose keys are all present wins.
PAIRS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "text"),
    ("sentence", None),
    ("text", None),
)
#: Most characters of a label. A longer one is probably a text in the wrong column.
LONGEST_LABEL = 100
#: Every key that some format reads; also the columns to read from a Parquet file.
KEYS = (
    *FORMATS,
    *("tools", "system", "completion", "input", "output", "rejected", "non_preferred_output"),
    *("text_pair", "premise", "hypothesis", "sentence1", "sentence2", "question1", "question2"),
    *("sentence", "question", "passage"),
)
#: ShareGPT's speakers → chat roles.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def read_rows(stream: BinaryIO, *, max_row_bytes: int) -> Iterator[tuple[int, Example | RowError]]:
    """Yield (1-based line, Example or RowError) for each row, in constant memory. Blank lines are skipped.

    The first valid row sets the format of the file; rows of another format are errors. An empty file yields one
    RowError at line 1.
    """
    marker: str | None = None
    line = 0
    for line, row in readers.raw_rows(stream, markers=FORMATS, columns=KEYS, max_row_bytes=max_row_bytes):
        try:
            if isinstance(row, readers.Unreadable):
                raise _Bad("", row.message, row.hint)
            found = _marker(row)
            if marker is not None and found != marker:
                raise _Bad(found, f"a {found!r} row in a file of {marker!r} rows", "keep one format in a file")
            example = FORMATS[found](row)
        except _Bad as bad:
            yield line, RowError(line, *bad.args, ends_file=isinstance(row, readers.Unreadable) and row.ends_file)
        else:
            marker = found
            yield line, example
    if not line:
        yield 1, RowError(1, "", "the file is empty", readers.ONE_OBJECT)


def check_file(stream: BinaryIO, *, max_row_bytes: int) -> FileReport:
    """Parse every row. Count valid and invalid rows, and keep the first `MAX_PROBLEMS` errors."""
    rows, bad, format_ = 0, 0, None
    problems: list[RowProblem] = []
    for _, row in read_rows(stream, max_row_bytes=max_row_bytes):
        if isinstance(row, RowError):
            bad += 1
            if len(problems) < MAX_PROBLEMS:
                problems.append(row.problem())
        else:
            rows += 1
            format_ = format_ or kind(row)
    return FileReport(rows=rows, bad_rows=bad, format=format_, problems=problems)


def kind(example: Example) -> str:
    """Return the name of an example's format: preference, classification, chat, completion or text."""
    if isinstance(example, Preference):
        return "preference"
    if isinstance(example, LabelledExample):
        return "classification"
    return "chat" if isinstance(example, Chat) else "completion" if example.prompt else "text"


def describe(report: FileReport) -> str:
    """Summarize the problems of a file in one sentence, for an error message."""
    shown = "; ".join(
        f"line {p.line}: {p.field + ': ' if p.field else ''}{p.message} (allowed: {p.hint})"
        for p in report.problems[:5]
    )
    more = report.bad_rows - min(5, len(report.problems))
    return f"{report.bad_rows} bad row{'s' * (report.bad_rows != 1)}: {shown}" + (f"; and {more} more" if more else "")


def misfit(method: MethodName, format_: str | None) -> str | None:
    """Return why a file of this format cannot be used with this method, or None if it can."""
    fitting: MethodName = "supervised"
    if format_ == "preference":
        fitting = "dpo"
    elif format_ == "classification":
        fitting = "classification"
    if format_ is None or fitting == method:
        return None
    allowed = {
        "supervised": "chat, completion or text rows, without a label",
        "dpo": "preference rows (chosen and rejected)",
        "classification": "rows with a label (text, or a pair of texts, and label)",
    }
    return (
        f"found {format_} rows; method {method!r} trains on {allowed[method]}: choose method {fitting!r}, or fix the "
        "file"
    )


def _marker(row: dict[str, Any]) -> str:
    for key in FORMATS:
        if key in row:
            return key
    keys = ", ".join(_found(key) for key in sorted(row)[:6]) or "none"
    allowed = (
        '"messages"; "prompt" and "completion"; "instruction" and "output"; "conversations"; "text"; '
        '"text" and "label"; "prompt", "chosen" and "rejected"; "input", "preferred_output" and "non_preferred_output"'
    )
    raise _Bad("", f"found keys {keys}", f"one of {allowed}")


def _string(row: dict[str, Any], key: str) -> str:
    if not isinstance(value := row.get(key), str) or not value:
        raise _Bad(key, f"found {_found(value)}", "a non-empty string")
    return value


def _non_empty(row: dict[str, Any], key: str, hint: str) -> list[Any]:
    if not isinstance(row[key], list) or not row[key]:
        raise _Bad(key, f"found {_found(row[key])}", hint)
    return list(row[key])


def _conversation(row: dict[str, Any], key: str, turns: list[Turn]) -> Chat:
    if not any(turn.trained for turn in turns):
        raise _Bad(key, "no assistant message to learn from", "add one with role assistant and weight 1")
    return Chat(tuple(turns), _tools(row.get("tools") or []))


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Bad("tools", f"found {_found(tools)}", "an array of tool definitions (JSON objects)")
    return tuple(tools)


def _turns(row: dict[str, Any], key: str) -> list[Turn]:
    if key not in row:
        raise _Bad(key, "is missing", "a non-empty array of {role, content} objects")
    messages = _non_empty(row, key, "a non-empty array of {role, content} objects")
    return [_turn(message, f"{key}[{i}]") for i, message in enumerate(messages)]


def _answer(before: list[Turn], answer: list[Turn], key: str, tools: Any) -> Chat:
    """Build one side of a preference. Only the last turn of the answer is trained; everything before it is prompt."""
    if not answer[-1].trained:
        raise _Bad(
            f"{key}[{len(answer) - 1}]",
            "is not a trained assistant message",
            "an assistant message of weight 1 at the end",
        )
    prompt = [Turn(turn.message, False) for turn in (*before, *answer[:-1])]
    return Chat((*prompt, answer[-1]), _tools(tools))


def _preference(chosen: Chat | Completion, rejected: Chat | Completion) -> Preference:
    if chosen == rejected:
        raise _Bad("", "both answers are the same", "two answers, one better than the other")
    if isinstance(chosen, Chat) and isinstance(rejected, Chat) and chosen.turns[:-1] != rejected.turns[:-1]:
        raise _Bad("", "the two answers have different prompts", "conversations that differ only in the last message")
    return Preference(chosen, rejected)


def _system(row: dict[str, Any]) -> list[Turn]:
    """Return the system message from the key `system`, which some datasets have next to the conversation."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise _Bad("system", f"found {_found(system)}", "a string, or leave it out")
    return [Turn({"role": "system", "content": system}, False)] if system else []


def _sharegpt_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise _Bad(where, f"found {_found(message)}", "an object with from and value")
    speaker, value = message.get("from"), message.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise _Bad(f"{where}.from", f"found {_found(speaker)}", "one of " + ", ".join(SPEAKERS))
    if not isinstance(value, str):
        raise _Bad(f"{where}.value", f"found {_found(value)}", "a string")
    weight = {"weight": message["weight"]} if "weight" in message else {}
    return _turn({"role": SPEAKERS[speaker], "content": value} | weight, where)


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
    """Join OpenAI's content parts. Only text parts are supported."""
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _Bad(f"{where}.content[{i}]", f"found {_found(part)}", 'text parts: {"type":"text","text":"…"}')
    return "".join(part["text"] for part in parts)
