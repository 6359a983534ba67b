"""A row of a dataset → canonical `Example`, or `RowError(line, field, hint)`.

Owns: what a row may look like, and how bad ones are reported. The upload endpoint and the trainer read files through
`read_rows`, so a row means the same to both. Must not tokenize: chat templates belong to the model.

To add a format: one function that turns a JSON object into an `Example`, and its entry in `FORMATS`. What kinds of file
rows come in is `shared.datasets.readers`'s.
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


@dataclass(frozen=True, slots=True)
class Preference:
    """The same prompt answered twice, one answer preferred to the other."""

    chosen: Chat | Completion
    rejected: Chat | Completion


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A text, or a pair of texts, and its label. A label that came as an integer is its digits."""

    text: str
    pair: str | None
    label: str


Example = Chat | Completion | Preference | LabelledExample


class RowError(Exception):
    """A row that cannot be trained on. `field` is a JSON path such as `messages[1].role`.

    `ends_file` says that it stands for the rest of the file, of which nobody knows what it holds.
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
    """Raised inside a format function: (field, message, hint); `read_rows` adds the line."""


def chat(row: dict[str, Any]) -> Chat:
    """`{"messages":[{role,content,weight?,tool_calls?}],"tools"?}`, loss on assistant turns of weight 1."""
    messages = _non_empty(row, "messages", "a non-empty array of {role, content} objects")
    return _conversation(row, "messages", [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)])


def sharegpt(row: dict[str, Any]) -> Chat:
    """`{"conversations":[{from,value,weight?}],"system"?,"tools"?}`, another spelling of a chat."""
    said = _non_empty(row, "conversations", "a non-empty array of {from, value} objects")
    turns = [_said(part, f"conversations[{i}]") for i, part in enumerate(said)]
    return _conversation(row, "conversations", [*_system(row), *turns])


def instruction(row: dict[str, Any]) -> Chat:
    """`{"instruction","input"?,"output","system"?}`, a chat of one question: the instruction, a blank line, the input.

    Not Alpaca's own "Below is an instruction": whoever asks the tuned model afterwards asks by its chat template.
    """
    asked, given, answer = row["instruction"], row.get("input"), row.get("output")
    if not isinstance(asked, str) or not asked:
        raise _Bad("instruction", f"found {_found(asked)}", "a non-empty string")
    if not isinstance(given, str | None):
        raise _Bad("input", f"found {_found(given)}", "a string, or none")
    if not isinstance(answer, str) or not answer:
        raise _Bad("output", f"found {_found(answer)}", "a non-empty string")
    question = {"role": "user", "content": f"{asked}\n\n{given}" if given else asked}
    return Chat((*_system(row), Turn(question, False), Turn({"role": "assistant", "content": answer}, True)))


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
    return Completion("", _string(row, "text"))


def preference(row: dict[str, Any]) -> Preference:
    """`{"prompt","chosen","rejected"}`: strings, or messages, where both answers may begin with the prompt."""
    prompt, keys = row.get("prompt"), ("chosen", "rejected")
    if isinstance(row["chosen"], str):
        if not isinstance(prompt, str):
            raise _Bad("prompt", f"found {_found(prompt)}", "a string, as the answers are")
        for key in keys:
            if not isinstance(row.get(key), str) or not row[key]:
                raise _Bad(key, f"found {_found(row.get(key))}", "a non-empty string, as the other answer is")
        return _preference(*(Completion(prompt, row[key]) for key in keys))
    answers = [_turns(row, key) for key in keys]
    asked = [Turn({"role": "user", "content": prompt}, False)] if isinstance(prompt, str) else []
    if isinstance(prompt, str) and all(len(answer) > 1 for answer in answers):
        asked = []  # UltraFeedback's: the prompt by itself, and again in both conversations
    elif prompt is not None and not isinstance(prompt, str):
        asked = _turns(row, "prompt")
        if all(answer[: len(asked)] == asked for answer in answers):
            asked = []
    tools = row.get("tools") or []
    return _preference(*(_answered(asked, answer, key, tools) for key, answer in zip(keys, answers, strict=True)))


def preferred_output(row: dict[str, Any]) -> Preference:
    """`{"input":{"messages","tools"?},"preferred_output":[…],"non_preferred_output":[…]}`, OpenAI's."""
    given = row.get("input")
    if not isinstance(given, dict) or "messages" not in given:
        raise _Bad("input", f"found {_found(given)}", 'an object with "messages"')
    asked, tools = _turns(given, "messages"), given.get("tools") or []
    keys = ("preferred_output", "non_preferred_output")
    return _preference(*(_answered(asked, _turns(row, key), key, tools) for key in keys))


def labelled(row: dict[str, Any]) -> LabelledExample:
    """`{"text","text_pair"?,"label"}`, or the texts in one of GLUE's words (`PAIRS`); the label a string or an integer.

    `1` and `"1"` are one label: CSV knows only strings.
    """
    label = row["label"]
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise _Bad("label", f"found {_found(label)}", "a string or an integer")
    label = str(label)
    if not label.strip() or not label.isprintable() or len(label) > LONGEST_LABEL:
        raise _Bad("label", f"found {_found(label)}", f"a name of 1 to {LONGEST_LABEL} printable characters")
    whole = next((pair for pair in PAIRS if all(name in row for name in pair if name is not None)), None)
    first, second = whole or next((pair for pair in PAIRS if pair[0] in row), PAIRS[-1])
    alone = second is None or (second == "text_pair" and row.get(second) is None)
    return LabelledExample(_string(row, first), None if alone else _string(row, str(second)), label)


#: The key that marks a row's format → the function that reads it. The first one found counts: a preference has a
#: `prompt` as well and may have `messages`, Alpaca's rows have a `text` with the instruction rendered into it.
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
#: What one or two texts to be classified are called, here and in GLUE's datasets; the first one that is whole counts.
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
#: Characters of a label. What is longer is a text in the wrong column.
LONGEST_LABEL = 100
#: Every key that a format reads; the columns of a table.
KEYS = (
    *FORMATS,
    *("tools", "system", "completion", "input", "output", "rejected", "non_preferred_output"),
    *("text_pair", "premise", "hypothesis", "sentence1", "sentence2", "question1", "question2"),
    *("sentence", "question", "passage"),
)
#: ShareGPT's names → ours.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def read_rows(stream: BinaryIO, *, max_row_bytes: int) -> Iterator[tuple[int, Example | RowError]]:
    """Yield (1-based line, Example or RowError) in constant memory; blank lines are passed over.

    The first good row decides the file's format. An empty file yields one RowError at line 1.
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
            format_ = format_ or kind(row)
    return FileReport(rows=rows, bad_rows=bad, format=format_, problems=problems)


def kind(example: Example) -> str:
    """What a file of such rows is called."""
    if isinstance(example, Preference):
        return "preference"
    if isinstance(example, LabelledExample):
        return "classification"
    return "chat" if isinstance(example, Chat) else "completion" if example.prompt else "text"


def describe(report: FileReport) -> str:
    """The problems of a file in one sentence, for an error message."""
    shown = "; ".join(
        f"line {p.line}: {p.field + ': ' if p.field else ''}{p.message} (allowed: {p.hint})"
        for p in report.problems[:5]
    )
    more = report.bad_rows - min(5, len(report.problems))
    return f"{report.bad_rows} bad row{'s' * (report.bad_rows != 1)}: {shown}" + (f"; and {more} more" if more else "")


def misfit(method: MethodName, format_: str | None) -> str | None:
    """Why a file of this format cannot be trained on with that method; None where it can."""
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
        f"found {format_} rows; method {method!r} trains on {allowed[method]}: choose method {fitting!r}, or mend the "
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
    if not isinstance(said := row.get(key), str) or not said:
        raise _Bad(key, f"found {_found(said)}", "a non-empty string")
    return said


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


def _answered(asked: list[Turn], answer: list[Turn], key: str, tools: Any) -> Chat:
    """The last assistant turn of the answer is what is weighed; all before it is prompt."""
    if not answer[-1].trained:
        raise _Bad(
            f"{key}[{len(answer) - 1}]", "is no answer to weigh", "an assistant message, of weight 1, at the end"
        )
    before = [Turn(turn.message, False) for turn in (*asked, *answer[:-1])]
    return Chat((*before, answer[-1]), _tools(tools))


def _preference(chosen: Chat | Completion, rejected: Chat | Completion) -> Preference:
    if chosen == rejected:
        raise _Bad("", "both answers are the same", "two answers, one better than the other")
    if isinstance(chosen, Chat) and isinstance(rejected, Chat) and chosen.turns[:-1] != rejected.turns[:-1]:
        raise _Bad("", "the two answers follow different prompts", "conversations that differ in their last message")
    return Preference(chosen, rejected)


def _system(row: dict[str, Any]) -> list[Turn]:
    """The system message that some write beside the conversation."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise _Bad("system", f"found {_found(system)}", "a string, or none")
    return [Turn({"role": "system", "content": system}, False)] if system else []


def _said(part: Any, where: str) -> Turn:
    if not isinstance(part, dict):
        raise _Bad(where, f"found {_found(part)}", "an object with from and value")
    speaker, value = part.get("from"), part.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise _Bad(f"{where}.from", f"found {_found(speaker)}", "one of " + ", ".join(SPEAKERS))
    if not isinstance(value, str):
        raise _Bad(f"{where}.value", f"found {_found(value)}", "a string")
    weight = {"weight": part["weight"]} if "weight" in part else {}
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
    """OpenAI's content parts; only text can be trained on here."""
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _Bad(f"{where}.content[{i}]", f"found {_found(part)}", 'text parts: {"type":"text","text":"…"}')
    return "".join(part["text"] for part in parts)
