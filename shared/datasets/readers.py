"""Read the rows of a dataset file as JSON objects with their lines: JSON lines, CSV or Parquet, detected by content.

Owns: file types, encodings, and memory use, which is at most one row at a time. Must not interpret rows
(`shared.datasets.formats` does), nor use the file's name: the trainer has none, and a name may be wrong.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Collection, Generator, Iterator
from typing import IO, Any

from shared import linux

SAMPLE = '{"messages":[{"role":"user","content":"…"},{"role":"assistant","content":"…"}]}'
ONE_OBJECT = "one JSON object per line, such as " + SAMPLE
BOM = b"\xef\xbb\xbf"
HEAD = 64 * 1024
DELIMITERS = ",;\t"
#: Delimiter for a CSV with a single column, where commas, semicolons and tabs are text. Its own occurrences are text
#: too: `_row` joins the fields again.
NO_DELIMITER = "\x1f"
#: First bytes of other types of files that people upload → what to call them.
UNSUPPORTED = {
    b"\x1f\x8b": "compressed with gzip",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet",
    b"BZh": "compressed with bzip2",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"ARROW1": "an Arrow file",
    b"PARE": "an encrypted Parquet file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}

# The csv module has one limit per process, by default 128 KiB per field. Ours is the bytes of a row (`_RecordLines`).
csv.field_size_limit(2**31 - 1)


class Unreadable(Exception):
    """A row that is not a JSON object; with `ends_file`, the rest of the file cannot be read."""

    def __init__(self, message: str, hint: str, *, ends_file: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.ends_file = ends_file


Row = tuple[int, dict[str, Any] | Unreadable]


def raw_rows(
    stream: IO[bytes], *, markers: Collection[str], columns: Collection[str], max_row_bytes: int
) -> Generator[Row]:
    """Yield (1-based line, object or Unreadable) for each row, in constant memory. Blank lines are skipped.

    A CSV header and the columns of a Parquet file must have at least one of `markers`. Of a Parquet file only `columns`
    are read. The line of a CSV row is the one that it begins at, that of a Parquet row is its number. Parquet needs a
    stream with a `fileno`.
    """
    head = stream.read(HEAD)
    stream.seek(0)
    start = head.removeprefix(BOM).lstrip()
    if head.startswith(b"PAR1"):
        yield from _parquet(stream, markers, columns, max_row_bytes)
    elif not start or start.startswith((b"{", b"[")):
        yield from _json_lines(stream, max_row_bytes)
    elif delimiter := _delimiter(start, markers):
        yield from _csv(stream, delimiter, max_row_bytes)
    else:
        yield 1, Unreadable(_unsupported(head), f"JSON lines, such as {SAMPLE}; CSV with a header; or Parquet")


def found(value: Any) -> str:
    """Format a value for a message: as JSON, which escapes control characters, and at most 40 characters long."""
    shown = json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None else shown if len(shown) <= 40 else shown[:39] + "…"


# ---------------------------------------------------------------- JSON lines


def _json_lines(stream: IO[bytes], limit: int) -> Iterator[Row]:
    for line, raw in _lines(stream, limit):
        if raw is None:
            yield line, _too_long(limit)
        elif raw.strip():
            try:
                yield line, _object(raw)
            except Unreadable as error:
                yield line, error


def _lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, bytes), or None in place of a line over `limit`. At most `limit` bytes are held in memory."""
    number = 0
    while raw := stream.readline(limit + 1):
        number += 1
        if len(raw) <= limit or raw.endswith(b"\n"):
            yield number, raw.removeprefix(BOM) if number == 1 else raw
            continue
        while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
            pass
        yield number, None


def _object(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(_text(raw))
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON at column {error.colno}: {error.msg}", ONE_OBJECT) from None
    except ValueError as error:
        raise Unreadable(f"unsupported JSON: {error}", "numbers of at most 4,300 digits") from None
    except RecursionError:
        raise Unreadable("the JSON is nested too deeply", ONE_OBJECT) from None
    if not isinstance(row, dict):
        raise Unreadable(f"found {found(row)}", ONE_OBJECT)
    if b"\\ud" in raw.lower() and not _is_unicode(row):
        raise Unreadable("found an unpaired surrogate (\\ud8xx alone)", "valid Unicode text")
    return row


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"byte {error.start + 1} of the line is not UTF-8", "save the file as UTF-8") from None


def _is_unicode(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_long(limit: int) -> Unreadable:
    return Unreadable(f"the line is longer than {limit:,} bytes", "split the row or shorten it")


# ---------------------------------------------------------------- CSV


class _RecordLines:
    """Lines for `csv.reader`: numbered, decoded, and limited in total bytes per record."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self.first_line = 0
        self._lines, self._limit, self._held = _lines(stream, limit), limit, 0

    def begin(self) -> None:
        """Start a record at the next line."""
        self._held = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, raw = next(self._lines)
        if not self._held:
            self.first_line = number
        if raw is None:
            raise _too_long(self._limit)
        self._held += len(raw)
        if self._held > self._limit:
            raise Unreadable(f"the row that begins here has more than {self._limit:,} bytes", "close every quote")
        if b"\0" in raw:
            raise Unreadable(f"byte {raw.index(0) + 1} of the line is NUL", "save the file as text in UTF-8")
        return _text(raw)


def _csv(stream: IO[bytes], delimiter: str, limit: int) -> Iterator[Row]:
    """Read RFC 4180, with any delimiter and line ending that spreadsheets write."""
    header: list[str] | None = None
    for line, fields in _records(stream, delimiter, limit):
        try:
            if isinstance(fields, Unreadable):
                raise fields
            if header is not None:
                yield line, _row(header, fields, delimiter)
            else:
                header = _header(fields)
        except Unreadable as error:
            yield line, error
            if header is None:
                return  # without a header, no row can be read


def _records(stream: IO[bytes], delimiter: str, limit: int) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """Yield the first line and the fields of each record. After an invalid record, read on at the next line."""
    lines = _RecordLines(stream, limit)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            cause = str(error).partition(" - ")[0]
            yield lines.first_line, Unreadable(f"not CSV: {cause}", 'closed quotes, and "" for a quote inside them')
        except Unreadable as error:
            yield lines.first_line, error
        else:
            if fields is None:
                return
            if fields:
                yield lines.first_line, fields


def _header(fields: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    repeated = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
    if repeated is not None:
        raise Unreadable(f"the header names {found(repeated)} twice", "each column once")
    return names


def _row(header: list[str], fields: list[str], delimiter: str) -> dict[str, Any]:
    if delimiter == NO_DELIMITER:
        fields = [delimiter.join(fields)]
    if len(fields) != len(header):
        columns = f"{len(header)} column" + "s" * (len(header) != 1)
        raise Unreadable(
            f"found {len(fields)} fields for {columns}", f"quotes around a field that contains {found(delimiter)}"
        )
    return dict(zip(header, fields, strict=True))


# ---------------------------------------------------------------- Parquet


def _parquet(stream: IO[bytes], markers: Collection[str], columns: Collection[str], limit: int) -> Iterator[Row]:
    """Let a child process convert the file to JSON lines, so that a malicious file cannot harm this process."""
    number, command = 0, [sys.executable, "-m", "shared.datasets.parquet_child", ",".join(markers), ",".join(columns)]
    descriptor = stream.fileno()
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        # Same process group, so that the child is stopped and killed with this process.
        with linux.spawn(
            command, env=linux.inherited(*linux.BASIC), stdin=descriptor, stderr=subprocess.PIPE, new_session=False
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            try:
                for number, row in _json_lines(child.stdout, limit):
                    yield number, row
                reason = child.stderr.read()
                child.wait()
            finally:
                child.kill()
    finally:
        # The child has moved the file offset, which both processes share, without the stream's buffer noticing.
        os.lseek(descriptor, position, os.SEEK_SET)
    if child.returncode != 0:
        yield number + 1, _child_error(reason, child.returncode)


def _child_error(reason: bytes, code: int) -> Unreadable:
    try:
        return Unreadable(**json.loads(reason), ends_file=True)
    except (ValueError, TypeError):
        message = f"the Parquet reader crashed on this file (exit code {code})"
        return Unreadable(message, "a file written by another library", ends_file=True)


# ---------------------------------------------------------------- file type


def _delimiter(start: bytes, markers: Collection[str]) -> str | None:
    """Return the delimiter of a CSV header, or None if no delimiter gives a field that is a marker."""
    line = start.splitlines()[0].decode(errors="replace")
    for delimiter in DELIMITERS:
        header = next(csv.reader([line], delimiter=delimiter))
        if any(field.strip() in markers for field in header):
            return delimiter if len(header) > 1 else NO_DELIMITER
    return None


def _unsupported(head: bytes) -> str:
    for signature, kind in UNSUPPORTED.items():
        if head.startswith(signature):
            return f"the file is {kind}"
    line = head.removeprefix(BOM).lstrip().splitlines()[0]
    return f"the file begins with {found(line.decode(errors='backslashreplace'))}"
