"""Waiting for servers that are down, without being deaf: to the lease, to the user, to a worker that drains.

Owns: how long an attempt waits, and when it lets go. An outage is not the job's fault, so it may last; but a cancelled
job lets go of its slot at once, and one that is paused or drained has `stop_seconds` to bring its checkpoint home.
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
WORTH_TELLING = 60.0
T = TypeVar("T")


class Leave(Exception):
    """Let go of the job: its user or a draining worker asked for that, or this machine cannot go on."""

    def __init__(self, message: str | None = None, *, wait: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.wait = wait


class Patience:
    """What an attempt has left of it. `complain` puts a line where the user sees it; it may fail."""

    def __init__(
        self,
        lease: Lease,
        *,
        draining: Callable[[], bool],
        complain: Callable[[str], None],
        heeds_pause: bool,
        stop_seconds: float,
    ) -> None:
        self._lease = lease
        self._draining = draining
        self._complain = complain
        self._heeds = {Desired.CANCEL, Desired.PAUSE} if heeds_pause else {Desired.CANCEL}
        self._stop_seconds = stop_seconds
        self._asked_at: float | None = None

    def is_draining(self) -> bool:
        """Is the worker ending?"""
        return self._draining()

    def is_asked_to_leave(self) -> bool:
        """Does the user, or the worker, want this attempt to end?"""
        asked = self.is_draining() or self._lease.desired in self._heeds
        if not asked:
            self._asked_at = None
        elif self._asked_at is None:
            self._asked_at = time.monotonic()
        return asked

    def is_over(self) -> bool:
        """Has it been asked for so long ago that nothing more may be waited for? A cancel waits for nothing."""
        if not self.is_asked_to_leave():
            return False
        assert self._asked_at is not None
        return self._lease.desired is Desired.CANCEL or time.monotonic() - self._asked_at > self._stop_seconds

    def tick(self) -> None:
        """Called through a long wait for what only a job that goes on needs; raises if it does not."""
        self._lease.progressed()
        self._lease.check()
        if self.is_asked_to_leave():
            raise Leave

    def do(self, act: Callable[[], T]) -> T:
        """Do it, waiting out servers that are down: 1 s, 2 s, … 15 s between tries, while the lease is ours."""
        wait, waited, told = 1.0, 0.0, False
        while True:
            self._go_on()
            try:
                return self._aside(act)
            except storage.Fenced as fenced:
                self._lease.lose()
                raise Lost(self._lease.job_id) from fenced
            except Unavailable as error:
                log.warning("server.unavailable", error=error.message, retry_in=wait)
                waited += wait
                if waited > WORTH_TELLING and not told:
                    told = True
                    self._complain(f"Waiting for a server that does not answer: {error.message}")
            until = time.monotonic() + wait
            while time.monotonic() < until:
                self._go_on()
                time.sleep(TICK)
            wait = min(2 * wait, LONGEST_WAIT)

    def _go_on(self) -> None:
        """An outage is progress of a kind: nobody is stuck who waits for a server."""
        self._lease.progressed()
        self._lease.check()
        if self.is_over():
            raise Leave

    def _aside(self, act: Callable[[], T]) -> T:
        """Run it in a thread, so that a server which neither answers nor refuses can be left alone.

        What a thread still does that was left alone is harmless: rows and published objects are guarded by the epoch,
        and anything else it puts into the bucket is garbage.
        """
        done: list[T] = []
        failed: list[Exception] = []

        def run() -> None:
            try:
                done.append(act())
            except Exception as error:
                failed.append(error)

        thread = Thread(target=contextvars.copy_context().run, args=(run,), name="aside", daemon=True)
        thread.start()
        thread.join(TICK)
        while thread.is_alive():
            self._go_on()
            thread.join(TICK)
        if failed:
            raise failed[0]
        return done[0]
