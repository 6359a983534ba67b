"""This machine's disk: base models by hash within a budget, and the work directories of attempts.

A base is fetched from the bucket once, every file checked against the catalog, and made visible by one rename. Who
uses a base or a work directory holds a lock on it, so that nobody evicts or sweeps it away. Must not know jobs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared import storage
from shared.models import BaseModel
from shared.settings import get_settings, inherited
from shared.telemetry import log

POLL = 0.2


@contextmanager
def base_model(base: BaseModel, *, with_weights: bool, tick: Callable[[], None]) -> Iterator[Path]:
    """The folder of a base, safe from eviction inside the `with`. `tick` is called while it waits, and may raise.

    Without weights it holds only what tokenizing needs: `prepare` workers never pull gigabytes.
    """
    root = get_settings().cache_dir / "models"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / (base.digest if with_weights else f"{base.digest}-tokenizer")
    with _lock_of(folder).open("w") as lock:
        while not _locked(lock.fileno(), fcntl.LOCK_EX if not folder.exists() else fcntl.LOCK_SH):
            tick()  # another slot of this machine is fetching the same base
            time.sleep(POLL)
        if not folder.exists():
            partial = root / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            wanted = [file for file in base.files if with_weights or not file["path"].endswith(".safetensors")]
            size = sum(file["bytes"] for file in wanted)
            _make_room(root, size)
            log.info("base.fetching", base=base.name, bytes=size)
            storage.fetch_folder(base.prefix, wanted, partial, tick=tick)
            partial.replace(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
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
    """Whether this machine's disk can take another job."""
    settings = get_settings()
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.cache_dir).free
    if free < settings.min_free_bytes:
        log.error("disk.full", folder=str(settings.cache_dir), free=free, wanted=settings.min_free_bytes)
    return free >= settings.min_free_bytes


def sweep_work_dirs() -> None:
    """Remove what killed attempts of this machine left: folders that nobody holds."""
    for folder in (get_settings().cache_dir / "work").glob("*/"):
        with _lock_of(folder).open("w") as lock:
            if _locked(lock.fileno(), fcntl.LOCK_EX):
                log.info("work.swept", folder=folder.name)
                _remove(folder)


def visible_device(slot: int) -> str:
    """CUDA_VISIBLE_DEVICES for a slot: the slot-th of the devices that the worker may see, or of all."""
    told = inherited("CUDA_VISIBLE_DEVICES").get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return str(slot)
    devices = told.split(",")
    return devices[slot % len(devices)]


def _make_room(root: Path, wanted: int) -> None:
    """Drop the least recently used bases that nobody holds until the wanted bytes fit the budget."""
    bases = sorted((f for f in root.glob("*/") if f.suffix != ".partial"), key=lambda f: f.stat().st_mtime)
    used = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in bases}
    for folder in bases:
        if sum(used.values()) + wanted <= get_settings().cache_bytes:
            return
        with _lock_of(folder).open("w") as lock:
            if _locked(lock.fileno(), fcntl.LOCK_EX):
                log.info("base.evicted", folder=folder.name, bytes=used.pop(folder))
                shutil.rmtree(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_of(folder).unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
