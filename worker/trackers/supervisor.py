"""Telling trackers of a job while it runs: Weights & Biases, MLflow, by a child process for each.

Owns: that no tracker delays, fails or sticks a job. An attempt hands a step over and goes on at once; all that may take
time is done by a thread that nobody waits for, and what may break, hang or leak by a child (`worker/trackers`) that
gets the address and the secret of one tracker through its pipe, and of ours nothing. Nothing here raises. A tracker
that does not answer is told of once on the job; the child goes on trying until a while after the attempt has ended.
"""

from __future__ import annotations

import contextvars
import importlib.util
import sys
import time
from collections.abc import Callable
from queue import Empty, Full, Queue
from threading import Event, Lock, Thread
from typing import IO, NamedTuple

from pydantic import BaseModel, SecretStr, ValidationError

from shared import linux
from shared.database import jobs
from shared.database.session import session_scope
from shared.database.tables import Job
from shared.errors import Unavailable
from shared.schemas.requests import Integration, State, TrackerKind
from shared.schemas.results import Metrics, Plan
from shared.settings import get_settings
from shared.telemetry import log
from worker import cache
from worker.trackers.pipe import End, Ending, StartRun, Step, Word

PASSED_ON = (*linux.BASIC, *linux.PROXIES)
ENDINGS: dict[State, Ending] = {
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}
QUIET = {"DO_NOT_TRACK": "1", "WANDB_ERROR_REPORTING": "false"}
NAMES: dict[TrackerKind, str] = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
#: Steps on their way to a child, and those of earlier attempts that it is told first: it keeps no more.
STEPS = 10_000
POLL = 0.2
#: A child ends by itself half a minute after its attempt; one that does not is killed.
FAREWELL = 40.0

Complain = Callable[[str], None]


class Tracking:
    """The trackers of one attempt, none where its user asked for none."""

    def __init__(self, job: Job, integrations: list[Integration], *, complain: Complain) -> None:
        self._trackers: list[Tracker] = []
        for integration in integrations:
            if (lack := missing(integration.type)) is not None:
                log.error("tracker.unusable", tracker=integration.type, lack=lack)
                complain(f"{NAMES[integration.type]} is told nothing: this worker lacks its {lack}")
            else:
                self._trackers.append(Tracker(job, integration, complain))

    def note(self, metrics: Metrics) -> None:
        """Something was measured."""
        for tracker in self._trackers:
            tracker.note(metrics)

    def last_call(self) -> None:
        """The job is about to end, and its events with it."""
        for tracker in self._trackers:
            tracker.last_call()

    def end(self, *, lost: bool, wait: float = 0.0) -> None:
        """The attempt is over. Of a `lost` lease nothing more is said: another attempt may be at the same run.

        `wait` so many seconds at most for the last words to be handed on: a slot that drains is gone at once.
        """
        for tracker in self._trackers:
            tracker.end(lost=lost)
        until = time.monotonic() + wait
        for tracker in self._trackers:
            tracker.fed.wait(max(0.0, until - time.monotonic()))


class Tracker:
    """One child and the thread that feeds it."""

    def __init__(self, job: Job, integration: Integration, complain: Complain) -> None:
        self._job = job
        self._integration = integration
        self._complain = complain
        self._steps: Queue[Metrics] = Queue(STEPS)
        self._over, self._lost, self.fed = Event(), Event(), Event()
        self._answered = False
        self._to_tell = Lock()  # taken for good by the first complaint
        context = contextvars.copy_context()  # for the log
        name = f"tracker-{integration.type}"
        Thread(target=context.run, args=(self._serve,), name=name, daemon=True).start()

    def note(self, metrics: Metrics) -> None:
        try:
            self._steps.put_nowait(metrics)
        except Full:
            log.debug("tracker.step_dropped", tracker=self._integration.type, step=metrics.step)

    def last_call(self) -> None:
        if not self._answered:
            self._tell("it has not answered yet, and the job is about to end")

    def end(self, *, lost: bool) -> None:
        if lost:
            self._lost.set()
        self._over.set()

    # ------------------------------------------------------------ in the thread

    def _serve(self) -> None:
        kind = self._integration.type
        try:
            with cache.work_dir(f"{self._job.id}-{self._job.lease_epoch}-{kind}") as folder:
                with (folder / "tracker.log").open("wb") as stderr:
                    child = linux.spawn(
                        [sys.executable, "-m", "worker.trackers.main"],
                        env=linux.inherited(*PASSED_ON) | QUIET | {"HOME": str(folder)},
                        stderr=stderr,
                        cwd=folder,
                    )
                log.info("tracker.started", tracker=kind, pid=child.pid)
                assert child.stdin is not None
                assert child.stdout is not None
                Thread(target=contextvars.copy_context().run, args=(self._listen, child.stdout), daemon=True).start()
                try:
                    self._feed(child.stdin)
                except BrokenPipeError:
                    tail = (folder / "tracker.log").read_bytes()[-2000:].decode(errors="replace")
                    log.warning("tracker.died", tracker=kind, said=tail)
                    self._tell("the process that talks to it has ended")
                self.fed.set()
                if not linux.wait_or_kill(child, seconds=FAREWELL):
                    log.warning("tracker.killed", pid=child.pid)
        except OSError as error:
            log.warning("tracker.broke", tracker=kind, error=str(error))
            self._tell("the worker cannot start a process for it")
            self.fed.set()
        log.info("tracker.ended", tracker=kind)

    def _feed(self, pipe: IO[bytes]) -> None:
        """All that there is to say, until the attempt is over; then the pipe is closed."""
        with pipe:
            _write(pipe, _start(self._job, self._integration))
            for metrics in _earlier(self._job):
                _write(pipe, _step(metrics))
            while not self._lost.is_set():
                try:
                    _write(pipe, _step(self._steps.get(timeout=POLL)))
                except Empty:
                    if self._over.is_set():
                        break
            if (ending := None if self._lost.is_set() else _ending(self._job)) is not None:
                _write(pipe, End(ending=ending))

    def _listen(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                try:
                    trouble = Word.model_validate_json(line).trouble
                except ValidationError:
                    trouble = "the process that talks to it says what cannot be understood"
                if trouble is None:
                    self._answered = True
                else:
                    log.warning("tracker.trouble", tracker=self._integration.type, error=trouble)
                    self._tell(trouble)

    def _tell(self, trouble: str) -> None:
        """Once, whichever thread is the first."""
        if self._to_tell.acquire(blocking=False):
            name = NAMES[self._integration.type]
            self._complain(f"{name} does not take this job's metrics, and the job goes on without it: {trouble}")


class Access(NamedTuple):
    """Where a tracker is, and what opens it."""

    url: str | None
    secret: str | None


def missing(kind: TrackerKind) -> str | None:
    """What this worker would need in order to tell this tracker anything; None if it has all."""
    if kind == "wandb" and importlib.util.find_spec("wandb") is None:
        return "package: pip install 'milliner[trackers]'"
    access = _access(kind)
    if kind == "wandb":
        return None if access.secret else "key: set MILLINER_WANDB_API_KEY"
    return None if access.url else "address: set MILLINER_MLFLOW_TRACKING_URI"


def _access(kind: TrackerKind) -> Access:
    settings = get_settings()
    if kind == "wandb":
        return Access(settings.wandb_base_url, _revealed(settings.wandb_api_key))
    return Access(_revealed(settings.mlflow_tracking_uri), _revealed(settings.mlflow_token))


def _revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def _start(job: Job, integration: Integration) -> StartRun:
    access = _access(integration.type)
    return StartRun(
        job=job.id,
        integration=integration,
        base_model=job.base_model,
        config=Plan.model_validate(job.plan).recipe.model_dump(mode="json"),
        url=access.url or "",
        secret=access.secret,
    )


def _earlier(job: Job) -> list[Metrics]:
    """What attempts before this one have measured: the last of them may not have come to tell it all."""
    if job.attempt == 1:
        return []
    try:
        with session_scope() as session:
            return jobs.metrics_of(session, job.id, last=STEPS)
    except Unavailable as error:
        log.warning("tracker.no_history", error=error.message)
        return []


def _ending(job: Job) -> Ending | None:
    """How the attempt has left its job; None where nobody knows, or another attempt has it."""
    try:
        with session_scope() as session:
            now = session.get_one(Job, job.id)
    except Unavailable as error:
        log.warning("tracker.no_ending", error=error.message)
        return None
    if now.lease_epoch != job.lease_epoch or now.lease_owner is not None:
        return None
    return ENDINGS.get(State(now.state), "interrupted")


def _step(metrics: Metrics) -> Step:
    return Step(step=metrics.step, values=metrics.scalars())


def _write(pipe: IO[bytes], message: BaseModel) -> None:
    pipe.write(message.model_dump_json().encode() + b"\n")
    pipe.flush()
