"""Report the device of a slot when it starts, so that the API can refuse a job that is too large for every device.

Owns: detecting the device, in a separate process: torch and CUDA must not be loaded in the process that forks slots.
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

DETECT_SECONDS = 120.0


def start(slot: int) -> Thread:
    """Detect and report in a thread: Celery gives a slot 4 s to start, and torch takes longer to find a GPU."""
    thread = Thread(target=_report, args=(slot,), name="device", daemon=True)
    thread.start()
    return thread


def _report(slot: int) -> None:
    try:
        device = detect_device(slot)
        with session_scope() as session:
            devices.report(session, device)
        log.info("device.reported", **device.model_dump())
    except (subprocess.SubprocessError, ValidationError, Unavailable) as error:
        # Not fatal: the report of the first job trained here names the device too.
        log.warning("device.report_failed", error=str(error))


def detect_device(slot: int) -> Device:
    """Return the device that a trainer of this slot would use."""
    limit = get_settings().device_memory_bytes
    done = linux.run(
        [sys.executable, "-m", "worker.trainer.system.device", str(limit)],
        env=linux.inherited(*PASSED_ON) | {"CUDA_VISIBLE_DEVICES": cache.visible_device(slot)},
        timeout=DETECT_SECONDS,
    )
    done.check_returncode()
    return Device.model_validate_json(done.stdout)
