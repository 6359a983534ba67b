"""jemalloc for trainer processes, where it is installed.

On a CPU, activations come and go in blocks of many sizes, and glibc's heap keeps the gaps between them. jemalloc gives
them back. `make bench` shows the difference; `milliner doctor` says whether it was found.
"""

from __future__ import annotations

from pathlib import Path

#: Where Debian, Fedora and a build from source put it.
PLACES = (
    "usr/lib/*/libjemalloc.so.2",
    "usr/lib64/libjemalloc.so.2",
    "usr/lib/libjemalloc.so.2",
    "usr/local/lib/libjemalloc.so.2",
)


def jemalloc(root: Path = Path("/")) -> Path | None:
    """The shared library, or None if it is not installed."""
    return next((path for place in PLACES for path in sorted(root.glob(place))), None)


def preload(root: Path = Path("/")) -> dict[str, str]:
    """The environment variable that makes a child use jemalloc (ld.so(8)); empty if it is not installed."""
    found = jemalloc(root)
    return {} if found is None else {"LD_PRELOAD": str(found)}
