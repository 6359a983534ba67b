"""Standard streams that outlive a full disk.

A log line that cannot be written is lost; the process that wrote it must not be. Must not import anything of ours: the
trainer uses it too.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO


class Undeterred:
    """A text stream whose writes and flushes never raise OSError (disk full, reader gone)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_standard_streams() -> None:
    """Wrap `sys.stdout` and `sys.stderr` for the rest of this process; a second call changes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Undeterred):
            setattr(sys, name, Undeterred(stream))
