"""JSON lines, CSV and Parquet: the same rows from each, broken files told by line, and none that fills the memory."""

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

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
some = words.filter(bool)
texts = st.fixed_dictionaries({"text": words})
pairs = st.fixed_dictionaries({"prompt": words, "completion": words})
tasks = st.fixed_dictionaries({"instruction": some, "input": words, "output": words, "system": words})
answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": words}, optional={"weight": st.just(0)})
turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "robot"]), "content": words}) | answer
said = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": words})
chats = st.fixed_dictionaries({"messages": st.lists(turn, max_size=3)})
told = st.fixed_dictionaries({"conversations": st.lists(said, max_size=3), "system": words})


# ---------------------------------------------------------------- the same rows from each


@given(st.one_of(*(st.lists(kind, min_size=1, max_size=5) for kind in (texts, pairs, tasks))), st.sampled_from(",;\t"))
@example([{"text": "a lone column, whose fields; need\x1f no quotes"}], "\t")
def test_csv_gives_the_rows_of_json_lines(rows: Rows, delimiter: str) -> None:
    assert rows_of(as_csv(rows, delimiter)) == rows_of(as_json(rows))


@settings(max_examples=8, deadline=None)
@given(st.one_of(*(st.lists(kind, min_size=1, max_size=9) for kind in (texts, pairs, tasks, chats, told))))
def test_parquet_gives_the_rows_of_json_lines(rows: Rows) -> None:
    assert read(as_parquet(rows)) == read(as_json(rows))


def test_a_struct_has_only_the_fields_that_its_row_had() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows: Rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
        {"messages": [{"role": "assistant", "tool_calls": [call]}], "tools": [{"type": "function"}]},
    ]
    assert read(as_parquet(rows)) == read(as_json(rows))
    assert [type(row) for _, row in read(as_parquet(rows))] == [Chat, Chat]


def test_parquet_of_many_row_groups_and_of_columns_that_nobody_asked_for() -> None:
    table = pa.table(
        {
            "image": [b"\xff" * 100] * 100,
            "text": pa.array([f"row {i}".encode() for i in range(100)], pa.binary()),
        }
    )
    rows = read(written(table, row_group_size=7, compression="zstd"))
    assert rows == [(i + 1, Completion("", f"row {i}")) for i in range(100)]


# ---------------------------------------------------------------- CSV


def test_a_csv_row_has_the_line_that_it_begins_at() -> None:
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
def test_a_broken_csv_row_is_told_and_the_next_is_read(row: bytes, message: str) -> None:
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
def test_a_csv_without_a_row_is_one_error(body: bytes, line: int, message: str) -> None:
    problem = only_problem(body)
    assert (problem.line, problem.message) == (line, message)


def test_a_quote_left_open_is_read_in_constant_memory() -> None:
    stream = io.BytesIO(b'text\n"' + b"x" * 99 + (b"y" * 99 + b"\n") * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in read_rows(stream, max_row_bytes=LIMIT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 19_000
    assert peak < 1_000_000


# ---------------------------------------------------------------- broken Parquet


def test_parquet_cut_anywhere_is_one_error() -> None:
    whole = as_parquet([{"text": "x" * 50}] * 50)
    for cut in (4, 11, len(whole) // 2, len(whole) - 1):
        problem = only_problem(whole[:cut])
        assert (problem.line, problem.message.partition(":")[0]) == (1, "the Parquet file is broken")


def test_a_broken_page_ends_the_rows_where_it_is() -> None:
    body = bytearray(written(pa.table({"text": [f"row {i} " + "x" * 400 for i in range(64)]}), row_group_size=32))
    second = pq.ParquetFile(io.BytesIO(body)).metadata.row_group(1).column(0)
    begin = second.dictionary_page_offset
    body[begin : begin + 100] = b"\xff" * 100
    *good, (line, problem) = read(bytes(body))
    assert [row for row, _ in good] == list(range(1, 33))
    assert isinstance(problem, RowProblem)
    assert (line, problem.message.partition(":")[0]) == (33, "the Parquet file is broken")


def test_parquet_without_a_known_column() -> None:
    problem = only_problem(as_parquet([{"question": "x", "answer": "y"}]))
    assert problem.message == 'found columns "question", "answer"'
    assert "messages" in problem.hint


def test_parquet_text_that_is_not_utf8() -> None:
    cells = pa.array([b"x", b"y", b"\xff", b"z"])
    *good, (line, problem) = read(written(pa.table({"text": cells.view(pa.string())})))
    assert good == [(1, Completion("", "x")), (2, Completion("", "y"))]
    assert isinstance(problem, RowProblem)
    assert (line, problem.message) == (3, "the row holds text that is not UTF-8")
    rows = read(written(pa.table({"text": cells})))
    assert [isinstance(row, RowProblem) for _, row in rows] == [False, False, True, False]


def test_a_row_that_is_too_long_is_told_and_the_next_is_read() -> None:
    (_, problem), following = read(as_parquet([{"text": "x" * 6000}, {"text": "y"}]))
    assert "longer than 5,000 bytes" in str(problem)
    assert following == (2, Completion("", "y"))


def test_a_bomb_goes_off_in_the_child() -> None:
    """Two gigabytes in a few kilobytes, and by the file's own account twenty megabytes: one cell in every row."""
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), ["z" * 20_000_000])
    bomb = written(pa.table({"text": cells}), compression="zstd", store_schema=False)
    assert len(bomb) < 10_000
    assert only_problem(bomb).message == "a page or a row of it unpacks to more than 1,073,741,824 bytes allow"


def test_more_than_a_dataset_may_hold_is_refused_before_it_is_read_or_as_soon_as_it_shows() -> None:
    table = pa.table({"text": ["x" * 1000] * 50})
    for dictionary, said in (
        (False, r"its rows unpack to 5\d,\d+ bytes"),
        (True, "its rows unpack to more than 20,000"),
    ):
        stream = io.BytesIO(written(table, use_dictionary=dictionary))
        with pytest.raises(parquet_child.Refused, match=said):
            list(parquet_child.lines(stream, ["text"], ["text"], unpacked=20_000))


def test_a_reader_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -SEGV $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    assert "ended its reader (exit code -11)" in only_problem(as_parquet([{"text": "x"}])).message


def test_the_stream_is_read_again_as_it_is(tmp_path: Path) -> None:
    """The upload endpoint sends it to the bucket after its rows were read."""
    path = tmp_path / "rows.parquet"
    body = written(pa.table({"text": [os.urandom(1000).hex() for _ in range(300)]}), compression=None)
    path.write_bytes(body)
    for whole in (True, False):
        with path.open("rb", buffering=2**20) as stream:  # a buffer that holds the head
            with closing(readers.raw_rows(stream, markers=["text"], columns=["text"], max_row_bytes=LIMIT)) as rows:
                assert len(list(rows) if whole else [next(rows)]) == (300 if whole else 1)
            stream.seek(0)
            assert stream.read() == body


def test_a_reader_that_nobody_hears_out_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet([{"text": "x" * 4000}] * 2000))
    with (
        path.open("rb") as stream,
        closing(readers.raw_rows(stream, markers=["text"], columns=["text"], max_row_bytes=LIMIT)) as rows,
    ):
        assert next(rows) == (1, {"text": "x" * 4000})
        (child,) = parquet_children()
    assert child not in parquet_children()


def test_a_reader_knows_no_setting_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It unpacks what a stranger has sent. And it is killed with our process group, of which it is a part."""
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
    """The Parquet readers that are this process's children."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in pids if b"shared.datasets.parquet_child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# ---------------------------------------------------------------- neither of them


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
def test_another_kind_of_file_is_one_error_that_says_what_is_allowed(body: bytes, message: str) -> None:
    problem = only_problem(body)
    assert (problem.line, problem.message) == (1, message)
    assert all(kind in problem.hint for kind in ("JSON lines", "CSV", "Parquet"))


@settings(deadline=None)
@given(
    st.sampled_from([b"text,id\n", b"prompt;completion\n", b'"text"\n', b'{"text":"x"}\n', b""]),
    st.binary(max_size=200),
)
def test_no_bytes_break_the_reader(start: bytes, rest: bytes) -> None:
    body = start + rest
    for line, row in read(body):
        assert 1 <= line <= body.count(b"\n") + 1
        assert isinstance(row, Chat | Completion | RowProblem)


def test_reading_needs_no_pyarrow_here() -> None:
    code = "import sys, shared.formats; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- files


def read(body: bytes) -> list[tuple[int, Example | RowProblem]]:
    with tempfile.TemporaryFile() as stream:  # Parquet is read by a child, which needs a descriptor
        stream.write(body)
        stream.seek(0)
        rows = list(read_rows(stream, max_row_bytes=LIMIT))
    return [(line, row.problem() if isinstance(row, RowError) else row) for line, row in rows]


def rows_of(body: bytes) -> list[Example | tuple[str, str]]:
    """Without lines and hints, in which the kinds of file differ."""
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
