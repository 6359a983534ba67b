"""A job under our lease: what we may write of it, and the ways to be done with it.

Owns: that every write names our epoch and waits for a database that is away, and the steps that are not yet recorded.
Must not know trainers, nor the order of effects (`runner.py`); the statements are in shared/database/attempts.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

from shared.database import attempts
from shared.database.session import session_scope
from shared.database.tables import Job
from shared.errors import Unavailable
from shared.failpoints import Failpoint, failpoint
from shared.schemas.requests import Phase
from shared.schemas.results import JobError, Metrics
from shared.settings import get_settings
from shared.telemetry import log
from worker.attempt.lease import Lease, Lost
from worker.attempt.progress import Pace
from worker.attempt.waiting import Leave, Patience
from worker.trackers.supervisor import Tracking

RELEASE_PATIENCE = 5.0  # a draining worker has 25 s in all
DISK_FULL_WAIT = 30.0
T = TypeVar("T")


class Outcome(StrEnum):
    """What came of asking for a job, as far as the slot is concerned."""

    IDLE = "idle"  # there was none
    UNABLE = "unable"  # no database to ask, or no disk
    DONE = "done"
    CRASHED = "crashed"  # perhaps the machine's fault


class LeasedJob:
    """One job, for as long as its lease is ours. `outcome` is what the slot is told."""

    def __init__(self, job: Job, lease: Lease, *, draining: Callable[[], bool], heeds_pause: bool) -> None:
        self.job = job
        self.lease = lease
        self.outcome = Outcome.DONE
        self.settings = get_settings()
        self.patience = Patience(
            lease,
            draining=draining,
            complain=self.complain,
            heeds_pause=heeds_pause,
            stop_seconds=self.settings.stop_seconds,
        )
        self.pending: list[Metrics] = []
        self.recorded_at = 0.0
        self.pace = Pace()
        self.tracking = Tracking(job, [], complain=self.complain)

    def enter(self, phase: Phase) -> None:
        """Say on the job what it is doing now."""
        self.guarded(lambda s: attempts.set_phase(s, self.job.id, self.lease.epoch, phase))

    def tell(self, level: str, message: str) -> None:
        """A line for the job's events."""
        self.guarded(lambda s: attempts.add_event(s, self.job.id, self.lease.epoch, level=level, message=message))

    def complain(self, message: str) -> None:
        """A line for the job's events, if the database takes it."""
        try:
            with session_scope() as session:
                attempts.add_event(session, self.job.id, self.lease.epoch, level="warn", message=message)
        except Unavailable:
            log.warning("complaint.unheard", message=message)

    def guarded(self, write: Callable[[Any], T]) -> T:
        """Run a guarded write in a transaction of its own; a refused one means that the lease is gone."""

        def once() -> T:
            with session_scope() as session:
                return write(session)

        result = self.patience.do(once)
        if not result:
            self.lease.lose()
            raise Lost(self.job.id)
        return result

    def flush(self) -> None:
        """Write the steps since the last time, at most once a second."""
        if self.pending:
            batch, self.pending = self.pending, []
            progress = self.pace.progress()
            self.guarded(lambda s: attempts.record_metrics(s, self.job.id, self.lease.epoch, batch, progress))
        self.recorded_at = time.monotonic()

    def end(self, error: JobError) -> None:
        """End the job for good: another attempt would meet the same."""
        self.tracking.last_call()
        self.guarded(lambda s: attempts.fail(s, self.job.id, self.lease.epoch, error))

    def crash(self, error: JobError) -> None:
        """Count it; the job goes back to the queue, or ends as poison."""
        self.flush()
        error = error.model_copy(update={"step": error.step or self.pace.step})
        self.outcome = Outcome.CRASHED
        backoff, crashes = self.settings.crash_backoff_seconds, self.settings.max_crashes
        log.warning("job.crashed", message=error.message)
        self.guarded(
            lambda s: attempts.crash(s, self.job.id, self.lease.epoch, error, backoff=backoff, max_crashes=crashes)
        )

    def release(self, leave: Leave) -> None:
        """Give the job back. A worker that drains has little time; then the lease runs out by itself."""
        failpoint(Failpoint.BEFORE_RELEASE)
        message = leave.message
        if message is None and self.patience.is_draining():
            message = "The worker is shutting down; the job goes on elsewhere"
        given_up_at = time.monotonic() + RELEASE_PATIENCE
        while not self.lease.is_lost():
            try:
                with session_scope() as session:
                    attempts.release(session, self.job.id, self.lease.epoch, message=message, wait=leave.wait)
                break
            except Unavailable as error:
                log.warning("release.failed", error=error.message)
            if self.patience.is_draining() and time.monotonic() > given_up_at:
                return
            self.lease.progressed()
            time.sleep(0.5)
        failpoint(Failpoint.AFTER_RELEASE)

    def no_room(self, message: str) -> Leave:
        """The disk is full: no crash of the job, which waits ever longer for this machine or another to have room."""
        self.outcome = Outcome.UNABLE
        wait = min(DISK_FULL_WAIT * 2.0 ** min(self.job.preempt_count, 10), attempts.LONGEST_BACKOFF)
        return Leave(f"The disk of the worker is full; the job goes on when there is room: {message}", wait=wait)
