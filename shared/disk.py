"""Folders that are there whole or not at all, whenever the power goes. Must not import anything of ours."""

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
    """A place to write what becomes `folder` when the block ends; an error leaves nothing, a crash leaves no `folder`.

    Files go to the disk before the name does. An older `folder` is removed first; a crash in between leaves none.
    The place is a new neighbour, `.partial-…`, or `partial`, for a caller that wants to find it after a crash: that is
    emptied first, so whoever names it must be alone with it. Only the owner can enter a `.partial-…`, and so `folder`,
    unless the block changes its mode.

    `tick` is called before each file is written out and may raise to give up. Raises OSError as the disk does: full,
    read-only, or a `folder` that is a file.
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
    """Return once the disk has a file's bytes, or a folder's names (fsync(2)). Raises OSError if it cannot take them.

    A file's name is its folder's: a new file needs both.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
