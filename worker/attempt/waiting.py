"""Retry calls to servers that are down, and stop when the lease, the user or a draining worker requires it.

Owns: how long an attempt waits, and when it gives up. An outage is not the job's fault, so it may last. A cancelled job
frees its slot at once; a paused or draining one has `stop_seconds` to save its checkpoint.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from threading import Thread
from typing import TypeVar

from shared import storage
from shared.errors import Unavailable
from shared.schemas.requests import Desired
from shared.telemetry import log
from worker.attempt.lease import Lease, Lost

TICK = 0.2
LONGEST_WAIT = 15.0
WARN_AFTER = 60.0
T = TypeVar("T")


class Leave(Exception):
    """End this attempt and give the job back: the user or a draining worker asked, or this machine cannot continue.

    `message` goes to the job's events. The job is not claimed again for `wait` seconds.
    """

    def __init__(self, message: str | None = None, *, wait: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.wait = wait


class Retry:
    """Retries of one attempt, until it has to end. `warn` reports a long outage to the user; it may fail.

    Without `honours_pause`, a pause does not end the attempt; a cancel does.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        draining: Callable[[], bool],
        warn: Callable[[str], None],
        honours_pause: bool,
        stop_seconds: float,
    ) -> None:
        self._lease = lease
        self._draining = draining
        self._warn = warn
        self._stop_on = {Desired.CANCEL, Desired.PAUSE} if honours_pause else {Desired.CANCEL}
        self._stop_seconds = stop_seconds
        self._stop_requested_at: float | None = None

    def is_draining(self) -> bool:
        """Return whether the worker is shutting down."""
        return self._draining()

    def stop_requested(self) -> bool:
        """Return whether the user or the worker wants this attempt to end."""
        requested = self.is_draining() or self._lease.desired in self._stop_on
        if not requested:
            self._stop_requested_at = None
        elif self._stop_requested_at is None:
            self._stop_requested_at = time.monotonic()
        return requested

    def must_stop(self) -> bool:
        """Return whether the time to stop has run out: at once after a cancel, else after `stop_seconds`."""
        if not self.stop_requested():
            return False
        assert self._stop_requested_at is not None
        cancelled = self._lease.desired is Desired.CANCEL
        return cancelled or time.monotonic() - self._stop_requested_at > self._stop_seconds

    def tick(self) -> None:
        """Check during a long download that the job continues. Raises `Leave` at the first stop request, or `Lost`."""
        self._lease.mark_progress()
        self._lease.check()
        if self.stop_requested():
            raise Leave

    def call(self, action: Callable[[], T]) -> T:
        """Call `action`, again while its server is down: after 1 s, 2 s, … up to 15 s.

        Raises `Leave` when the time to stop has run out, `Lost` when the lease is lost, and whatever else `action`
        raises.
        """
        wait, waited, warned = 1.0, 0.0, False
        while True:
            self._check()
            try:
                return self._in_thread(action)
            except storage.Fenced as fenced:
                self._lease.lose()
                raise Lost(self._lease.job_id) from fenced
            except Unavailable as error:
                log.warning("server.unavailable", error=error.message, retry_in=wait)
                waited += wait
                if waited > WARN_AFTER and not warned:
                    warned = True
                    self._warn(f"Waiting for a server that does not answer: {error.message}")
            until = time.monotonic() + wait
            while time.monotonic() < until:
                self._check()
                time.sleep(TICK)
            wait = min(2 * wait, LONGEST_WAIT)

    def _check(self) -> None:
        """Raise if the attempt must end. Waiting for a server counts as progress: the attempt is not stuck."""
        self._lease.mark_progress()
        self._lease.check()
        if self.must_stop():
            raise Leave

    def _in_thread(self, action: Callable[[], T]) -> T:
        """Run `action` in a thread, so that a server which hangs can be abandoned.

        What an abandoned thread still does is harmless: rows and published objects are guarded by the epoch, and
        anything else it puts into the bucket is garbage.
        """
        results: list[T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                results.append(action())
            except Exception as error:
                errors.append(error)

        thread = Thread(target=contextvars.copy_context().run, args=(run,), name="retried-call", daemon=True)
        thread.start()
        thread.join(TICK)
        while thread.is_alive():
            self._check()
            thread.join(TICK)
        if errors:
            raise errors[0]
        return results[0]
