"""A Parquet file on stdin → JSON lines on stdout, one a row: the child process of `shared.datasets.readers`.

Owns: pyarrow, which nothing else imports, and the limits under which a stranger's bytes are unpacked. A page of a few
kilobytes may unpack to gigabytes whatever the file's own figures say, so the kernel holds this process to `MEMORY`;
where it ends, or breaks, it ends alone. Must not judge rows. What ends a file early is one JSON object on stderr.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

#: Address space; pyarrow itself maps a third of it. Pages of an ordinary file have a megabyte.
MEMORY = 1024**3
#: What all rows may unpack to: as much as a file of JSON lines may hold by default (`max_file_bytes`).
UNPACKED = 8 * 1024**3
#: Rows unpacked at once: few, because each may have megabytes. More is no faster.
BATCH_ROWS = 32
#: Bytes read ahead of a column.
AHEAD = 1024**2


class Refused(Exception):
    """The rest of the file cannot be had: (message, hint)."""


def main(markers: list[str], columns: list[str]) -> int:
    """Write the rows' `columns`, nulls left out, of a file that has one of `markers`. 0, or 1 with a word on stderr."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pa.set_memory_pool(pa.system_memory_pool())  # the others map more than they use
    pa.set_io_thread_count(1)
    pa.set_cpu_count(1)
    try:
        for line in lines(sys.stdin.buffer, markers, columns):
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except Refused as refused:
        message, hint = refused.args
    except MemoryError:
        message = f"a page or a row of it unpacks to more than {MEMORY:,} bytes allow"
        hint = "pages of a few megabytes and smaller rows"
    except UnicodeDecodeError:
        message, hint = "the row holds text that is not UTF-8", "strings in UTF-8"
    except (pa.ArrowException, OSError, RecursionError, ValueError) as error:
        message, hint = f"the Parquet file is broken: {str(error).strip()}", "the whole file, as its writer closed it"
    else:
        return 0
    sys.stderr.write(json.dumps({"message": message, "hint": hint}))
    return 1


def lines(stream: BinaryIO, markers: list[str], columns: list[str], *, unpacked: int = UNPACKED) -> Iterator[bytes]:
    """One JSON object a row, each at most a batch after the file gave it. Raises Refused and what pyarrow raises."""
    file = pq.ParquetFile(stream, buffer_size=AHEAD, pre_buffer=False)
    wanted = [name for name in file.schema_arrow.names if name in columns]
    if not set(wanted) & set(markers):
        found = ", ".join(json.dumps(name, ensure_ascii=False) for name in file.schema_arrow.names[:6])
        raise Refused(f"found columns {found or 'none'}", "one or more of " + ", ".join(markers))
    if (claimed := _claimed(file.metadata, wanted)) > unpacked:
        raise Refused(f"its rows unpack to {claimed:,} bytes", f"at most {unpacked:,} bytes; several files")
    written = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
        for row in _rows(batch):
            line = json.dumps(_without_nulls(row), ensure_ascii=False, default=_plain).encode(errors="surrogatepass")
            written += len(line)
            if written > unpacked:
                raise Refused(f"its rows unpack to more than {unpacked:,} bytes", "several files")
            yield line + b"\n"


def _claimed(metadata: pq.FileMetaData, wanted: list[str]) -> int:
    """What the wanted columns unpack to, by the file's own account."""
    total = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in wanted:
                total += column.total_uncompressed_size
    return total


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """All at once where that goes; else one by one, so that those before a broken one are had."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        for i in range(len(batch)):
            yield from batch.slice(i, 1).to_pylist(maps_as_pydicts="lossy")


def _without_nulls(value: Any) -> Any:
    """A struct has every field that any row has; those of other rows are null in this one, and mean nothing."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _plain(value: object) -> str:
    """Some writers mark strings as bytes. A byte that is not UTF-8 becomes half a surrogate, which the reader names."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    sys.exit(main(*(names.split(",") for names in sys.argv[1:])))
