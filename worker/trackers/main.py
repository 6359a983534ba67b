"""The child process that reports one attempt to one tracker: `python -m worker.trackers.main`.

Owns: the steps that the tracker has not accepted yet, retries, and ending in time. A tracker may be down, slow, or
answer nonsense; that affects only this process, which nothing waits for. Must not know the database or the bucket.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from threading import Condition, Thread, Timer
from typing import Protocol, TextIO

from shared.streams import protect_standard_streams
from worker.trackers.pipe import MESSAGE, End, Ending, StartRun, Status, Step, Values

#: Steps kept for a tracker that does not accept them, about 1 KB each. Beyond that, the oldest are dropped.
KEPT_STEPS = 10_000
BATCH_STEPS = 50
BATCH_EVERY = 1.0
FIRST_WAIT = 1.0
LONGEST_WAIT = 15.0
#: Seconds after the end of the attempt in which the remaining steps may still be sent.
END_SECONDS = 30.0
#: The same if another attempt will continue the job: the two must not write to the run at the same time.
INTERRUPTED_SECONDS = 5.0
ERROR_CHARACTERS = 200

Batch = list[tuple[int, Values]]


class Run(Protocol):
    """The job's run at a tracker."""

    def log(self, batch: Batch) -> None:
        """Send these steps, in order; skip those that the tracker already has."""

    def end(self, ending: Ending) -> None:
        """Close the run, or leave it open for the next attempt."""


def main() -> int:
    """Report one attempt, until it ends or the time to send is over."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # send what libraries print to stderr
    protect_standard_streams()
    start = MESSAGE.validate_json(sys.stdin.buffer.readline())
    assert isinstance(start, StartRun)
    backlog = Backlog()
    Thread(target=_read, args=(backlog,), name="messages", daemon=True).start()
    run: Run | None = None
    wait = FIRST_WAIT
    while True:
        try:
            if run is None:
                run = _open(start)
                _send(pipe, Status())
            batch, ending = backlog.due()
            if batch:
                run.log(batch)
                backlog.remove(batch)
            elif ending is not None:
                run.end(ending)
                return 0
            wait = FIRST_WAIT
            if ending is None:
                backlog.wait(BATCH_EVERY)
        except Exception as error:
            traceback.print_exc()
            _send(pipe, Status(error=_one_line(error, start)))
            run = None  # a reopened run knows which steps the tracker has, so that none is sent twice
            backlog.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)


class Backlog:
    """Steps that the tracker has not accepted, and the attempt's end. One thread fills it, another empties it."""

    def __init__(self) -> None:
        self._steps: dict[int, Values] = {}
        self._ending: Ending | None = None
        self._changed = Condition()

    def add(self, message: Step) -> None:
        with self._changed:
            self._steps.setdefault(message.step, {}).update(message.values)
            if len(self._steps) > KEPT_STEPS:
                del self._steps[min(self._steps)]

    def end(self, ending: Ending) -> None:
        with self._changed:
            self._ending = ending
            if ending == "interrupted":
                self._steps.clear()  # the next attempt may already use the run, and sends what is missing
            self._changed.notify_all()

    def due(self) -> tuple[Batch, Ending | None]:
        """Return the oldest steps, and how the attempt ended if it has.

        Before the end, the newest step is left out: its evaluation may still follow.
        """
        with self._changed:
            steps = sorted(self._steps)
            if self._ending is None:
                steps = steps[:-1]
            return [(step, dict(self._steps[step])) for step in steps[:BATCH_STEPS]], self._ending

    def remove(self, batch: Batch) -> None:
        with self._changed:
            for step, values in batch:
                if self._steps.get(step) == values:
                    del self._steps[step]

    def wait(self, seconds: float) -> None:
        """Sleep until `seconds` have passed or the attempt has ended."""
        with self._changed:
            self._changed.wait(seconds)


def _open(start: StartRun) -> Run:
    # Imported here: each child needs only one of the two clients, and W&B's may not be installed.
    if start.integration.type == "wandb":
        from worker.trackers import wandb_run  # noqa: PLC0415 (import cost)

        return wandb_run.open_run(start)
    from worker.trackers import mlflow_run  # noqa: PLC0415 (import cost)

    return mlflow_run.open_run(start)


def _read(backlog: Backlog) -> None:
    for line in sys.stdin.buffer:
        message = MESSAGE.validate_json(line)
        if isinstance(message, End):
            backlog.end(message.ending)
            Timer(
                INTERRUPTED_SECONDS if message.ending == "interrupted" else END_SECONDS, _die
            ).start()  # a daemon, like this thread
            return
        assert isinstance(message, Step)
        backlog.add(message)
    _die()


def _die() -> None:
    """Kill this process and what its libraries started: the supervisor made it the leader of a process group."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _send(pipe: TextIO, status: Status) -> None:
    try:
        pipe.write(status.model_dump_json() + "\n")
        pipe.flush()
    except BrokenPipeError:
        sys.stderr.write("the supervisor has closed the pipe\n")


def _one_line(error: Exception, start: StartRun) -> str:
    """Describe an error in one line of at most 200 characters, storable as an event, without secret and address."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for hidden in (start.secret, start.url):
        text = text.replace(hidden, "…") if hidden else text
    text = text.replace("\0", "").encode("utf-8", "replace").decode()
    return text if len(text) <= ERROR_CHARACTERS else text[: ERROR_CHARACTERS - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
