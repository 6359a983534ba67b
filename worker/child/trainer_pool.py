"""Keep idle trainers for the next job, which then finds the imports done and the last base model loaded.

Owns: which trainers this slot keeps, and for how long: one for work and one for proofs, because a proof needs a process
that has trained nothing. Only a trainer that completed its command is kept. Must not know jobs or leases.
"""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from enum import StrEnum
from threading import Lock, Timer
from typing import NamedTuple

from shared.settings import get_settings
from shared.telemetry import log
from worker import cache
from worker.child.trainer_process import TrainerProcess


class Purpose(StrEnum):
    """What a trainer is used for."""

    WORK = "work"
    PROOF = "proof"
    EXPORT = "export"


class _Kept(NamedTuple):
    trainer: TrainerProcess
    timer: Timer


_lock = Lock()
_kept: dict[Purpose, _Kept] = {}
_folders: dict[int, ExitStack] = {}


def take(purpose: Purpose, *, visible_device: str) -> TrainerProcess:
    """Return the trainer kept for this purpose, or start one. Pass it to `keep` or `close` afterwards."""
    if (trainer := _take(purpose)) is not None:
        if trainer.is_running() and trainer.visible_device == visible_device:
            if trainer.is_stopped():
                trainer.thaw()  # it froze after its last event, before it was idle
            trainer.begin()
            log.info("trainer.warm", pid=trainer.pid, purpose=purpose)
            return trainer
        close(trainer)
    with ExitStack() as stack:
        folder = stack.enter_context(cache.work_dir(f"{purpose}-{os.getpid()}-{secrets.token_hex(4)}"))
        trainer = TrainerProcess(folder, visible_device=visible_device)
        _folders[trainer.pid] = stack.pop_all()
    log.info("trainer.started", pid=trainer.pid, purpose=purpose)
    return trainer


def keep(purpose: Purpose, trainer: TrainerProcess) -> None:
    """Keep an idle trainer for `warm_seconds` or until it is taken, instead of the one kept so far.

    A trainer that made an export is closed.
    """
    seconds = get_settings().warm_seconds
    if seconds <= 0 or purpose is Purpose.EXPORT or not trainer.is_running():
        close(trainer)
        return
    dismiss(purpose)
    timer = Timer(seconds, dismiss, [purpose])
    timer.daemon = True
    with _lock:
        _kept[purpose] = _Kept(trainer, timer)
    timer.start()


def dismiss(purpose: Purpose) -> None:
    """Close the trainer kept for this purpose, if there is one."""
    if (trainer := _take(purpose)) is not None:
        close(trainer)


def make_room() -> None:
    """Close all kept trainers: an export loads a whole base unquantized and needs their memory."""
    for purpose in Purpose:
        dismiss(purpose)


def close(trainer: TrainerProcess) -> None:
    """End a trainer that was taken, and remove its folder."""
    trainer.close()
    _folders.pop(trainer.pid).close()


def _take(purpose: Purpose) -> TrainerProcess | None:
    with _lock:
        kept = _kept.pop(purpose, None)
    if kept is None:
        return None
    kept.timer.cancel()
    return kept.trainer
