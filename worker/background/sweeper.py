"""The sweeper: a thread in every worker slot that repairs what was lost.

It rings again for waiting jobs, takes back jobs whose lease has expired, and deletes old previews. An advisory lock
allows one sweep at a time, though two would be safe: every write is guarded. A sweeper takes back jobs only after it
has reached the database without a gap for one whole lease time: after an outage, running workers get time to renew.

Owns: when to sweep. Must not run a job.
"""

from __future__ import annotations

from threading import Event, Thread

from shared.broker.doorbell import ring
from shared.broker.queues import Queue
from shared.database import attempts, claims, previews
from shared.database.session import Session, after_commit, ping, session_scope, try_lock
from shared.errors import Unavailable
from shared.failpoints import Failpoint, failpoint
from shared.linux import boot_time
from shared.schemas.results import JobError
from shared.settings import Settings, get_settings
from shared.telemetry import log

RINGS = 16


def start(stop: Event) -> Thread:
    """Sweep until `stop` is set."""
    thread = Thread(target=_keep_sweeping, args=(stop,), name="sweeper", daemon=True)
    thread.start()
    return thread


class Watch:
    """Measures for how long the database has been reachable without a gap, on a clock that counts while asleep."""

    def __init__(self, *, longest_gap: float) -> None:
        self._longest_gap = longest_gap
        self._since: float | None = None
        self._last = 0.0

    def seen(self, now: float) -> float:
        """Record that the database answered at `now` (seconds). Returns the seconds since the last gap."""
        if self._since is None or now - self._last > self._longest_gap:
            self._since = now
        self._last = now
        return now - self._since

    def missed(self) -> None:
        """Record that the database did not answer: the watch starts again."""
        self._since = None


def sweep(settings: Settings, *, watched: float, first: bool = False) -> bool:
    """Run one round. Returns False if another sweeper is running, or the broker is down.

    `watched` is how long the database has been reachable without a gap, in seconds. The first sweep of a slot
    (`first`) rings for every waiting job and ignores the back-off: the slot may replace one that died after it had
    received a ring.
    """
    with session_scope() as session:
        if not try_lock(session, "milliner.sweep"):
            return False
        if watched >= settings.lease_seconds and reclaim(session, settings):
            failpoint(Failpoint.BEFORE_RECLAIM_COMMIT)
            after_commit(session, lambda: failpoint(Failpoint.AFTER_RECLAIM))
        previews.drop_old(session)
    return all(ring_again(queue, backoff=0.0 if first else settings.rering_seconds) for queue in Queue)


def ring_again(queue: Queue, *, backoff: float) -> bool:
    """Ring for waiting jobs. Returns False if the broker is down; the next round then rings again.

    A slot that wakes up runs jobs until none waits, so at most `RINGS` rings per round are enough; each takes time.
    """
    with session_scope() as session:
        waiting = claims.to_ring_for(session, queue, backoff=backoff, limit=RINGS)
    for rung, _ in enumerate(waiting):
        if not ring(queue):
            with session_scope() as session:
                claims.not_rung(session, waiting[rung:])
            return False
    if waiting:
        failpoint(Failpoint.AFTER_RERING)
        log.info("queue.rung", queue=queue, jobs=len(waiting))
    return True


def reclaim(session: Session, settings: Settings) -> int:
    """Take back up to 100 jobs whose lease has expired. Returns how many."""
    reclaimed = 0
    for job_id, epoch, owner in claims.lock_expired(session, limit=100):
        error = JobError(
            code="worker_lost",
            message=f"worker {owner} stopped renewing its lease",
            hint="the machine or the worker process died; out of memory is the usual cause (exit code 137)",
        )
        backoff, crashes = settings.crash_backoff_seconds, settings.max_crashes
        if attempts.crash(session, job_id, epoch, error, backoff=backoff, max_crashes=crashes, silent=True):
            log.warning("job.reclaimed", job=job_id, epoch=epoch, owner=owner)
            reclaimed += 1
    return reclaimed


def _keep_sweeping(stop: Event) -> None:
    settings = get_settings()
    watch, first = Watch(longest_gap=max(3 * settings.sweep_seconds, 5.0)), True
    while not stop.wait(settings.sweep_seconds):
        try:
            with session_scope() as session:
                ping(session)
            watched = watch.seen(boot_time())
            first = not sweep(settings, watched=watched, first=first) and first
        except Unavailable as error:
            watch.missed()
            log.warning("sweep.skipped", error=error.message)
        except Exception:
            watch.missed()
            log.exception("sweep.failed")
