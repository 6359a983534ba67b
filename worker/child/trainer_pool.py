"""Trainers that outlive their work: the next job finds the imports done, and the base of the last one resident.

Owns: which children this slot keeps, and for how long. One that works and one that proves, because a proof is for a
process that has trained nothing. Only a child that did what it was asked to is kept. Must not know jobs or leases.
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
    """What a child is for."""

    WORK = "work"
    PROOF = "proof"
    EXPORT = "export"


class _Kept(NamedTuple):
    session: TrainerProcess
    timer: Timer


_lock = Lock()
_kept: dict[Purpose, _Kept] = {}
_folders: dict[int, ExitStack] = {}


def take(purpose: Purpose, *, visible_device: str) -> TrainerProcess:
    """The child that was kept for this, or a new one; to be handed to `keep` or `close`."""
    if (session := _take(purpose)) is not None:
        if session.is_running() and session.visible_device == visible_device:
            if session.is_stopped():
                session.thaw()  # it froze between its last word and being idle
            session.begin()
            log.info("trainer.warm", pid=session.pid, purpose=purpose)
            return session
        close(session)
    with ExitStack() as stack:
        folder = stack.enter_context(cache.work_dir(f"{purpose}-{os.getpid()}-{secrets.token_hex(4)}"))
        session = TrainerProcess(folder, visible_device=visible_device)
        _folders[session.pid] = stack.pop_all()
    log.info("trainer.started", pid=session.pid, purpose=purpose)
    return session


def keep(purpose: Purpose, session: TrainerProcess) -> None:
    """For `warm_seconds`, or until it is taken; a second one for the same purpose is closed, and one that exports."""
    seconds = get_settings().warm_seconds
    if seconds <= 0 or purpose is Purpose.EXPORT or not session.is_running():
        close(session)
        return
    dismiss(purpose)
    timer = Timer(seconds, dismiss, [purpose])
    timer.daemon = True
    with _lock:
        _kept[purpose] = _Kept(session, timer)
    timer.start()


def dismiss(purpose: Purpose) -> None:
    """Close the one that is kept for this, if one is."""
    if (session := _take(purpose)) is not None:
        close(session)


def make_room() -> None:
    """Close all that are kept: an export holds a whole base unquantized, and wants their memory."""
    for purpose in Purpose:
        dismiss(purpose)


def close(session: TrainerProcess) -> None:
    """End a child that was taken, and remove its folder."""
    session.close()
    _folders.pop(session.pid).close()


def _take(purpose: Purpose) -> TrainerProcess | None:
    with _lock:
        kept = _kept.pop(purpose, None)
    if kept is None:
        return None
    kept.timer.cancel()
    return kept.session
