"""A lease, held: renewed by one thread, enforced on ourselves by another.

The renewing thread writes to Postgres every heartbeat and reads back what the user wants. The fencing thread never
waits for anything: after `fence_seconds` without a renewal it freezes the trainer, and a renewal thaws it, so an outage
of the database pauses training and does not restart it. An epoch that has moved kills the trainer. The clock is the one
that counts while the machine sleeps, and a renewal counts from before it was sent. While the lease is good the trainer
hears so twice a second: should this whole process be stopped, the trainer freezes itself before the lease ends. A
worker that renews but gets nowhere is as bad as a dead one: after `stuck_seconds` its attempt is to end by itself, and
after twice that time the process is killed.
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
    """Another attempt owns the job now: write nothing, upload nothing, end quietly."""


class Lease:
    """The right to work on one job at one epoch, while the `with` block lasts."""

    def __init__(self, job_id: str, epoch: int, claimed_at: float) -> None:
        self.job_id = job_id
        self.epoch = epoch
        self.desired = Desired.RUN
        self._settings = get_settings()
        self._session: TrainerProcess | None = None
        self._renewed = claimed_at
        self._progressed = claimed_at
        self._lost = Event()
        self._done = Event()
        self._threads = [
            Thread(target=self._renewing, name=f"renew-{job_id}", daemon=True),
            Thread(target=self._fencing, name=f"fence-{job_id}", daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A renewal that hangs is left alone: once the lease is given up, it renews nothing."""
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def guard(self, session: TrainerProcess | None) -> None:
        """Freeze, thaw and kill this trainer as the lease demands; None once there is none."""
        self._session = session

    def is_lost(self) -> bool:
        """Is the lease known to be gone?"""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `Lost` if it is."""
        if self.is_lost():
            raise Lost(self.job_id)

    def hold(self) -> None:
        """Wait until the lease is surely ours: this process may have been stopped since it was. Raises `Lost`."""
        while boot_time() - self._renewed > self._settings.fence_seconds:
            self.check()
            time.sleep(0.05)
        self.check()

    def progressed(self) -> None:
        """The attempt has got somewhere, or waits for a server that is down."""
        self._progressed = boot_time()

    def is_stuck(self) -> bool:
        """Has the attempt got nowhere for `stuck_seconds`?"""
        return boot_time() - self._progressed > self._settings.stuck_seconds

    def lose(self) -> None:
        """The database has said that the epoch moved."""
        self._lost.set()
        if self._session is not None:
            self._session.kill()
        log.warning("lease.lost", epoch=self.epoch)

    def _renewing(self) -> None:
        while not self._done.wait(self._settings.heartbeat_seconds):
            before = boot_time()
            try:
                with session_scope() as session:
                    desired = attempts.renew(
                        session, self.job_id, self.epoch, lease_seconds=self._settings.lease_seconds
                    )
            except Unavailable as error:
                log.warning("lease.unrenewed", error=error.message, seconds=round(boot_time() - self._renewed, 1))
                continue
            except Exception:
                log.exception("lease.unrenewed", seconds=round(boot_time() - self._renewed, 1))
                continue
            if desired is None:
                if not self._done.is_set():
                    self.lose()
                return
            self.desired, self._renewed = desired, before

    def _fencing(self) -> None:
        said_at = 0.0
        while not self._done.wait(0.1):
            session, late = self._session, boot_time() - self._renewed > self._settings.fence_seconds
            if late:
                self.progressed()  # an outage is not the attempt's fault
            elif boot_time() - self._progressed > 2 * self._settings.stuck_seconds:
                log.critical("slot.stuck", job=self.job_id)
                os.kill(os.getpid(), signal.SIGKILL)
            if session is None or self._lost.is_set():
                continue
            if late and not session.frozen:
                session.freeze()
                log.warning("trainer.frozen", pid=session.pid, seconds=round(boot_time() - self._renewed, 1))
            elif not late and session.is_stopped():
                session.thaw()
                log.info("trainer.thawed", pid=session.pid)
            elif not late and boot_time() - said_at > ALIVE_EVERY:
                session.tell_alive(self.job_id)
                said_at = boot_time()
