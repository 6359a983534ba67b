"""The child that talks to one tracker for one attempt: `python -m worker.trackers.main`.

Owns: keeping what the tracker has not taken yet, trying again, and ending in time. A tracker may be dead, slow, or lie;
whatever it does, it does to this process, which nobody waits for. Must know no database and no bucket.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from threading import Condition, Thread, Timer
from typing import Protocol, TextIO

from shared.streams import protect_standard_streams
from worker.trackers.pipe import MESSAGE, End, Ending, StartRun, Step, Values, Word

#: Steps that are kept for a tracker that does not take them; of more, the oldest go. Some 1 KB each.
KEPT_STEPS = 10_000
BATCH_STEPS = 50
BATCH_EVERY = 1.0
FIRST_WAIT = 1.0
LONGEST_WAIT = 15.0
#: After the attempt has ended, the tracker has so many seconds to take what is left.
FAREWELL = 30.0
#: Where another attempt will go on, and must not meet this one.
BRIEF = 5.0
SHOWN = 200

Batch = list[tuple[int, Values]]


class Run(Protocol):
    """The job's one run at a tracker."""

    def log(self, batch: Batch) -> None:
        """Take these steps, in order; those that the tracker has already are passed over."""

    def end(self, ending: Ending) -> None:
        """Close the run, or leave it for the next attempt."""


def main() -> int:
    """Serve one attempt."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
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
                _say(pipe, Word())
            batch, ending = backlog.due()
            if batch:
                run.log(batch)
                backlog.taken(batch)
            elif ending is not None:
                run.end(ending)
                return 0
            wait = FIRST_WAIT
            if ending is None:
                backlog.rest(BATCH_EVERY)
        except Exception as error:
            traceback.print_exc()
            _say(pipe, Word(trouble=_told(error, start)))
            run = None  # opened anew it says what it has, so that nothing is sent twice
            backlog.rest(wait)
            wait = min(2 * wait, LONGEST_WAIT)


class Backlog:
    """Steps that the tracker has not taken, and the attempt's end; filled by one thread and emptied by another."""

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
                self._steps.clear()  # the next attempt may be at the same run already, and tells what is not there
            self._changed.notify_all()

    def due(self) -> tuple[Batch, Ending | None]:
        """The oldest steps, and how the attempt ended if it has. The newest waits: its evaluation comes after it."""
        with self._changed:
            steps = sorted(self._steps)
            if self._ending is None:
                steps = steps[:-1]
            return [(step, dict(self._steps[step])) for step in steps[:BATCH_STEPS]], self._ending

    def taken(self, batch: Batch) -> None:
        with self._changed:
            for step, values in batch:
                if self._steps.get(step) == values:
                    del self._steps[step]

    def rest(self, seconds: float) -> None:
        """Sleep; the end of the attempt wakes."""
        with self._changed:
            self._changed.wait(seconds)


def _open(start: StartRun) -> Run:
    # Imported here: each brings a client that only one kind of child needs, and W&B's may not be installed.
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
            Timer(BRIEF if message.ending == "interrupted" else FAREWELL, _die).start()  # a daemon, as this thread is
            return
        assert isinstance(message, Step)
        backlog.add(message)
    _die()


def _die() -> None:
    """This process and what its libraries have started: the supervisor made us the leader of a group."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _say(pipe: TextIO, word: Word) -> None:
    try:
        pipe.write(word.model_dump_json() + "\n")
        pipe.flush()
    except BrokenPipeError:
        sys.stderr.write("the supervisor has gone\n")


def _told(error: Exception, start: StartRun) -> str:
    """One short line that a job's events can hold, without the secret."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    for hidden in (start.secret, start.url):
        said = said.replace(hidden, "…") if hidden else said
    said = said.replace("\0", "").encode("utf-8", "replace").decode()
    return said if len(said) <= SHOWN else said[: SHOWN - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
