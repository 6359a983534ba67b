"""JSON lines, CSV and Parquet: all give the same rows, errors name the line, and no file exhausts the memory."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared import linux
from shared.datasets import parquet_child, readers
from shared.datasets.formats import Chat, Completion, Example, RowError, read_rows
from shared.schemas.results import RowProblem

LIMIT = 5000
Rows = list[dict[str, Any]]

strings = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
non_empty = strings.filter(bool)
texts = st.fixed_dictionaries({"text": strings})
completions = st.fixed_dictionaries({"prompt": strings, "completion": strings})
instructions = st.fixed_dictionaries({"instruction": non_empty, "input": strings, "output": strings, "system": strings})
answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": strings}, optional={"weight": st.just(0)})
turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "robot"]), "content": strings}) | answer
sharegpt_turn = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": strings})
chats = st.fixed_dictionaries({"messages": st.lists(turn, max_size=3)})
sharegpt = st.fixed_dictionaries({"conversations": st.lists(sharegpt_turn, max_size=3), "system": strings})


# ---------------------------------------------------------------- the same rows from every file type


@given(
    st.one_of(*(st.lists(kind, min_size=1, max_size=5) for kind in (texts, completions, instructions))),
    st.sampled_from(",;\t"),
)
@example([{"text": "a single column, whose fields; need\x1f no quotes"}], "\t")
def test_csv_gives_the_rows_of_json_lines(rows: Rows, delimiter: str) -> None:
    assert rows_of(as_csv(rows, delimiter)) == rows_of(as_json(rows))


@settings(max_examples=8, deadline=None)
@given(
    st.one_of(*(st.lists(kind, min_size=1, max_size=9) for kind in (texts, completions, instructions, chats, sharegpt)))
)
def test_parquet_gives_the_rows_of_json_lines(rows: Rows) -> None:
    assert read(as_parquet(rows)) == read(as_json(rows))


def test_null_fields_of_parquet_structs_are_dropped() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows: Rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
        {"messages": [{"role": "assistant", "tool_calls": [call]}], "tools": [{"type": "function"}]},
    ]
    assert read(as_parquet(rows)) == read(as_json(rows))
    assert [type(row) for _, row in read(as_parquet(rows))] == [Chat, Chat]


def test_parquet_may_have_many_row_groups_and_unknown_columns() -> None:
    table = pa.table(
        {
            "image": [b"\xff" * 100] * 100,
            "text": pa.array([f"row {i}".encode() for i in range(100)], pa.binary()),
        }
    )
    rows = read(written(table, row_group_size=7, compression="zstd"))
    assert rows == [(i + 1, Completion("", f"row {i}")) for i in range(100)]


# ---------------------------------------------------------------- CSV


def test_the_line_of_a_csv_row_is_where_it_begins() -> None:
    body = '\ufeff prompt ,id,completion\r\n"two\nlines",1,a\r\n\r\n"say ""it""",2,"b, c"\r\n,3,\r\n'
    *good, (line, problem) = read(body.encode())
    assert good == [(2, Completion("two\nlines", "a")), (5, Completion('say "it"', "b, c"))]
    assert isinstance(problem, RowProblem)
    assert (line, problem.field, problem.message) == (6, "completion", 'found ""')


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"x", "found 1 fields for 2 columns"),
        (b"hello, world, x", "found 3 fields for 2 columns"),
        (b"caf\xe9,1", "byte 4 of the line is not UTF-8"),
        (b"a\0b,1", "byte 2 of the line is NUL"),
        (b'"a"b,1', "not CSV: ',' expected after '\"'"),
        (b"a\rb,1", "not CSV: new-line character seen in unquoted field"),
        (b"x" * 6000, "the line is longer than 5,000 bytes"),
        (b",1", 'found ""'),
    ],
)
def test_an_invalid_csv_row_is_reported_and_the_next_is_read(row: bytes, message: str) -> None:
    rows = read(b"text,id\nx,0\n" + row + b"\ny,2\n")
    assert (rows[0], rows[2]) == ((2, Completion("", "x")), (4, Completion("", "y")))
    line, problem = rows[1]
    assert isinstance(problem, RowProblem)
    assert (line, problem.line, problem.message) == (3, 3, message)
    assert problem.hint


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        (b'text\n"a\nb\n', 2, "not CSV: unexpected end of data"),
        (b"text,text\nx,y\n", 1, 'the header names "text" twice'),
        (b'text,"\xff\xfe"\nx,y\n', 1, "byte 7 of the line is not UTF-8"),
        (b"text\n", 1, "the file is empty"),
        (b"output,id\nx,1\n", 1, 'the file begins with "output,id"'),
        (b"messages\nhello\n", 2, 'found "hello"'),
    ],
)
def test_a_csv_without_a_valid_row_is_one_error(body: bytes, line: int, message: str) -> None:
    problem = only_problem(body)
    assert (problem.line, problem.message) == (line, message)


def test_an_unclosed_quote_is_read_in_constant_memory() -> None:
    stream = io.BytesIO(b'text\n"' + b"x" * 99 + (b"y" * 99 + b"\n") * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in read_rows(stream, max_row_bytes=LIMIT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 19_000
    assert peak < 1_000_000


# ---------------------------------------------------------------- invalid Parquet


def test_a_truncated_parquet_file_is_one_error() -> None:
    whole = as_parquet([{"text": "x" * 50}] * 50)
    for cut in (4, 11, len(whole) // 2, len(whole) - 1):
        problem = only_problem(whole[:cut])
        assert (problem.line, problem.message.partition(":")[0]) == (1, "the Parquet file is broken")


def test_rows_before_a_broken_page_are_read() -> None:
    body = bytearray(written(pa.table({"text": [f"row {i} " + "x" * 400 for i in range(64)]}), row_group_size=32))
    second = pq.ParquetFile(io.BytesIO(body)).metadata.row_group(1).column(0)
    begin = second.dictionary_page_offset
    body[begin : begin + 100] = b"\xff" * 100
    *good, (line, problem) = read(bytes(body))
    assert [row for row, _ in good] == list(range(1, 33))
    assert isinstance(problem, RowProblem)
    assert (line, problem.message.partition(":")[0]) == (33, "the Parquet file is broken")


def test_parquet_without_a_known_column_is_one_error() -> None:
    problem = only_problem(as_parquet([{"question": "x", "answer": "y"}]))
    assert problem.message == 'found columns "question", "answer"'
    assert "messages" in problem.hint


def test_invalid_utf8_in_parquet_is_reported_by_row() -> None:
    cells = pa.array([b"x", b"y", b"\xff", b"z"])
    *good, (line, problem) = read(written(pa.table({"text": cells.view(pa.string())})))
    assert good == [(1, Completion("", "x")), (2, Completion("", "y"))]
    assert isinstance(problem, RowProblem)
    assert (line, problem.message) == (3, "the row contains text that is not UTF-8")
    rows = read(written(pa.table({"text": cells})))
    assert [isinstance(row, RowProblem) for _, row in rows] == [False, False, True, False]


def test_a_row_over_the_limit_is_reported_and_the_next_is_read() -> None:
    (_, problem), following = read(as_parquet([{"text": "x" * 6000}, {"text": "y"}]))
    assert "longer than 5,000 bytes" in str(problem)
    assert following == (2, Completion("", "y"))


def test_a_decompression_bomb_only_ends_the_child() -> None:
    """A file of a few kilobytes with two gigabytes of text: every row has the same cell.

    Its metadata declares twenty megabytes.
    """
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), ["z" * 20_000_000])
    bomb = written(pa.table({"text": cells}), compression="zstd", store_schema=False)
    assert len(bomb) < 10_000
    assert only_problem(bomb).message == (
        "a page or row of the Parquet file needs more than 1,073,741,824 bytes of memory"
    )


def test_the_limit_of_decompressed_bytes_holds_for_declared_and_for_actual_sizes() -> None:
    table = pa.table({"text": ["x" * 1000] * 50})
    for dictionary, message in (
        (False, r"the rows decompress to 5\d,\d+ bytes"),
        (True, "the rows decompress to more than 20,000"),
    ):
        stream = io.BytesIO(written(table, use_dictionary=dictionary))
        with pytest.raises(parquet_child.Refused, match=message):
            list(parquet_child.lines(stream, ["text"], ["text"], limit=20_000))


def test_a_crash_of_the_child_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    assert (
        "the Parquet reader crashed on this file (exit code -11)" in only_problem(as_parquet([{"text": "x"}])).message
    )


def test_the_stream_can_be_read_again_after_its_rows(tmp_path: Path) -> None:
    """The upload endpoint validates the rows first and then sends the stream to the bucket."""
    path = tmp_path / "rows.parquet"
    body = written(pa.table({"text": [os.urandom(1000).hex() for _ in range(300)]}), compression=None)
    path.write_bytes(body)
    for whole in (True, False):
        with path.open("rb", buffering=2**20) as stream:  # a buffer that holds the first bytes
            with closing(readers.raw_rows(stream, markers=["text"], columns=["text"], max_row_bytes=LIMIT)) as rows:
                assert len(list(rows) if whole else [next(rows)]) == (300 if whole else 1)
            stream.seek(0)
            assert stream.read() == body


def test_the_child_ends_when_the_iterator_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet([{"text": "x" * 4000}] * 2000))
    with (
        path.open("rb") as stream,
        closing(readers.raw_rows(stream, markers=["text"], columns=["text"], max_row_bytes=LIMIT)) as rows,
    ):
        assert next(rows) == (1, {"text": "x" * 4000})
        (child,) = parquet_children()
    assert child not in parquet_children()


def test_the_child_gets_no_settings_and_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child decompresses untrusted files. It is in our process group, so it is killed with us."""
    monkeypatch.setenv("MILLINER_S3_SECRET_KEY", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet([{"text": "x" * 4000}] * 2000))
    with (
        path.open("rb") as stream,
        closing(readers.raw_rows(stream, markers=["text"], columns=["text"], max_row_bytes=LIMIT)) as rows,
    ):
        next(rows)
        (child,) = parquet_children()
        names = {line.partition("=")[0] for line in Path(f"/proc/{child}/environ").read_text().split("\0")[:-1]}
        assert "PATH" in names
        assert names <= set(linux.BASIC)
        assert os.getpgid(int(child)) == os.getpgrp()


def parquet_children() -> list[str]:
    """Ids of the Parquet readers among the children of this process."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in pids if b"shared.datasets.parquet_child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# ---------------------------------------------------------------- other file types


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x1f\x8b\x08\x00", "the file is compressed with gzip"),
        (b"PK\x03\x04....", "the file is a ZIP archive or a spreadsheet"),
        ("text\nhello".encode("utf-16"), "the file is text in UTF-16"),
        (b"PARE....", "the file is an encrypted Parquet file"),
        (b"question,answer\nx,y\n", 'the file begins with "question,answer"'),
        (b"\x8f\xff\x01", r'the file begins with "\\x8f\\xff\u0001"'),
    ],
)
def test_an_unsupported_file_type_is_one_error_with_the_allowed_types(body: bytes, message: str) -> None:
    problem = only_problem(body)
    assert (problem.line, problem.message) == (1, message)
    assert all(kind in problem.hint for kind in ("JSON lines", "CSV", "Parquet"))


@settings(deadline=None)
@given(
    st.sampled_from([b"text,id\n", b"prompt;completion\n", b'"text"\n', b'{"text":"x"}\n', b""]),
    st.binary(max_size=200),
)
def test_arbitrary_bytes_never_crash_the_reader(start: bytes, rest: bytes) -> None:
    body = start + rest
    for line, row in read(body):
        assert 1 <= line <= body.count(b"\n") + 1
        assert isinstance(row, Chat | Completion | RowProblem)


def test_the_parent_does_not_import_pyarrow() -> None:
    code = "import sys, shared.datasets.formats; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- files


def read(body: bytes) -> list[tuple[int, Example | RowProblem]]:
    with tempfile.TemporaryFile() as stream:  # a child reads Parquet, and needs a file descriptor
        stream.write(body)
        stream.seek(0)
        rows = list(read_rows(stream, max_row_bytes=LIMIT))
    return [(line, row.problem() if isinstance(row, RowError) else row) for line, row in rows]


def rows_of(body: bytes) -> list[Example | tuple[str, str]]:
    """The rows without line numbers and hints, which differ between file types."""
    return [(row.field, row.message) if isinstance(row, RowProblem) else row for _, row in read(body)]


def only_problem(body: bytes) -> RowProblem:
    ((_, problem),) = read(body)
    assert isinstance(problem, RowProblem)
    assert problem.hint
    return problem


def as_json(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows, delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    return written(pa.table({key: [row.get(key) for row in rows] for key in {key: 0 for row in rows for key in row}}))


def written(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()
