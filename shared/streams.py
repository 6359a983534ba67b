"""Standard streams that never raise: if a log line cannot be written, it is lost and the process continues.

Must not import other modules of this repository: the trainer uses this module too.
"""

from __future__ import annotations

import io
import sys
from typing import Any


class Log(io.FileIO):
    """A file whose writes never raise, even if the disk is full or the pipe has no reader."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def protect_standard_streams() -> None:
    """Make writes to `sys.stdout` and `sys.stderr` never raise."""
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(Log(descriptor, "wb", closefd=False)), errors="backslashreplace", line_buffering=True
        )
        for descriptor in (1, 2)
    )
