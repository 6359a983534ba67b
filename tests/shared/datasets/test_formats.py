"""Every row format, with valid and invalid rows. An invalid row is reported by line and field, with what is allowed."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest

from shared.datasets.formats import (
    FORMATS,
    KEYS,
    MAX_PROBLEMS,
    Chat,
    Completion,
    Example,
    LabelledExample,
    Preference,
    RowError,
    Turn,
    check_file,
    describe,
    kind,
    misfit,
    read_rows,
)
from shared.schemas.requests import MethodName

LIMIT = 5000
USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "hello"}
PARTS = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "hello"}
WORSE = {"role": "assistant", "content": "what?"}
BETTER = Preference(
    Chat((Turn(USER, False), Turn(BOT, True))),
    Chat((Turn(USER, False), Turn(WORSE, True))),
)
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}


def one_question(question: str, *, system: str | None = None) -> Chat:
    """A chat with one question, answered with "hello"."""
    before = [Turn({"role": "system", "content": system}, False)] if system else []
    return Chat((*before, Turn({"role": "user", "content": question}, False), Turn(BOT, True)))


GOOD: list[tuple[dict[str, Any], Example]] = [
    ({"messages": [USER, BOT]}, Chat((Turn(USER, False), Turn(BOT, True)))),
    (
        {"messages": [USER, BOT | {"weight": 0}, USER, BOT | {"weight": 1}]},
        Chat((Turn(USER, False), Turn(BOT, False), Turn(USER, False), Turn(BOT, True))),
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": PARTS}]},
        Chat((Turn(USER, False), Turn(BOT, True))),
    ),
    ({"messages": [USER, CALL], "tools": [{"type": "function"}]},
     Chat((Turn(USER, False), Turn(CALL | {"content": ""}, True)), ({"type": "function"},))),
    ({"prompt": "2+2=", "completion": "4"}, Completion("2+2=", "4")),
    ({"prompt": "", "completion": "4"}, Completion("", "4")),
    ({"text": "Quote by ADA: “…”"}, Completion("", "Quote by ADA: “…”")),
    ({"instruction": "Say", "output": "hello"}, one_question("Say")),
    ({"instruction": "Say", "input": "", "output": "hello", "text": "Below is …"}, one_question("Say")),
    ({"instruction": "Say", "input": None, "output": "hello"}, one_question("Say")),
    ({"instruction": "Say", "input": "it", "output": "hello"}, one_question("Say\n\nit")),
    ({"instruction": "Say", "output": "hello", "system": "Be brief"}, one_question("Say", system="Be brief")),
    ({"conversations": [HUMAN, GPT]}, one_question("hi")),
    ({"conversations": [{"from": "system", "value": "Be brief"}, HUMAN, GPT]}, one_question("hi", system="Be brief")),
    ({"conversations": [HUMAN, GPT], "system": "Be brief"}, one_question("hi", system="Be brief")),
    ({"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]}, one_question("hi")),
    ({"conversations": [HUMAN, GPT | {"weight": 0}, {"from": "tool", "value": "4"}, GPT], "tools": [{}]},
     Chat((Turn(USER, False), Turn(BOT, False), Turn({"role": "tool", "content": "4"}, False), Turn(BOT, True)),
          ({},))),
    ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, Preference(Completion("2+2=", "4"), Completion("2+2=", "5"))),
    ({"prompt": [USER], "chosen": [BOT], "rejected": [WORSE]}, BETTER),
    ({"chosen": [USER, BOT], "rejected": [USER, WORSE]}, BETTER),
    ({"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, WORSE]}, BETTER),
    ({"prompt": "hi", "chosen": [BOT], "rejected": [WORSE]}, BETTER),
    ({"prompt": "hi", "chosen": [USER, BOT], "rejected": [USER, WORSE], "messages": [USER, BOT]}, BETTER),
    ({"input": {"messages": [USER], "parallel_tool_calls": True}, "preferred_output": [BOT],
      "non_preferred_output": [WORSE]}, BETTER),
    ({"prompt": [USER, BOT, USER], "chosen": [BOT], "rejected": [WORSE], "tools": [{}]},
     Preference(*(Chat((Turn(USER, False), Turn(BOT, False), Turn(USER, False), Turn(last, True)), ({},))
                  for last in (BOT, WORSE)))),
    ({"text": "hats", "label": "good"}, LabelledExample("hats", None, "good")),
    ({"text": "hats", "label": -1, "text_pair": None}, LabelledExample("hats", None, "-1")),
    ({"text": "hats", "text_pair": "caps", "label": "1"}, LabelledExample("hats", "caps", "1")),
    ({"sentence": "hats", "label": 0, "idx": 7}, LabelledExample("hats", None, "0")),
    ({"sentence1": "hats", "sentence2": "caps", "label": 1}, LabelledExample("hats", "caps", "1")),
    ({"question": "hats?", "sentence": "felt", "label": 0}, LabelledExample("hats?", "felt", "0")),
    ({"question": "hats?", "passage": "felt", "label": 0}, LabelledExample("hats?", "felt", "0")),
    ({"question": "hats?", "text": "felt", "label": 0}, LabelledExample("hats?", "felt", "0")),
    ({"question1": "hats?", "question2": "caps?", "label": 1}, LabelledExample("hats?", "caps?", "1")),
    ({"premise": "hats", "hypothesis": "caps", "label": 2}, LabelledExample("hats", "caps", "2")),
    ({"prompt": "2+2=", "completion": "4", "label": True}, Completion("2+2=", "4")),
]  # fmt: skip

BAD = [
    ('{"messages": [', "", "not JSON at column"),
    ("[1, 2]", "", "found [1, 2]"),
    ('"hello"', "", r'the file begins with "\"hello\""'),
    ("{}", "", "found keys none"),
    ('{"question": 1}', "", 'found keys "question"'),
    ('{"te\\u0000xt": 1}', "", r'found keys "te\u0000xt"'),
    ('{"text": "\\ud800"}', "", "unpaired surrogate"),
    ('{"text": ' + "1" * 4500 + "}", "", "unsupported JSON"),
    ('{"messages": []}', "messages", "found []"),
    ('{"messages": "hi"}', "messages", 'found "hi"'),
    ('{"messages": [7]}', "messages[0]", "found 7"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "messages[0].role", 'found "robot"'),
    ('{"messages": [{"content": "x"}]}', "messages[0].role", "found nothing"),
    ('{"messages": [{"role": "user"}]}', "messages[0].content", "found nothing"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "messages", "no assistant message"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 1}]}', "messages[0].weight", "on a user message"),
    ('{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}', "messages[0].weight", "found 0.5"),
    ('{"messages": [{"role": "assistant", "content": "x", "weight": true}]}', "messages[0].weight", "found true"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "tools": "f"}', "tools", 'found "f"'),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages[0].content[0]", "image_url"),
    ('{"prompt": "x"}', "completion", "found nothing"),
    ('{"prompt": "x", "completion": ""}', "completion", 'found ""'),
    ('{"prompt": 1, "completion": "x"}', "prompt", "found 1"),
    ('{"text": ""}', "text", 'found ""'),
    ('{"text": null}', "text", "found nothing"),
    ('{"instruction": ""}', "instruction", 'found ""'),
    ('{"instruction": "x", "input": 7, "output": "y"}', "input", "found 7"),
    ('{"instruction": "x"}', "output", "found nothing"),
    ('{"instruction": "x", "output": ["y"]}', "output", 'found ["y"]'),
    ('{"instruction": "x", "output": "y", "system": 1}', "system", "found 1"),
    ('{"conversations": {}}', "conversations", "found {}"),
    ('{"conversations": ["hi"]}', "conversations[0]", 'found "hi"'),
    ('{"conversations": [{"from": "bot", "value": "x"}]}', "conversations[0].from", 'found "bot"'),
    ('{"conversations": [{"from": ["gpt"], "value": "x"}]}', "conversations[0].from", 'found ["gpt"]'),
    ('{"conversations": [{"from": "gpt"}]}', "conversations[0].value", "found nothing"),
    ('{"conversations": [{"from": "gpt", "value": "x", "weight": 2}]}', "conversations[0].weight", "found 2"),
    ('{"conversations": [{"from": "human", "value": "x"}]}', "conversations", "no assistant message"),
    ("[" * 2000 + "]" * 2000, "", "nested too deeply"),
    ('{"chosen": "x", "rejected": "y"}', "prompt", "found nothing"),
    ('{"prompt": "p", "chosen": "x"}', "rejected", "found nothing"),
    ('{"prompt": "p", "chosen": "x", "rejected": ""}', "rejected", 'found ""'),
    ('{"prompt": "p", "chosen": "x", "rejected": "x"}', "", "both answers are the same"),
    ('{"prompt": "p", "chosen": "", "rejected": "x"}', "chosen", 'found ""'),
    ('{"chosen": 7, "rejected": 8}', "chosen", "found 7"),
    (
        '{"chosen": [{"role": "user", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]}',
        "chosen[0]",
        "is not a trained assistant message",
    ),
    ('{"chosen": [{"role": "assistant", "content": "x"}]}', "rejected", "is missing"),
    ('{"text": "x", "label": null}', "label", "found nothing"),
    ('{"text": "x", "label": true}', "label", "found true"),
    ('{"text": "x", "label": 3.8}', "label", "found 3.8"),
    ('{"text": "x", "label": " "}', "label", 'found " "'),
    ('{"text": "x", "label": "a\\u0000"}', "label", r'found "a\u0000"'),
    ('{"text": "x", "label": "' + "y" * 101 + '"}', "label", "yyy…"),
    ('{"label": 1}', "text", "found nothing"),
    ('{"text": "", "label": 1}', "text", 'found ""'),
    ('{"text": "x", "text_pair": 2, "label": 1}', "text_pair", "found 2"),
    ('{"premise": "x", "label": 1}', "hypothesis", "found nothing"),
    ('{"sentence1": "x", "sentence2": "", "label": 1}', "sentence2", 'found ""'),
    ('{"input": "x", "preferred_output": []}', "input", 'found "x"'),
    ('{"input": {"messages": [{"role": "user", "content": "x"}]}, "preferred_output": []}', "preferred_output", "[]"),
    (
        '{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],'
        ' "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "x"}]}',
        "",
        "different prompts",
    ),
]


@pytest.mark.parametrize(("row", "example"), GOOD)
def test_valid_rows_are_parsed(row: dict[str, Any], example: Example) -> None:
    assert parse(json.dumps(row)) == [(1, example)]


def test_every_format_and_key_has_a_valid_row() -> None:
    assert {next(key for key in FORMATS if key in row) for row, _ in GOOD} == set(FORMATS)
    assert {key for row, _ in GOOD for key in row} == {*KEYS, "idx"}


@pytest.mark.parametrize(("line", "field", "message"), BAD)
def test_an_invalid_row_is_reported_by_field(line: str, field: str, message: str) -> None:
    ((number, error),) = parse(line)
    assert isinstance(error, RowError)
    assert (number, error.line, error.field) == (1, 1, field)
    assert message in error.message
    assert error.hint


def test_invalid_rows_are_reported_by_line() -> None:
    good = json.dumps({"text": "x"})
    lines = [good, "", good, "{oops", good, json.dumps({"prompt": "a", "completion": "b"})]
    found = parse("\n".join(lines))
    assert [(n, isinstance(row, RowError)) for n, row in found] == [
        (1, False), (3, False), (4, True), (5, False), (6, True),
    ]  # fmt: skip
    assert "'prompt' row in a file of 'text' rows" in str(found[-1][1])


@pytest.mark.parametrize(("method", "format_"), [("supervised", "text"), ("dpo", "preference")])
def test_a_format_is_accepted_by_one_method_only(method: MethodName, format_: str) -> None:
    labels = kind(LabelledExample("hats", None, "good"))
    assert misfit("classification", labels) is misfit(method, format_) is misfit(method, None) is None
    assert f"method {method!r} trains on" in str(misfit(method, labels))
    assert str(misfit(method, labels)).endswith("choose method 'classification', or fix the file")
    assert str(misfit("classification", format_)).endswith(f"choose method {method!r}, or fix the file")


def test_a_row_without_a_label_among_labelled_rows_is_an_error() -> None:
    found = parse('{"text": "hats", "label": 1}\n{"text": "caps"}')
    assert "a 'text' row in a file of 'label' rows" in str(found[1][1])


def test_csv_and_json_lines_give_the_same_labels() -> None:
    rows = [{"text": f"hat {i}", "label": i} for i in range(3)]
    table = "text,label\n" + "".join(f"hat {i},{i}\n" for i in range(3))
    assert [example for _, example in parse(table)] == [
        example for _, example in parse("\n".join(map(json.dumps, rows)))
    ]


def test_an_empty_file_is_one_error() -> None:
    for nothing in ("", "\n\n  \n"):
        ((_, error),) = parse(nothing)
        assert isinstance(error, RowError)
        assert error.message == "the file is empty"


def test_invalid_utf8_is_reported_by_byte() -> None:
    ((_, error),) = list(read_rows(io.BytesIO('{"text": "Caf\xe9"}\n'.encode("latin-1")), max_row_bytes=LIMIT))
    assert isinstance(error, RowError)
    assert "byte 14 of the line is not UTF-8" in error.message


def test_a_byte_order_mark_and_windows_line_endings_are_accepted() -> None:
    body = '\ufeff{"text": "x"}\r\n{"text": "y"}\r\n'.encode()
    rows = list(read_rows(io.BytesIO(body), max_row_bytes=LIMIT))
    assert rows == [(1, Completion("", "x")), (2, Completion("", "y"))]


def test_a_line_that_is_too_long_is_skipped_in_constant_memory() -> None:
    body = b'{"text": "' + b"x" * 20_000_000 + b'"}\n{"text": "y"}\n'
    stream = io.BytesIO(body)
    tracemalloc.start()
    rows = list(read_rows(stream, max_row_bytes=LIMIT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [number for number, _ in rows] == [1, 2]
    assert "longer than 5,000 bytes" in str(rows[0][1])
    assert rows[1][1] == Completion("", "y")
    assert peak < 1_000_000


def test_the_report_counts_all_problems_and_lists_the_first() -> None:
    report = check_file(io.BytesIO(b'{"text":"x"}\n' + b"oops\n" * 50), max_row_bytes=LIMIT)
    assert (report.rows, report.bad_rows, report.format, len(report.problems)) == (1, 50, "text", MAX_PROBLEMS)
    sentence = describe(report)
    assert sentence.startswith("50 bad rows: line 2: not JSON at column 1")
    assert sentence.endswith("and 45 more")


def parse(body: str) -> list[tuple[int, Example | RowError]]:
    return list(read_rows(io.BytesIO(body.encode()), max_row_bytes=LIMIT))
