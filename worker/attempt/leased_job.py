"""A job under our lease: the writes we may make to it, and the ways to end work on it.

Owns: that every write names our epoch and is retried while the database is down, and the steps not yet recorded.
Must not know trainers, nor the order of effects (`runner.py`); the statements are in shared/database/attempts.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Concatenate, ParamSpec, TypeVar

from shared.database import attempts
from shared.database.session import Session, session_scope
from shared.database.tables import Job
from shared.errors import Unavailable
from shared.failpoints import Failpoint, failpoint
from shared.schemas.results import JobError, Metrics
from shared.settings import get_settings
from shared.telemetry import log
from worker.attempt.lease import Lease, Lost
from worker.attempt.progress import Pace
from worker.attempt.waiting import Leave, Retry

RELEASE_SECONDS = 5.0  # a draining worker has 25 s in all
RECORD_EVERY = 1.0
DISK_FULL_WAIT = 30.0
P = ParamSpec("P")
T = TypeVar("T")


class Outcome(StrEnum):
    """How a slot's request for a job ended."""

    IDLE = "idle"  # there was none
    UNABLE = "unable"  # no database to ask, or no disk
    DONE = "done"
    CRASHED = "crashed"  # perhaps the machine's fault


class LeasedJob:
    """One job, as long as its lease is ours. The slot reads `outcome` at the end."""

    def __init__(self, job: Job, lease: Lease, *, draining: Callable[[], bool], honours_pause: bool) -> None:
        self.job = job
        self.lease = lease
        self.outcome = Outcome.DONE
        self.settings = get_settings()
        self.retry = Retry(
            lease,
            draining=draining,
            warn=self.warn,
            honours_pause=honours_pause,
            stop_seconds=self.settings.stop_seconds,
        )
        self._pace = Pace()
        self._pending: list[Metrics] = []
        self._recorded_at = 0.0

    def write(self, statement: Callable[Concatenate[Session, str, int, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `statement(session, job id, epoch, …)` in its own transaction, and return its result.

        A false result means that the epoch is no longer ours. Raises `Lost` then.
        """

        def once() -> T:
            with session_scope() as session:
                return statement(session, self.job.id, self.lease.epoch, *args, **kwargs)

        result = self.retry.call(once)
        if not result:
            self.lease.lose()
            raise Lost(self.job.id)
        return result

    def add_event(self, level: str, message: str) -> None:
        """Add a line to the job's events."""
        self.write(attempts.add_event, level=level, message=message)

    def warn(self, message: str) -> None:
        """Add a warning to the job's events, without retries; while the database is down, log it instead."""
        try:
            with session_scope() as session:
                attempts.add_event(session, self.job.id, self.lease.epoch, level="warn", message=message)
        except Unavailable:
            log.warning("notice.write_failed", message=message)

    def add_metrics(self, metrics: Metrics, received_at: float) -> None:
        """Queue a step or an evaluation for the next `flush`. `received_at` is in monotonic seconds."""
        self._pace.add(metrics, received_at)
        self._pending.append(metrics)

    def flush_if_due(self) -> None:
        """Write the queued steps, at most once per `RECORD_EVERY` seconds."""
        if self._pending and time.monotonic() - self._recorded_at >= RECORD_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write the queued steps now."""
        if self._pending:
            batch, self._pending = self._pending, []
            self.write(attempts.record_metrics, batch, self._pace.progress())
        self._recorded_at = time.monotonic()

    def fail(self, error: JobError) -> None:
        """End the job for good: another attempt would fail in the same way."""
        self.write(attempts.fail, error)

    def crash(self, error: JobError) -> None:
        """Count a crash; the job goes back to the queue, or fails after too many crashes."""
        self.flush()
        error = error.model_copy(update={"step": error.step or self._pace.step})
        self.outcome = Outcome.CRASHED
        backoff, crashes = self.settings.crash_backoff_seconds, self.settings.max_crashes
        log.warning("job.crashed", message=error.message)
        self.write(attempts.crash, error, backoff=backoff, max_crashes=crashes)

    def release(self, leave: Leave) -> None:
        """Give the job back. A draining worker tries for a few seconds only; then the lease expires by itself."""
        failpoint(Failpoint.BEFORE_RELEASE)
        message = leave.message
        if message is None and self.retry.is_draining():
            message = "The worker is shutting down; another worker will continue the job"
        give_up_at = time.monotonic() + RELEASE_SECONDS
        while not self.lease.is_lost():
            try:
                with session_scope() as session:
                    attempts.release(session, self.job.id, self.lease.epoch, message=message, wait=leave.wait)
                break
            except Unavailable as error:
                log.warning("release.failed", error=error.message)
            if self.retry.is_draining() and time.monotonic() > give_up_at:
                return
            self.lease.mark_progress()
            time.sleep(0.5)
        failpoint(Failpoint.AFTER_RELEASE)

    def disk_full(self, message: str) -> Leave:
        """Return the `Leave` for a full disk: not a crash, but a wait, doubled each time, until a disk has space."""
        self.outcome = Outcome.UNABLE
        wait = min(DISK_FULL_WAIT * 2.0 ** min(self.job.preempt_count, 10), attempts.LONGEST_BACKOFF)
        return Leave(f"The worker's disk is full; the job continues when there is space: {message}", wait=wait)
