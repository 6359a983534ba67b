"""A dataset file → its rows as JSON objects, each with its line: JSON lines, CSV or Parquet, told by content.

Owns: file types, encodings, and how much of a file is held at once: never more than a row. Must not know what a row
means (`shared.datasets.formats` does), nor a file's name: the trainer has none, and a name may lie.
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
ONE_OBJECT = "one JSON object a line, such as " + SAMPLE
BOM = b"\xef\xbb\xbf"
HEAD = 64 * 1024
DELIMITERS = ",;\t"
#: For a lone column: whatever would part fields elsewhere is text there, quoted or not, and so is this.
PARTS_NOTHING = "\x1f"
#: What else people send → what it begins with.
FOREIGN = {
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

# The csv module has one limit a process, 128 KiB a field; ours is a row's bytes, counted as they are read.
csv.field_size_limit(2**31 - 1)


class Unreadable(Exception):
    """A row, or where `ends_file` the rest of a file, that is no JSON object: (message, hint)."""

    def __init__(self, message: str, hint: str, *, ends_file: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.ends_file = ends_file


Row = tuple[int, dict[str, Any] | Unreadable]


def raw_rows(
    stream: IO[bytes], *, markers: Collection[str], columns: Collection[str], max_row_bytes: int
) -> Generator[Row]:
    """Yield (1-based line, object or Unreadable) in constant memory; blank lines are passed over.

    `markers` are the keys of which every table has one, in a CSV header or as a Parquet column; `columns` those that
    are read from Parquet. A CSV row has the line that it begins at, a Parquet row its number. Parquet needs a stream
    with a `fileno`.
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
        yield 1, Unreadable(_foreign(head), f"JSON lines, such as {SAMPLE}; CSV with a header; or Parquet")


def found(value: Any) -> str:
    """A value as it is shown in a message: JSON, so that control characters are escaped."""
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
    """(line number, bytes), or None for a line over `limit`, of which no more than `limit` bytes are ever held."""
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
        raise Unreadable(f"not JSON that we can hold: {error}", "numbers of at most 4,300 digits") from None
    except RecursionError:
        raise Unreadable("the JSON is nested too deeply", ONE_OBJECT) from None
    if not isinstance(row, dict):
        raise Unreadable(f"found {found(row)}", ONE_OBJECT)
    if b"\\ud" in raw.lower() and not _is_unicode(row):
        raise Unreadable("found half of a surrogate pair (\\ud8xx alone)", "whole characters")
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
    """The lines that `csv.reader` takes for one record: numbered, decoded, and capped in sum."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self.began = 0
        self._lines, self._limit, self._held = _lines(stream, limit), limit, 0

    def begin(self) -> None:
        """The next line is the first of a record."""
        self._held = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, raw = next(self._lines)
        if not self._held:
            self.began = number
        if raw is None:
            raise _too_long(self._limit)
        self._held += len(raw)
        if self._held > self._limit:
            raise Unreadable(f"a row of more than {self._limit:,} bytes begins here", "close every quote that opens")
        if b"\0" in raw:
            raise Unreadable(f"byte {raw.index(0) + 1} of the line is NUL", "save the file as text in UTF-8")
        return _text(raw)


def _csv(stream: IO[bytes], delimiter: str, limit: int) -> Iterator[Row]:
    """RFC 4180, with the delimiter and the line ends that spreadsheets write."""
    header: list[str] | None = None
    for line, fields in _records(stream, delimiter, limit):
        try:
            if isinstance(fields, Unreadable):
                raise fields
            if header is not None:
                yield line, _under(header, fields, delimiter)
            else:
                header = _header(fields)
        except Unreadable as error:
            yield line, error
            if header is None:
                return  # without a header nothing below it has a meaning


def _records(stream: IO[bytes], delimiter: str, limit: int) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """The line at which each record begins, and its fields. After a broken record comes the next line."""
    lines = _RecordLines(stream, limit)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            said = str(error).partition(" - ")[0]
            yield lines.began, Unreadable(f"not CSV: {said}", 'quotes that close, and "" for a quote inside them')
        except Unreadable as error:
            yield lines.began, error
        else:
            if fields is None:
                return
            if fields:
                yield lines.began, fields


def _header(fields: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    twice = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
    if twice is not None:
        raise Unreadable(f"the header names {found(twice)} twice", "each column once")
    return names


def _under(header: list[str], fields: list[str], delimiter: str) -> dict[str, Any]:
    if delimiter == PARTS_NOTHING:
        fields = [delimiter.join(fields)]
    if len(fields) != len(header):
        columns = f"{len(header)} column" + "s" * (len(header) != 1)
        raise Unreadable(
            f"found {len(fields)} fields for {columns}", f"quotes around a field that holds {found(delimiter)}"
        )
    return dict(zip(header, fields, strict=True))


# ---------------------------------------------------------------- Parquet


def _parquet(stream: IO[bytes], markers: Collection[str], columns: Collection[str], limit: int) -> Iterator[Row]:
    """A child unpacks the file into JSON lines: what a stranger's file does to it, it does not do to us."""
    number, command = 0, [sys.executable, "-m", "shared.datasets.parquet_child", ",".join(markers), ",".join(columns)]
    descriptor = stream.fileno()
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        # In our process group, to be frozen and killed with us.
        with linux.spawn(
            command, env=linux.inherited(*linux.BASIC), stdin=descriptor, stderr=subprocess.PIPE, new_session=False
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            try:
                for number, row in _json_lines(child.stdout, limit):
                    yield number, row
                said = child.stderr.read()
                child.wait()
            finally:
                child.kill()
    finally:
        # The child has moved the offset that we share, and the stream's buffer believes to know it.
        os.lseek(descriptor, position, os.SEEK_SET)
    if child.returncode != 0:
        yield number + 1, _last_words(said, child.returncode)


def _last_words(said: bytes, code: int) -> Unreadable:
    try:
        return Unreadable(**json.loads(said), ends_file=True)
    except (ValueError, TypeError):
        message = f"the Parquet file ended its reader (exit code {code})"
        return Unreadable(message, "a file written by another library", ends_file=True)


# ---------------------------------------------------------------- which of them


def _delimiter(start: bytes, markers: Collection[str]) -> str | None:
    """What parts the first line's fields, if one of these is a marker."""
    line = start.splitlines()[0].decode(errors="replace")
    for delimiter in DELIMITERS:
        header = next(csv.reader([line], delimiter=delimiter))
        if any(field.strip() in markers for field in header):
            return delimiter if len(header) > 1 else PARTS_NOTHING
    return None


def _foreign(head: bytes) -> str:
    for signature, kind in FOREIGN.items():
        if head.startswith(signature):
            return f"the file is {kind}"
    line = head.removeprefix(BOM).lstrip().splitlines()[0]
    return f"the file begins with {found(line.decode(errors='backslashreplace'))}"
