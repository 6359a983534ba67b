"""The sweeper: one thread in every worker slot that finds what fell through.

It rings for jobs that nobody was told of, takes back jobs whose worker fell silent, and drops old previews. One sweeps
at a time (advisory lock), yet two at once would be right: every write is guarded. It takes back nothing before it has
itself watched the database without a gap for one whole lease time: after an outage, the living get the time to renew.
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
    thread = Thread(target=_sweeping, args=(stop,), name="sweeper", daemon=True)
    thread.start()
    return thread


class Watch:
    """For how long the database has been seen without a gap, on a clock that counts through sleep."""

    def __init__(self, *, longest_gap: float) -> None:
        self._longest_gap = longest_gap
        self._since: float | None = None
        self._last = 0.0

    def seen(self, now: float) -> float:
        """Note a look at `now` (seconds); returns how long the unbroken watch has lasted."""
        if self._since is None or now - self._last > self._longest_gap:
            self._since = now
        self._last = now
        return now - self._since

    def missed(self) -> None:
        """A look failed: the watch begins anew."""
        self._since = None


def sweep(settings: Settings, *, watched: float, newborn: bool = False) -> bool:
    """One round; False if another sweeper is at it, or the broker is down.

    `watched` is the length of the unbroken watch in seconds.

    A newborn sweeper rings for all that waits, back-off or not: its slot may be there because another died with a ring
    in its hand.
    """
    with session_scope() as session:
        if not try_lock(session, "milliner.sweep"):
            return False
        if watched >= settings.lease_seconds and reclaim(session, settings):
            failpoint(Failpoint.BEFORE_RECLAIM_COMMIT)
            after_commit(session, lambda: failpoint(Failpoint.AFTER_RECLAIM))
        previews.drop_old(session)
    return all(ring_again(queue, backoff=0.0 if newborn else settings.rering_seconds) for queue in Queue)


def ring_again(queue: Queue, *, backoff: float) -> bool:
    """Ring for what waits; False if the broker did not take it, which is then left for the next round.

    A slot that is woken goes on until nothing waits, so a few rings a round are enough: each takes time from the watch.
    """
    with session_scope() as session:
        waiting = claims.to_ring_for(session, queue, backoff=backoff, limit=RINGS)
    for told, _ in enumerate(waiting):
        if not ring(queue):
            with session_scope() as session:
                claims.not_rung(session, waiting[told:])
            return False
    if waiting:
        failpoint(Failpoint.AFTER_RERING)
        log.info("queue.rung", queue=queue, jobs=len(waiting))
    return True


def reclaim(session: Session, settings: Settings) -> int:
    """Take back every job whose lease has run out; returns how many."""
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


def _sweeping(stop: Event) -> None:
    settings = get_settings()
    watch, newborn = Watch(longest_gap=max(3 * settings.sweep_seconds, 5.0)), True
    while not stop.wait(settings.sweep_seconds):
        try:
            with session_scope() as session:
                ping(session)
            watched = watch.seen(boot_time())
            newborn = not sweep(settings, watched=watched, newborn=newborn) and newborn
        except Unavailable as error:
            watch.missed()
            log.warning("sweep.missed", error=error.message)
        except Exception:
            watch.missed()
            log.exception("sweep.broke")
