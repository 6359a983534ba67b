"""Write folders atomically: after a crash or power loss a folder is complete or does not exist.

Must not import other modules of this repository.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(
    folder: Path, *, partial: Path | None = None, tick: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` when the block ends.

    If the block raises, the temporary folder is deleted. If the process crashes, `folder` does not exist. All files are
    flushed to disk (fsync) before the rename. An older `folder` is removed just before the rename; a crash between the
    two leaves neither.

    The temporary folder is a new `.partial-…` in the same parent, or `partial` for a caller that wants to find it after
    a crash. `partial` is emptied first, so only one process may use it at a time. A `.partial-…` has mode 0700, and so
    has `folder` unless the block changes it.

    `tick` is called before each file is flushed, and may raise to stop. Raises OSError if the disk is full or
    read-only, or if `folder` is a file.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if partial is None:
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            tick()
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to the disk (fsync(2)). Raises OSError if that fails.

    A file's name is stored in its folder, so for a new file both must be flushed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
