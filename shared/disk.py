"""Folders that are there whole or not at all, whenever the power goes. Must not import anything of ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def publish(partial: Path, folder: Path, *, tick: Callable[[], None] = lambda: None) -> None:
    """Give a finished folder its name: first its files go to the disk, then the name does.

    `tick` is called before each file and may raise to give up.
    """
    for path in [*partial.rglob("*"), partial]:
        tick()
        sync(path)
    partial.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Return once the disk has it; of a folder, its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
