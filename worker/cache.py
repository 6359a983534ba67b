"""This machine's disk: base models by hash within a budget, and the work directories of attempts.

A base is fetched from the bucket once, every file checked against the catalog, and made visible by one rename when all
of it is on the disk; eviction begins with the rename back. So what bears a base's name is whole, whatever was killed.
Who uses a base or a work directory holds a lock on it, so that nobody evicts or sweeps it away. Must not know jobs.
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
    """A base on this disk."""

    used_at: float
    folder: Path
    bytes: int


@contextmanager
def base_model(base: BaseModelRow, *, with_weights: bool, tick: Callable[[], None]) -> Iterator[Path]:
    """The folder of a base, safe from eviction inside the `with`. `tick` is called while it waits, and may raise.

    Without weights it holds only what tokenizing needs: `prepare` workers never pull gigabytes. Raises OSError
    (ENOSPC) if the disk has no room for it.
    """
    folder = _models() / (base.digest if with_weights else f"{base.digest}-tokenizer")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder).open("w") as lock:
        while True:
            there = folder.exists()
            if not _locked(lock.fileno(), fcntl.LOCK_SH if there else fcntl.LOCK_EX):
                tick()  # another slot of this machine fetches or evicts the same base
                time.sleep(POLL)
            elif there != folder.exists():
                continue  # fetched or evicted between the look and the lock
            elif there:
                break
            else:
                _fetch(base, folder, with_weights=with_weights, tick=tick)  # and round again, for the shared lock
        os.utime(folder)
        yield folder


@contextmanager
def work_dir(name: str) -> Iterator[Path]:
    """An empty folder for one attempt, gone with the `with` block."""
    folder = get_settings().cache_dir / "work" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir()  # after the lock: a folder that nobody holds is swept
        try:
            yield folder
        finally:
            _remove(folder)


def has_room() -> bool:
    """Whether this machine's disk can take another job, if need be without the bases that no job uses."""
    settings = get_settings()
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    wanted = settings.min_free_bytes
    if _free() < wanted:
        _make_room(0)
    if (free := _free()) < wanted:
        log.error("disk.full", folder=str(settings.cache_dir), free=free, wanted=wanted)
    return free >= wanted


def sweep() -> None:
    """Remove what was killed in the middle on this machine: work directories and parts of bases that nobody holds."""
    for folder in (get_settings().cache_dir / "work").glob("*/"):
        with _alone(folder) as alone:
            if alone:
                log.info("work.swept", folder=folder.name)
                _remove(folder)
    for partial in _models().glob(f"*{PARTIAL}/"):
        with _alone(partial.with_suffix("")) as alone:
            if alone:
                log.info("base.swept", folder=partial.name)
                shutil.rmtree(partial, ignore_errors=True)


def visible_device(slot: int) -> str:
    """CUDA_VISIBLE_DEVICES for a slot: the slot-th of the devices that the worker may see, or of all."""
    told = linux.inherited("CUDA_VISIBLE_DEVICES").get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return str(slot)
    devices = told.split(",")
    return devices[slot % len(devices)]


def _fetch(base: BaseModelRow, folder: Path, *, with_weights: bool, tick: Callable[[], None]) -> None:
    """Bring a base that we hold alone to the disk, then to its name; an error leaves nothing."""
    partial = _partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    wanted = [file for file in base.files if with_weights or not file["path"].endswith(".safetensors")]
    size = sum(file["bytes"] for file in wanted)
    _make_room(size)
    if (free := _free()) < size:
        raise OSError(errno.ENOSPC, f"{base.name} needs {size} bytes and {free} are free; nothing more can be evicted")
    log.info("base.fetching", base=base.name, bytes=size)
    with disk.atomic_folder(folder, partial=partial, tick=tick):
        storage.fetch_folder(base.prefix, wanted, partial, tick=tick)


def _make_room(wanted: int) -> None:
    """Drop what nobody holds, the least recently used base first, until budget and disk have room for `wanted` bytes.

    On the disk `min_free_bytes` stay free besides. Other slots may be at it too: what has gone already is fine.
    """
    settings = get_settings()
    sweep()
    bases = _bases()
    used = sum(base.bytes for base in bases)
    for base in bases:
        if used + wanted <= settings.cache_bytes and _free() >= wanted + settings.min_free_bytes:
            return
        with _alone(base.folder) as alone:
            if alone:
                used -= base.bytes
                if base.folder.exists():
                    log.info("base.evicted", folder=base.folder.name, bytes=base.bytes)
                    _evict(base.folder)


def _bases() -> list[Cached]:
    """Those of this disk, the least recently used first."""
    bases = []
    for folder in _models().glob("*/"):
        if folder.suffix != PARTIAL:
            with suppress(FileNotFoundError):  # another slot evicts it
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                bases.append(Cached(folder.stat().st_mtime, folder, size))
    return sorted(bases)


def _evict(folder: Path) -> None:
    """Take the name away first, on the disk too: a kill in the middle must not leave half a base that looks whole."""
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
def _alone(folder: Path) -> Iterator[bool]:
    """Whether nobody else holds the folder; nobody then will inside the `with`."""
    with _lock_of(folder).open("w") as lock:
        yield _locked(lock.fileno(), fcntl.LOCK_EX)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
