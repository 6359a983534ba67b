"""One attempt, top to bottom: claim, stage, run the trainer, record what it says, publish, finish.

Owns the order of effects. Files go to S3 first and become real by a row, which names our epoch; a row that is refused
means that the lease moved on (`Lost`), and then nothing more is written. A server that is down is waited for, under the
lease: an outage is not the job's fault and is no crash; nor is a full disk, which gives the job back. Every gap between
two effects is a named crash point (shared/faults.py).
"""

from __future__ import annotations

import csv
import errno
import io
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import select

from shared import attempts, jobs, storage
from shared.db import session_scope
from shared.errors import Unavailable
from shared.faults import Point, reach
from shared.ids import fine_tuned_name, new_id
from shared.models import Adapter, BaseModel, Checkpoint, File, Job, JobMetric, Tenant
from shared.protocol import (
    CheckpointSaved,
    Done,
    Failed,
    Measured,
    Notice,
    PhaseEntered,
    Prepare,
    Prepared,
    Stop,
    Stopped,
    Task,
    Train,
)
from shared.queue import Queue, ring
from shared.schemas import Desired, Hyperparameters, JobCreate, JobError, Metrics, Phase, Plan, Recipe, State
from shared.settings import get_settings
from shared.telemetry import bind, log, unbind
from worker import cache
from worker.lease import Lease, Lost, boottime
from worker.pace import Pace
from worker.session import Died, Ended, TrainerSession

TICK = 0.2
RECORD_EVERY = 1.0
KEPT_CHECKPOINTS = 3
RELEASE_PATIENCE = 5.0  # a draining worker has 25 s in all
DISK_FULL_WAIT = 30.0
DISK_IS_FULL = "The disk of the worker is full; the job goes on when there is room"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
T = TypeVar("T")


def run_next(queue: Queue, *, owner: str, slot: int, draining: Callable[[], bool]) -> bool:
    """Claim one job of this queue and see it through; False if there was none, no database to ask, or no disk."""
    settings, claimed_at = get_settings(), boottime()
    if not cache.has_room():
        return False
    try:
        with session_scope() as session:
            job = jobs.claim(session, queue, owner=owner, lease_seconds=settings.lease_seconds)
    except Unavailable as error:
        log.warning("claim.failed", error=error.message)
        return False
    if job is None:
        return False
    bind(job=job.id, epoch=job.lease_epoch, attempt=job.attempt)
    log.info("job.claimed", queue=queue)
    reach(Point.AFTER_CLAIM)
    try:
        with ExitStack() as held, Lease(job.id, job.lease_epoch, claimed_at) as lease:
            Attempt(job, lease, draining, held).run(queue, slot)
    except (Lost, Leave):
        log.warning("job.left")
    finally:
        unbind("job", "epoch", "attempt")
    return True


class Attempt:
    """The state of one attempt: its job, its lease, what it holds on this machine, and the steps not yet recorded."""

    def __init__(self, job: Job, lease: Lease, draining: Callable[[], bool], held: ExitStack) -> None:
        self.job = job
        self.request = JobCreate.model_validate(job.request)
        self.lease = lease
        self.draining = draining
        self.held = held
        self.settings = get_settings()
        self.pending: list[Metrics] = []
        self.recorded_at = 0.0
        self.pace = Pace()

    def run(self, queue: Queue, slot: int) -> None:
        """See the job to its end, back to the queue, or to a counted crash, whatever happens here."""
        try:
            self.work_dir = self.held.enter_context(cache.work_dir(f"{self.job.id}-{self.lease.epoch}"))
            command = self.stage(queue)
            reach(Point.AFTER_STAGE)
            self.talk(command, slot)
        except Leave as leave:
            self.release(leave)
        except Lost:
            raise
        except storage.Corrupt as lost:
            hint = "the bucket has lost or changed it: upload the dataset again, or have the base model imported again"
            self.end(JobError(code="object_lost", message=str(lost), hint=hint))
        except Exception as error:
            log.exception("attempt.broke")
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                self.release(Leave(f"{DISK_IS_FULL}: {error}", wait=DISK_FULL_WAIT))
                return
            message = f"{type(error).__name__}: {error}"
            self.crash(JobError(code="internal_error", message=message, hint="the worker's log has the traceback"))

    def talk(self, command: Prepare | Train, slot: int) -> None:
        """Start a trainer, tell it what to do, and listen until it has had its last word."""
        session = TrainerSession(self.work_dir, visible_device=cache.visible_device(slot))
        log.info("trainer.started", pid=session.pid)
        self.lease.guard(session)
        reach(Point.AFTER_TRAINER_START)
        try:
            session.send(command)
            self.listen(session)
        except Ended as end:
            self.lease.check()
            if isinstance(end, Died) and end.out_of_memory and self.can_shrink():
                self.flush()
                self.guarded(lambda s: attempts.shrunk(s, self.job.id, self.lease.epoch))
                return
            code = "trainer_stuck" if isinstance(end, Stuck) else "trainer_crashed"
            hint = "the last log lines tell more; a smaller trainer.micro_batch or max_length needs less memory"
            lines = session.last_log_lines()
            self.crash(JobError(code=code, message=str(end), hint=hint, last_log_lines=lines))
        finally:
            self.lease.guard(None)
            session.close()

    # ------------------------------------------------------------ staging

    def stage(self, queue: Queue) -> Prepare | Train:
        """Bring dataset, base and the last good checkpoint to this machine; say what the trainer shall do."""
        with_weights = queue is Queue.TRAIN
        base, training, validation = self.patiently(self._inputs)
        base_dir = self.patiently(
            lambda: self.held.enter_context(cache.base_model(base, with_weights=with_weights, tick=self.tick))
        )
        task = Task(
            base_dir=str(base_dir),
            base_name=base.public_id,
            base_revision=base.revision,
            training_file=str(self.patiently(lambda: self._fetched(training))),
            validation_file=str(self.patiently(lambda: self._fetched(validation))) if validation else None,
            hyperparameters=self.request.hyperparameters or Hyperparameters(),
            lora=self.request.lora,
            quantization=self.request.quantization,
            trainer=self.request.trainer,
            seed=self.job.seed,
            torch_threads=self.settings.torch_threads,
            max_row_bytes=self.settings.max_row_bytes,
            silence_seconds=(self.settings.lease_seconds - self.settings.fence_seconds) / 2,
        )
        if queue is Queue.PREPARE:
            return Prepare(job=self.job.id, task=task)
        recipe: Recipe = Plan.model_validate(self.job.plan).recipe
        resume = self.last_checkpoint()
        return Train(
            job=self.job.id,
            task=task,
            recipe=recipe,
            work_dir=str(self.work_dir),
            resume_from=str(resume) if resume else None,
            memory_halvings=self.job.memory_halvings,
        )

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint whose every hash is right; a broken one is told of and the one before it taken."""
        for checkpoint in self.patiently(self._checkpoints):
            folder = self.work_dir / f"resume-{checkpoint.step}"
            fetch = partial(storage.fetch_folder, checkpoint.prefix, checkpoint.files, folder, tick=self.tick)
            try:
                self.patiently(fetch)
            except storage.Corrupt as broken:
                self.tell("warn", f"Checkpoint of step {checkpoint.step} is broken, going one back: {broken}")
                continue
            self.tell("info", f"Resuming from the checkpoint of step {checkpoint.step}")
            return folder
        return None

    def _inputs(self) -> tuple[BaseModel, File, File | None]:
        with session_scope() as session:
            base = session.get_one(BaseModel, self.job.base_model)
            training = session.get_one(File, self.job.training_file)
            validation = session.get_one(File, self.job.validation_file) if self.job.validation_file else None
            return base, training, validation

    def _checkpoints(self) -> Sequence[Checkpoint]:
        with session_scope() as session:
            return attempts.latest_checkpoints(session, self.job.id)

    def _fetched(self, file: File) -> Path:
        path = self.work_dir / file.id
        storage.fetch(file.key, path, file.sha256, tick=self.tick)
        return path

    def tick(self) -> None:
        """Called through a long wait: raises if there is nothing left to wait for."""
        self.lease.progressed()
        self.lease.check()
        if self.draining() or self.lease.desired is not Desired.RUN:
            raise Leave

    # ------------------------------------------------------------ listening

    def listen(self, session: TrainerSession) -> None:  # noqa: PLR0912 (one branch an event)
        """Obey the lease and the user, and take in events until one of them is the last."""
        asked_at: float | None = None
        while True:
            self.lease.check()
            if self.lease.desired is Desired.CANCEL:
                raise Leave
            if asked_at is None and (self.draining() or self.lease.desired is Desired.PAUSE):
                log.info("trainer.asked_to_stop")
                session.send(Stop(job=self.job.id))
                asked_at = time.monotonic()
            if asked_at is not None and time.monotonic() - asked_at > self.settings.stop_seconds:
                log.warning("trainer.too_slow", seconds=self.settings.stop_seconds)
                raise Leave
            if self.lease.is_stuck():
                raise Stuck(f"the trainer has said nothing for {self.settings.stuck_seconds:.0f} s")
            event = session.receive(timeout=TICK)
            if event is not None:
                self.lease.progressed()
            if self.pending and time.monotonic() - self.recorded_at >= RECORD_EVERY:
                self.flush()
            match event:
                case None:
                    continue
                case PhaseEntered(phase=phase):
                    log.info("phase.entered", phase=phase)
                    self.enter(phase)
                case Notice(level=level, message=message):
                    self.tell(level, message)
                case Measured(metrics=metrics):
                    self.pace.note(metrics)
                    self.pending.append(metrics)
                case CheckpointSaved():
                    self.keep(event)
                case Prepared(plan=plan):
                    self.plan(plan)
                    return
                case Done():
                    self.publish(event)
                    return
                case Stopped(step=step):
                    log.info("trainer.stopped", step=step)
                    raise Leave
                case Failed():
                    self.fail(event, session)
                    return

    def flush(self) -> None:
        """Write the steps since the last time, at most once a second."""
        if self.pending:
            batch, self.pending = self.pending, []
            progress = self.pace.progress()
            self.guarded(lambda s: attempts.record(s, self.job.id, self.lease.epoch, batch, progress))
        self.recorded_at = time.monotonic()

    def keep(self, event: CheckpointSaved) -> None:
        """Upload a checkpoint, make it real, let the oldest go."""
        self.flush()
        folder, epoch = Path(event.path), self.lease.epoch
        prefix = f"checkpoints/{self.job.tenant_id}/{self.job.id}/{epoch}/{event.step}/"
        reach(Point.BEFORE_CHECKPOINT_UPLOAD)
        files = self.patiently(lambda: storage.put_folder(prefix, folder))
        reach(Point.AFTER_CHECKPOINT_UPLOAD)
        saved = {"step": event.step, "prefix": prefix, "files": files, "metrics": event.metrics}
        self.guarded(lambda s: attempts.checkpointed(s, self.job.id, epoch, **saved))  # type: ignore[arg-type]
        log.info("checkpoint.saved", step=event.step)
        reach(Point.AFTER_CHECKPOINT_ROW)
        shutil.rmtree(folder)
        for old in self.patiently(self._retired):
            self.patiently(partial(storage.delete_prefix, old))

    def _retired(self) -> list[str]:
        with session_scope() as session:
            return attempts.drop_checkpoints(session, self.job.id, self.lease.epoch, keep=KEPT_CHECKPOINTS)

    # ------------------------------------------------------------ endings

    def plan(self, plan: Plan) -> None:
        """The dataset is good: queue the job and ring for a trainer."""
        for warning in plan.warnings:
            self.tell("warn", warning)
        state = self.guarded(lambda s: attempts.planned(s, self.job.id, self.lease.epoch, plan))
        log.info("job.planned", state=state, rows=plan.rows, trained_tokens=plan.trained_tokens)
        reach(Point.AFTER_PLAN)
        if state is State.QUEUED:
            ring(Queue.TRAIN)  # unheard, the sweeper rings again

    def publish(self, event: Done) -> None:
        """Adapter and result file to S3, then one transaction that makes the job `succeeded`."""
        self.flush()
        job, epoch = self.job, self.lease.epoch
        self.enter(Phase.PUBLISHING)
        reach(Point.BEFORE_PUBLISH)
        prefix = f"adapters/{job.tenant_id}/{job.id}/"
        files = self.patiently(lambda: storage.put_folder(prefix, Path(event.path), epoch=epoch))
        reach(Point.AFTER_ADAPTER_UPLOAD)
        table = self.patiently(self._result_csv)
        file_id = new_id("file-")
        key = f"files/{job.tenant_id}/{file_id}"
        self.patiently(lambda: storage.put_bytes(key, table, content_type="text/csv"))
        reach(Point.AFTER_RESULT_UPLOAD)

        def finish(session: Any) -> State | None:
            tenant = session.get_one(Tenant, job.tenant_id)
            adapter = Adapter(
                job_id=job.id,
                tenant_id=job.tenant_id,
                name=fine_tuned_name(job.base_model, tenant.name, self.request.suffix, job.id),
                base_model=job.base_model,
                prefix=prefix,
                files=files,
                bytes=sum(file["bytes"] for file in files),
            )
            result = File(
                id=file_id,
                tenant_id=job.tenant_id,
                filename="step_metrics.csv",
                purpose="fine-tune-results",
                status="processed",
                bytes=len(table),
                sha256=storage.sha256_of_bytes(table),
                key=key,
            )
            return attempts.succeeded(session, job.id, epoch, report=event.report, adapter=adapter, result_file=result)

        state = self.guarded(finish)
        log.info("job.finished", state=state)
        reach(Point.AFTER_FINISH)
        if state is not State.SUCCEEDED:
            self.patiently(lambda: storage.delete_prefix(prefix))
            self.patiently(lambda: storage.delete(key))

    def fail(self, event: Failed, session: TrainerSession) -> None:
        """A user's error ends the job; any other is a crash, and counted; a full disk is neither."""
        self.flush()
        if event.code == "disk_full":
            raise Leave(f"{DISK_IS_FULL}: {event.message}", wait=DISK_FULL_WAIT)
        error = JobError(
            code=event.code,
            message=event.message,
            param=event.param,
            hint=event.hint,
            step=event.step,
            last_log_lines=session.last_log_lines() if event.retryable else [],
        )
        log.warning("trainer.failed", code=event.code, message=event.message, retryable=event.retryable)
        if event.retryable:
            self.crash(error)
        else:
            self.end(error)

    def end(self, error: JobError) -> None:
        """End the job for good: another attempt would meet the same."""
        self.guarded(lambda s: attempts.failed(s, self.job.id, self.lease.epoch, error))

    def crash(self, error: JobError) -> None:
        """Count it; the job goes back to the queue, or ends as poison."""
        self.flush()
        error = error.model_copy(update={"step": error.step or self.pace.step})
        backoff, crashes = self.settings.crash_backoff_seconds, self.settings.max_crashes
        log.warning("job.crashed", message=error.message)
        self.guarded(
            lambda s: attempts.crashed(s, self.job.id, self.lease.epoch, error, backoff=backoff, max_crashes=crashes)
        )

    def release(self, leave: Leave) -> None:
        """Give the job back. A database that is down is waited for briefly; then the lease runs out by itself."""
        reach(Point.BEFORE_RELEASE)
        deadline = time.monotonic() + RELEASE_PATIENCE
        while True:
            try:
                with session_scope() as session:
                    message, wait = leave.message, leave.wait
                    attempts.released(session, self.job.id, self.lease.epoch, message=message, wait=wait)
                break
            except Unavailable as error:
                log.warning("release.failed", error=error.message)
                if time.monotonic() > deadline:
                    return
                time.sleep(0.5)
        reach(Point.AFTER_RELEASE)

    def can_shrink(self) -> bool:
        """Is there still a micro-batch that can be halved?"""
        plan = Plan.model_validate(self.job.plan) if self.job.plan else None
        return plan is not None and plan.recipe.micro_batch >> self.job.memory_halvings > 1

    def enter(self, phase: Phase) -> None:
        """Say on the job what it is doing now."""
        self.guarded(lambda s: attempts.enter(s, self.job.id, self.lease.epoch, phase))

    def tell(self, level: str, message: str) -> None:
        """A line for the job's events."""
        self.guarded(lambda s: attempts.note(s, self.job.id, self.lease.epoch, level=level, message=message))

    def _result_csv(self) -> bytes:
        """OpenAI's result file: one line a step."""
        with session_scope() as session:
            steps = session.scalars(
                select(JobMetric).where(JobMetric.job_id == self.job.id).order_by(JobMetric.step)
            ).all()
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
        names = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
        writer.writerows([row.step, *(row.values.get(name, "") for name in names)] for row in steps)
        return out.getvalue().encode()

    # ------------------------------------------------------------ patience

    def guarded(self, write: Callable[[Any], T]) -> T:
        """Run a guarded write in a transaction of its own; a refused one means that the lease is gone."""

        def once() -> T:
            with session_scope() as session:
                return write(session)

        result = self.patiently(once)
        if not result:
            self.lease.lose()
            raise Lost(self.job.id)
        return result

    def patiently(self, act: Callable[[], T]) -> T:
        """Do it, waiting out servers that are down: 1 s, 2 s, … 15 s between tries, while the lease is ours."""
        wait = 1.0
        while True:
            self.lease.check()
            self.lease.progressed()
            try:
                return act()
            except storage.Fenced as fenced:
                self.lease.lose()
                raise Lost(self.job.id) from fenced
            except Unavailable as error:
                log.warning("server.unavailable", error=error.message, retry_in=wait)
            if self.draining() or self.lease.desired is Desired.CANCEL:
                raise Leave
            time.sleep(wait)
            wait = min(2 * wait, 15.0)


class Leave(Exception):
    """Let go of the job: its user or a draining worker asked for that, or this machine cannot go on."""

    def __init__(self, message: str | None = None, *, wait: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.wait = wait


class Stuck(Ended):
    """The trainer lives and gets nowhere."""
