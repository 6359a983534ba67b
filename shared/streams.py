"""Standard streams that outlive a full disk: a log line that cannot be written is lost, and the process goes on.

Must not import anything of ours: the trainer uses it too.
"""

from __future__ import annotations

import io
import sys
from typing import Any


class Log(io.FileIO):
    """A file whose writes do not fail (disk full, reader gone)."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def protect_standard_streams() -> None:
    """Put such files under `sys.stdout` and `sys.stderr`."""
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(Log(descriptor, "wb", closefd=False)), errors="backslashreplace", line_buffering=True
        )
        for descriptor in (1, 2)
    )
