"""The cache on this machine's disk: base models by hash, within a budget, and the work directories of attempts.

A base is downloaded from the bucket once. Every file is checked against the catalog, and one rename makes the base
visible when all of it is on the disk; eviction starts with a rename back. A folder with a base's name is therefore
always complete, even after a kill. Users of a base or a work directory lock it, which protects it from eviction and
from the sweep. Must not know jobs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from shared import disk, linux, storage
from shared.database.tables import BaseModelRow
from shared.settings import get_settings
from shared.telemetry import log

POLL = 0.2
PARTIAL = ".partial"


class Cached(NamedTuple):
    """A base on this disk. `used_at` is its modification time in Unix seconds."""

    used_at: float
    folder: Path
    bytes: int


@contextmanager
def base_model(base: BaseModelRow, *, with_weights: bool, tick: Callable[[], None]) -> Iterator[Path]:
    """Yield the folder of a base, protected from eviction inside the `with`.

    `tick` is called during waits and downloads, and may raise. Without weights the folder has only what tokenizing
    needs: `prepare` workers never download gigabytes. Raises OSError (ENOSPC) if the disk has no space for the base.
    """
    folder = _models() / (base.digest if with_weights else f"{base.digest}-tokenizer")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder).open("w") as lock:
        while True:
            exists = folder.exists()
            if not _try_lock(lock.fileno(), fcntl.LOCK_SH if exists else fcntl.LOCK_EX):
                tick()  # another slot of this machine is fetching or evicting the same base
                time.sleep(POLL)
            elif exists != folder.exists():
                continue  # fetched or evicted between the check and the lock
            elif exists:
                break
            else:
                _fetch(base, folder, with_weights=with_weights, tick=tick)  # then loop, for the shared lock
        os.utime(folder)
        yield folder


@contextmanager
def work_dir(name: str) -> Iterator[Path]:
    """Yield an empty folder for one attempt, and remove it after the `with` block."""
    folder = get_settings().cache_dir / "work" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir()  # after the lock: the sweep removes unlocked folders
        try:
            yield folder
        finally:
            _remove(folder)


def has_room() -> bool:
    """Return whether the disk has space for another job, after evicting unused bases if necessary."""
    settings = get_settings()
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    wanted = settings.min_free_bytes
    if _free() < wanted:
        _make_room(0)
    if (free := _free()) < wanted:
        log.error("disk.full", folder=str(settings.cache_dir), free=free, wanted=wanted)
    return free >= wanted


def sweep() -> None:
    """Remove what killed processes left on this machine: unlocked work directories and partial bases."""
    for folder in (get_settings().cache_dir / "work").glob("*/"):
        with _exclusive(folder) as locked:
            if locked:
                log.info("work_dir.removed", folder=folder.name)
                _remove(folder)
    for partial in _models().glob(f"*{PARTIAL}/"):
        with _exclusive(partial.with_suffix("")) as locked:
            if locked:
                log.info("base.partial_removed", folder=partial.name)
                shutil.rmtree(partial, ignore_errors=True)


def visible_device(slot: int) -> str:
    """Return CUDA_VISIBLE_DEVICES for a slot: the slot-th device that the worker may see, or of all devices."""
    visible = linux.inherited("CUDA_VISIBLE_DEVICES").get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(slot)
    devices = visible.split(",")
    return devices[slot % len(devices)]


def _fetch(base: BaseModelRow, folder: Path, *, with_weights: bool, tick: Callable[[], None]) -> None:
    """Download a base whose lock we hold exclusively, then give it its name. An error leaves no files."""
    partial = _partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    wanted = [file for file in base.files if with_weights or not file["path"].endswith(".safetensors")]
    size = sum(file["bytes"] for file in wanted)
    _make_room(size)
    if (free := _free()) < size:
        raise OSError(errno.ENOSPC, f"{base.name} needs {size} bytes and {free} are free; no more bases can be evicted")
    log.info("base.fetching", base=base.name, bytes=size)
    with disk.atomic_folder(folder, partial=partial, tick=tick):
        storage.fetch_folder(base.prefix, wanted, partial, tick=tick)


def _make_room(wanted: int) -> None:
    """Evict unused bases, least recently used first, until budget and disk have space for `wanted` bytes.

    On the disk, `min_free_bytes` stay free in addition. Other slots may evict at the same time: a base that is already
    gone is fine.
    """
    settings = get_settings()
    sweep()
    bases = _bases()
    used = sum(base.bytes for base in bases)
    for base in bases:
        if used + wanted <= settings.cache_bytes and _free() >= wanted + settings.min_free_bytes:
            return
        with _exclusive(base.folder) as locked:
            if locked:
                used -= base.bytes
                if base.folder.exists():
                    log.info("base.evicted", folder=base.folder.name, bytes=base.bytes)
                    _evict(base.folder)


def _bases() -> list[Cached]:
    """Return the complete bases on this disk, least recently used first."""
    bases = []
    for folder in _models().glob("*/"):
        if folder.suffix != PARTIAL:
            with suppress(FileNotFoundError):  # another slot evicts it
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                bases.append(Cached(folder.stat().st_mtime, folder, size))
    return sorted(bases)


def _evict(folder: Path) -> None:
    """Rename, sync, then delete: a kill in between must not leave half a base that looks complete."""
    partial = _partial_of(folder)
    folder.rename(partial)
    disk.sync(folder.parent)
    shutil.rmtree(partial)


def _free() -> int:
    return shutil.disk_usage(get_settings().cache_dir).free


def _models() -> Path:
    return get_settings().cache_dir / "models"


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_of(folder).unlink(missing_ok=True)


def _partial_of(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


@contextmanager
def _exclusive(folder: Path) -> Iterator[bool]:
    """Try to lock the folder exclusively for the `with` block; yield whether that succeeded."""
    with _lock_of(folder).open("w") as lock:
        yield _try_lock(lock.fileno(), fcntl.LOCK_EX)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
