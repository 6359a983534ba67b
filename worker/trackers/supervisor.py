"""Report a running job's metrics to trackers (Weights & Biases, MLflow), through one child process for each.

Owns: that no tracker delays, fails or blocks a job. An attempt queues a step and continues at once. A thread that
nothing waits for does what may take time; a child process (worker/trackers/main.py) does what may break, hang or leak.
The child gets the address and the secret of one tracker through its pipe, and no other secret. Nothing here raises. A
tracker that does not answer is reported once on the job; the child retries until shortly after the attempt has ended.
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
from worker.trackers.pipe import End, Ending, StartRun, Status, Step

PASSED_ON = (*linux.BASIC, *linux.PROXIES)
ENDINGS: dict[State, Ending] = {
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}
QUIET = {"DO_NOT_TRACK": "1", "WANDB_ERROR_REPORTING": "false"}
NAMES: dict[TrackerKind, str] = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
#: Steps queued for a child, and steps of earlier attempts sent to it first. The child keeps as many (KEPT_STEPS).
STEPS = 10_000
POLL = 0.2
#: A child ends itself 30 s after its attempt (END_SECONDS of main.py); one that does not is killed after this time.
END_SECONDS = 40.0

Warn = Callable[[str], None]


class Tracking:
    """The trackers of one attempt: one per integration that the user asked for."""

    def __init__(self, job: Job, integrations: list[Integration], *, warn: Warn) -> None:
        self._trackers: list[Tracker] = []
        for integration in integrations:
            if (needed := missing(integration.type)) is not None:
                log.error("tracker.misconfigured", tracker=integration.type, missing=needed)
                warn(f"{NAMES[integration.type]} receives no metrics: this worker lacks its {needed}")
            else:
                self._trackers.append(Tracker(job, integration, warn))

    def add(self, metrics: Metrics) -> None:
        """Queue a step or an evaluation for every tracker."""
        for tracker in self._trackers:
            tracker.add(metrics)

    def last_call(self) -> None:
        """Report trackers that have not answered yet: the job is about to end and accepts no events after that."""
        for tracker in self._trackers:
            tracker.last_call()

    def end(self, *, lost: bool, wait: float = 0.0) -> None:
        """End the trackers. After a `lost` lease nothing more is sent: another attempt may use the same run.

        Wait at most `wait` seconds until the last messages are in the pipes: a draining slot exits right after this.
        """
        for tracker in self._trackers:
            tracker.end(lost=lost)
        until = time.monotonic() + wait
        for tracker in self._trackers:
            tracker.all_sent.wait(max(0.0, until - time.monotonic()))


class Tracker:
    """One child process and the thread that sends to it."""

    def __init__(self, job: Job, integration: Integration, warn: Warn) -> None:
        self._job = job
        self._integration = integration
        self._warn = warn
        self._steps: Queue[Metrics] = Queue(STEPS)
        self._over, self._lost, self.all_sent = Event(), Event(), Event()
        self._answered = False
        self._warning = Lock()  # acquired by the first warning and never released
        context = contextvars.copy_context()  # for the fields of log events
        name = f"tracker-{integration.type}"
        Thread(target=context.run, args=(self._run,), name=name, daemon=True).start()

    def add(self, metrics: Metrics) -> None:
        try:
            self._steps.put_nowait(metrics)
        except Full:
            log.debug("tracker.step_dropped", tracker=self._integration.type, step=metrics.step)

    def last_call(self) -> None:
        if not self._answered:
            self._warn_once("it has not answered yet, and the job is about to end")

    def end(self, *, lost: bool) -> None:
        if lost:
            self._lost.set()
        self._over.set()

    # ------------------------------------------------------------ in the thread

    def _run(self) -> None:
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
                    log.warning("tracker.exited", tracker=kind, stderr=tail)
                    self._warn_once("the process that reports to it has ended")
                self.all_sent.set()
                if not linux.wait_or_kill(child, seconds=END_SECONDS):
                    log.warning("tracker.killed", pid=child.pid)
        except OSError as error:
            log.warning("tracker.start_failed", tracker=kind, error=str(error))
            self._warn_once("the worker cannot start a process for it")
            self.all_sent.set()
        log.info("tracker.ended", tracker=kind)

    def _feed(self, pipe: IO[bytes]) -> None:
        """Send earlier steps, then new ones until the attempt is over, then how it ended; close the pipe."""
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
                    error = Status.model_validate_json(line).error
                except ValidationError:
                    error = "the process that reports to it sent an invalid message"
                if error is None:
                    self._answered = True
                else:
                    log.warning("tracker.failed", tracker=self._integration.type, error=error)
                    self._warn_once(error)

    def _warn_once(self, error: str) -> None:
        """Warn about this tracker, unless a thread already has."""
        if self._warning.acquire(blocking=False):
            name = NAMES[self._integration.type]
            self._warn(f"{name} does not accept this job's metrics; the job continues without it: {error}")


class Access(NamedTuple):
    """A tracker's address, and the key or token for it."""

    url: str | None
    secret: str | None


def missing(kind: TrackerKind) -> str | None:
    """Return what this worker lacks to report to this tracker, and how to provide it; None if nothing is missing."""
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
    """Return the steps of earlier attempts: the last of them may have ended before it sent them all."""
    if job.attempt == 1:
        return []
    try:
        with session_scope() as session:
            return jobs.metrics_of(session, job.id, last=STEPS)
    except Unavailable as error:
        log.warning("tracker.history_failed", error=error.message)
        return []


def _ending(job: Job) -> Ending | None:
    """Return how the attempt ended; None if the database is down or another attempt owns the job."""
    try:
        with session_scope() as session:
            now = session.get(Job, job.id)
    except Unavailable as error:
        log.warning("tracker.ending_failed", error=error.message)
        return None
    if now is None or now.lease_epoch != job.lease_epoch or now.lease_owner is not None:
        return None
    return ENDINGS.get(State(now.state), "interrupted")


def _step(metrics: Metrics) -> Step:
    return Step(step=metrics.step, values=metrics.scalars())


def _write(pipe: IO[bytes], message: BaseModel) -> None:
    pipe.write(message.model_dump_json().encode() + b"\n")
    pipe.flush()
