"""What this worker trains on, told to everybody when a slot starts: a job that is too large is then refused at once.

Owns: asking. It takes a process of its own, because torch and CUDA must not be where slots are forked from.
"""

from __future__ import annotations

import subprocess
import sys
from threading import Thread

from pydantic import ValidationError

from shared import linux
from shared.database import devices
from shared.database.session import session_scope
from shared.errors import Unavailable
from shared.schemas.memory import Device
from shared.settings import get_settings
from shared.telemetry import log
from worker import cache
from worker.child.trainer_process import PASSED_ON

ASKED_FOR = 120.0


def announce(slot: int) -> Thread:
    """In a thread: Celery gives a slot four seconds to be up, and torch takes longer than that to find a GPU."""
    thread = Thread(target=_announce, args=(slot,), name="device", daemon=True)
    thread.start()
    return thread


def _announce(slot: int) -> None:
    try:
        device = detect_device(slot)
        with session_scope() as session:
            devices.report(session, device)
        log.info("device.announced", **device.model_dump())
    except (subprocess.SubprocessError, ValidationError, Unavailable) as error:
        # The first job that is trained here says the same.
        log.warning("device.unknown", error=str(error))


def detect_device(slot: int) -> Device:
    """The device that a trainer of this slot would find."""
    limit = get_settings().device_memory_bytes
    said = linux.run(
        [sys.executable, "-m", "worker.trainer.system.device", str(limit)],
        env=linux.inherited(*PASSED_ON) | {"CUDA_VISIBLE_DEVICES": cache.visible_device(slot)},
        timeout=ASKED_FOR,
    )
    said.check_returncode()
    return Device.model_validate_json(said.stdout)
