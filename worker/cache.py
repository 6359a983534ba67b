"""Base models on this machine, by hash, within a disk budget.

A base is fetched from the bucket once, every file checked against the catalog, and made visible by one rename. Attempts
only read it. Must not know jobs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from shared import storage
from shared.models import BaseModel
from shared.settings import get_settings, inherited
from shared.telemetry import log


def base_model(base: BaseModel, *, with_weights: bool) -> Path:
    """The folder of a base. Without weights, only what tokenizing needs; `prepare` workers never pull gigabytes."""
    root = get_settings().cache_dir / "models"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / (base.digest if with_weights else f"{base.digest}-tokenizer")
    with (root / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another slot of this machine may be fetching the same base
        if not folder.exists():
            partial = root / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            wanted = [file for file in base.files if with_weights or not file["path"].endswith(".safetensors")]
            _make_room(root, sum(file["bytes"] for file in wanted))
            log.info("base.fetching", base=base.name, bytes=sum(file["bytes"] for file in wanted))
            storage.fetch_folder(base.prefix, wanted, partial)
            partial.replace(folder)
        os.utime(folder)
    return folder


def visible_device(slot: int) -> str | None:
    """CUDA_VISIBLE_DEVICES for a slot: the slot-th device that the worker may see; None where it was not told any."""
    devices = inherited("CUDA_VISIBLE_DEVICES").get("CUDA_VISIBLE_DEVICES")
    if not devices:
        return devices
    names = devices.split(",")
    return names[slot % len(names)]


def _make_room(root: Path, wanted: int) -> None:
    """Drop the least recently used bases until the wanted bytes fit the budget."""
    bases = sorted(
        (f for f in root.iterdir() if f.is_dir() and f.suffix != ".partial"), key=lambda f: f.stat().st_mtime
    )
    used = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in bases}
    budget = get_settings().cache_bytes
    for folder in bases:
        if sum(used.values()) + wanted <= budget:
            return
        log.info("base.evicted", folder=folder.name, bytes=used.pop(folder))
        shutil.rmtree(folder)
