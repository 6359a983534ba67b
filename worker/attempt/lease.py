"""The lease of a running attempt: one thread renews it, another enforces it on this process.

The renewing thread writes to Postgres every heartbeat and reads what the user wants. The fencing thread never waits for
a server: `fence_seconds` after the last renewal it freezes the trainer, and the next renewal thaws it. An outage of the
database thus pauses training and does not restart it. A changed epoch kills the trainer.

Times are read from a clock that also counts while the machine sleeps; a renewal counts from before it was sent. While
the lease is valid, the trainer gets a message twice a second. Without messages (this process may have been stopped) the
trainer freezes itself before the lease ends.

A worker that renews its lease without progress is as bad as a dead one. After `stuck_seconds` its attempt ends itself;
after twice that time the process is killed.

Owns: the lease's threads and what they do to the trainer. Must not know what the attempt does.
"""

from __future__ import annotations

import os
import signal
import time
from threading import Event, Thread
from types import TracebackType
from typing import Self

from shared.database import attempts
from shared.database.session import session_scope
from shared.errors import Unavailable
from shared.linux import boot_time
from shared.schemas.requests import Desired
from shared.settings import get_settings
from shared.telemetry import log
from worker.child.trainer_process import TrainerProcess

ALIVE_EVERY = 0.5


class Lost(Exception):
    """The lease is lost: another attempt owns the job now. Write nothing, upload nothing, end without a message."""


class Lease:
    """The right to work on one job at one epoch, for the duration of the `with` block."""

    def __init__(self, job_id: str, epoch: int, claimed_at: float) -> None:
        self.job_id = job_id
        self.epoch = epoch
        self.desired = Desired.RUN
        self._settings = get_settings()
        self._trainer: TrainerProcess | None = None
        self._renewed_at = claimed_at
        self._progress_at = claimed_at
        self._lost = Event()
        self._done = Event()
        self._threads = [
            Thread(target=self._keep_renewing, name=f"renew-{job_id}", daemon=True),
            Thread(target=self._keep_fencing, name=f"fence-{job_id}", daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop both threads. A renewal that hangs is abandoned: it renews nothing once the job is given back."""
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def guard(self, trainer: TrainerProcess | None) -> None:
        """Freeze, thaw and kill this trainer as the lease requires; None if there is no trainer."""
        self._trainer = trainer

    def is_lost(self) -> bool:
        """Return whether the lease is known to be lost."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `Lost` if the lease is known to be lost."""
        if self.is_lost():
            raise Lost(self.job_id)

    def wait_until_valid(self) -> None:
        """Wait for a recent renewal: this process may have been stopped since the last one. Raises `Lost`."""
        while self._is_overdue():
            self.check()
            time.sleep(0.05)
        self.check()

    def mark_progress(self) -> None:
        """Record that the attempt made progress, or is waiting for a server that is down."""
        self._progress_at = boot_time()

    def is_stuck(self) -> bool:
        """Return whether the attempt made no progress for `stuck_seconds`."""
        return boot_time() - self._progress_at > self._settings.stuck_seconds

    def lose(self) -> None:
        """Mark the lease as lost and kill the trainer: the database or the bucket knows another epoch."""
        self._lost.set()
        if self._trainer is not None:
            self._trainer.kill()
        log.warning("lease.lost", epoch=self.epoch)

    def _is_overdue(self) -> bool:
        return boot_time() - self._renewed_at > self._settings.fence_seconds

    def _keep_renewing(self) -> None:
        while not self._done.wait(self._settings.heartbeat_seconds):
            before = boot_time()
            try:
                with session_scope() as session:
                    desired = attempts.renew(
                        session, self.job_id, self.epoch, lease_seconds=self._settings.lease_seconds
                    )
            except Unavailable as error:
                log.warning("lease.renewal_failed", error=error.message, seconds=self._seconds_since_renewal())
                continue
            except Exception:
                log.exception("lease.renewal_failed", seconds=self._seconds_since_renewal())
                continue
            if desired is None:
                if not self._done.is_set():
                    self.lose()
                return
            self.desired, self._renewed_at = desired, before

    def _keep_fencing(self) -> None:
        alive_sent_at = 0.0
        while not self._done.wait(0.1):
            trainer, late = self._trainer, self._is_overdue()
            if late:
                self.mark_progress()  # an outage is not the attempt's fault
            elif boot_time() - self._progress_at > 2 * self._settings.stuck_seconds:
                log.critical("slot.stuck", job=self.job_id)
                os.kill(os.getpid(), signal.SIGKILL)
            if trainer is None or self._lost.is_set():
                continue
            if late and not trainer.frozen:
                trainer.freeze()
                log.warning("trainer.frozen", pid=trainer.pid, seconds=self._seconds_since_renewal())
            elif not late and trainer.is_stopped():
                trainer.thaw()
                log.info("trainer.thawed", pid=trainer.pid)
            elif not late and boot_time() - alive_sent_at > ALIVE_EVERY:
                trainer.send_alive(self.job_id)
                alive_sent_at = boot_time()

    def _seconds_since_renewal(self) -> float:
        return round(boot_time() - self._renewed_at, 1)
