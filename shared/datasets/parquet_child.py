"""Convert a Parquet file on stdin to JSON lines on stdout, one per row. Child process of `shared.datasets.readers`.

Owns: pyarrow, which no other module imports, and the limits for decompressing untrusted files. A page of a few
kilobytes may decompress to gigabytes, whatever sizes the file declares. So the kernel limits the memory of this process
(`MEMORY_LIMIT`), and a crash does not affect the parent. Must not validate rows. If the file cannot be read to its end,
the reason is one JSON object on stderr.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

#: Bytes of address space. pyarrow alone maps a third of it; pages of a usual file have one megabyte.
MEMORY_LIMIT = 1024**3
#: Most decompressed bytes of all rows: the default limit of a JSON lines file (`max_file_bytes`).
DECOMPRESSED_LIMIT = 8 * 1024**3
#: Rows decompressed at once. Few, because a row may have megabytes; more is no faster.
BATCH_ROWS = 32
#: Bytes read ahead per column.
READ_AHEAD = 1024**2


class Refused(Exception):
    """The rest of the file cannot be read: (message, hint)."""


def main(markers: list[str], columns: list[str]) -> int:
    """Write the `columns` of each row without nulls; the file must have at least one column of `markers`.

    Returns the exit code: 0, or 1 with the reason on stderr.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    pa.set_memory_pool(pa.system_memory_pool())  # the other pools map more than they use
    pa.set_io_thread_count(1)
    pa.set_cpu_count(1)
    try:
        for line in lines(sys.stdin.buffer, markers, columns):
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except Refused as refused:
        message, hint = refused.args
    except MemoryError:
        message = f"a page or row of the Parquet file needs more than {MEMORY_LIMIT:,} bytes of memory"
        hint = "smaller rows, and pages of a few megabytes"
    except UnicodeDecodeError:
        message, hint = "the row contains text that is not UTF-8", "strings in UTF-8"
    except (pa.ArrowException, OSError, RecursionError, ValueError) as error:
        message, hint = f"the Parquet file is broken: {str(error).strip()}", "a complete file"
    else:
        return 0
    sys.stderr.write(json.dumps({"message": message, "hint": hint}))
    return 1


def lines(
    stream: BinaryIO, markers: list[str], columns: list[str], *, limit: int = DECOMPRESSED_LIMIT
) -> Iterator[bytes]:
    """Yield one JSON object per row, reading a batch at a time. Raises Refused, and the errors of pyarrow.

    `limit` is in decompressed bytes of all rows.
    """
    file = pq.ParquetFile(stream, buffer_size=READ_AHEAD, pre_buffer=False)
    wanted = [name for name in file.schema_arrow.names if name in columns]
    if not set(wanted) & set(markers):
        found = ", ".join(json.dumps(name, ensure_ascii=False) for name in file.schema_arrow.names[:6])
        raise Refused(f"found columns {found or 'none'}", "one or more of " + ", ".join(markers))
    if (declared := _declared_bytes(file.metadata, wanted)) > limit:
        raise Refused(f"the rows decompress to {declared:,} bytes", f"at most {limit:,} bytes; split the file")
    written = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
        for row in _rows(batch):
            line = json.dumps(_without_nulls(row), ensure_ascii=False, default=_plain).encode(errors="surrogatepass")
            written += len(line)
            if written > limit:
                raise Refused(f"the rows decompress to more than {limit:,} bytes", "at most that; split the file")
            yield line + b"\n"


def _declared_bytes(metadata: pq.FileMetaData, wanted: list[str]) -> int:
    """Return the decompressed size of the wanted columns, as the file's metadata declares it."""
    total = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in wanted:
                total += column.total_uncompressed_size
    return total


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Convert all rows at once. If one is not UTF-8, convert them one by one, so that the rows before it are kept."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        for i in range(len(batch)):
            yield from batch.slice(i, 1).to_pylist(maps_as_pydicts="lossy")


def _without_nulls(value: Any) -> Any:
    """Drop null fields. A Parquet struct has the fields of all rows; those that a row did not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _plain(value: object) -> str:
    """Convert a value that JSON lacks to a string. Some writers store strings as bytes.

    A byte that is not UTF-8 becomes an unpaired surrogate, which the parent reports.
    """
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    sys.exit(main(*(names.split(",") for names in sys.argv[1:])))
