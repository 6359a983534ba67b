"""Run one attempt, top to bottom: claim, stage, run the trainer, record its events, publish, finish.

Owns: the order of effects. Files go to S3 first; a row that names our epoch then makes them official. A refused row
means that another attempt owns the job (`Lost`), and then nothing more is written. While a server is down, the attempt
waits under its lease: an outage is not the job's fault and not a crash. Nor is a full disk, which gives the job back.
Every gap between two effects is a named crash point (shared/failpoints.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from shared import storage
from shared.broker.doorbell import ring
from shared.broker.queues import Queue
from shared.database import attempts, checkpoints, claims, devices, jobs
from shared.database.session import Session, session_scope
from shared.database.tables import Adapter
from shared.errors import Unavailable
from shared.failpoints import Failpoint, failpoint
from shared.linux import boot_time
from shared.schemas.requests import Desired, JobCreate, Phase, State
from shared.schemas.results import JobError, Plan, Report
from shared.settings import get_settings
from shared.telemetry import bind, log, unbind
from worker import cache
from worker.attempt import exporting, publishing
from worker.attempt.lease import Lease, Lost
from worker.attempt.leased_job import LeasedJob, Outcome
from worker.attempt.staging import stage
from worker.attempt.waiting import TICK, Leave
from worker.child import trainer_pool
from worker.child.trainer_process import Died, Ended, TrainerProcess
from worker.trackers.supervisor import Tracking
from worker.trainer.protocol import (
    CheckpointSaved,
    Done,
    Exported,
    Failed,
    MakeExport,
    Measured,
    Notice,
    PhaseEntered,
    Prepare,
    Prepared,
    Stop,
    Stopped,
    Train,
    Verified,
    Verify,
    Working,
)
from worker.trainer.system.resource_errors import is_disk_full

KEPT_CHECKPOINTS = 3
TRACKER_SECONDS = 3.0  # of the 25 that a draining worker has
PUBLISHED = "published"  # the folder with the published files, downloaded again
#: The final events after which an attempt continues. A failed export is one: the job continues without it.
FinalEvent = Prepared | Done | Verified | Exported | Failed | None
PURPOSES = {Verify: trainer_pool.Purpose.PROOF, MakeExport: trainer_pool.Purpose.EXPORT}


def run_next(queue: Queue, *, owner: str, slot: int, draining: Callable[[], bool]) -> Outcome:
    """Claim the next job of this queue and run one attempt at it."""
    settings, claimed_at = get_settings(), boot_time()
    if not cache.has_room():
        return Outcome.UNABLE
    try:
        with session_scope() as session:
            claims.disown(session, owner)
            job = claims.claim(session, queue, owner=owner, lease_seconds=settings.lease_seconds)
    except Unavailable as error:
        log.warning("claim.failed", error=error.message)
        return Outcome.UNABLE
    if job is None:
        return Outcome.IDLE
    bind(job=job.id, epoch=job.lease_epoch, attempt=job.attempt)
    log.info("job.claimed", queue=queue)
    failpoint(Failpoint.AFTER_CLAIM)
    outcome = Outcome.DONE
    try:
        with ExitStack() as held, Lease(job.id, job.lease_epoch, claimed_at) as lease:
            # A pause does not interrupt reading a dataset, only training.
            leased = LeasedJob(job, lease, draining=draining, honours_pause=queue is Queue.TRAIN)
            _run_attempt(leased, queue, slot, held)
            outcome = leased.outcome
    except (Lost, Leave):
        log.warning("attempt.abandoned")
    finally:
        unbind("job", "epoch", "attempt")
    return outcome


def _run_attempt(leased: LeasedJob, queue: Queue, slot: int, held: ExitStack) -> None:
    """Run an attempt until the job has ended, is back in the queue, or has crashed and was counted."""
    job = leased.job
    try:
        request = JobCreate.model_validate(job.request)
        work_dir = held.enter_context(cache.work_dir(f"{job.id}-{leased.lease.epoch}"))
        integrations = (request.integrations or []) if queue is Queue.TRAIN else []
        tracking = Tracking(job, integrations, warn=leased.warn)
    except Exception as error:
        _settle(leased, error)
    else:
        Attempt(leased, queue, request, slot, work_dir=work_dir, tracking=tracking, held=held).run()


def _settle(leased: LeasedJob, error: Exception) -> None:
    """Give the job back, or count a crash, after an error. Raises `Lost` again: then the job is not ours to change."""
    if isinstance(error, Lost):
        raise error
    if isinstance(error, Leave):
        leased.release(error)
        return
    log.error("attempt.failed", exc_info=error)
    if is_disk_full(error):
        leased.release(leased.disk_full(str(error)))
        return
    message = f"{type(error).__name__}: {error}"
    leased.crash(JobError(code="internal_error", message=message, hint="the worker's log has the traceback"))


class Attempt:
    """One attempt: a job under its lease, and what the attempt uses on this machine."""

    def __init__(
        self,
        leased: LeasedJob,
        queue: Queue,
        request: JobCreate,
        slot: int,
        *,
        work_dir: Path,
        tracking: Tracking,
        held: ExitStack,
    ) -> None:
        self.leased = leased
        self.job = leased.job
        self.lease = leased.lease
        self.retry = leased.retry
        self.settings = leased.settings
        self.queue = queue
        self.request = request
        self.slot = slot
        self.work_dir = work_dir
        self.tracking = tracking
        self.held = held

    def run(self) -> None:
        """Stage, train and publish; whatever is raised ends as a release, a failed job or a crash."""
        try:
            command = stage(
                self.job,
                self.request,
                self.queue,
                work_dir=self.work_dir,
                held=self.held,
                retry=self.retry,
                add_event=self.leased.add_event,
            )
            failpoint(Failpoint.AFTER_STAGE)
            done = self.run_trainer(command)
            if isinstance(command, Train) and isinstance(done, Done):
                self.publish(command, done)
        except storage.Corrupt as corrupt:
            hint = "the bucket lost or changed this object: upload the dataset again, import the base model again, "
            hint += "or start from another adapter"
            self.fail_job(JobError(code="object_lost", message=str(corrupt), hint=hint))
        except Exception as error:
            _settle(self.leased, error)
        finally:
            self.tracking.end(lost=self.lease.is_lost(), wait=TRACKER_SECONDS if self.retry.is_draining() else 0.0)

    def run_trainer(self, command: Prepare | Train | Verify | MakeExport) -> FinalEvent:
        """Take a trainer, send it the command, and handle its events up to the final one.

        Returns the event after which the attempt continues. None means that the job has failed, crashed or gone back
        to the queue, and that the trainer is closed.
        """
        self.lease.wait_until_valid()
        purpose, final = PURPOSES.get(type(command), trainer_pool.Purpose.WORK), None
        trainer = trainer_pool.take(purpose, visible_device=cache.visible_device(self.slot))
        self.lease.guard(trainer)
        failpoint(Failpoint.AFTER_TRAINER_START)
        try:
            self.lease.wait_until_valid()
            trainer.send(command)
            final = self.listen(trainer, command)
            return final
        except Ended as end:
            trainer.kill()  # before the job is given back: a stuck trainer is still running
            self.lease.check()
            if isinstance(command, MakeExport):
                return Failed(job=self.job.id, code="trainer_crashed", message=str(end), retryable=True)
            if isinstance(end, Died) and end.out_of_memory and self.can_step_down():
                self.leased.flush()
                self.leased.write(attempts.step_down)
                return None
            code = "trainer_stuck" if isinstance(end, Stuck) else "trainer_crashed"
            hint = "see the last log lines"
            if isinstance(end, Died) and end.signal == "SIGKILL":
                hint += "; a smaller trainer.micro_batch or trainer.max_length needs less memory"
            lines = trainer.last_log_lines()
            self.leased.crash(JobError(code=code, message=str(end), hint=hint, last_log_lines=lines))
            return None
        finally:
            self.lease.guard(None)
            if final is None:
                trainer_pool.close(trainer)
            else:
                trainer_pool.keep(purpose, trainer)

    # ------------------------------------------------------------ listening

    def listen(  # noqa: PLR0912 (one branch an event)
        self, trainer: TrainerProcess, command: Prepare | Train | Verify | MakeExport
    ) -> FinalEvent:
        """Handle events until the final one, and obey the lease, the user and a drain meanwhile.

        A trainer that trains is asked to stop and gets time to save a checkpoint. Any other has nothing to save.
        """
        saves = isinstance(command, Train)
        asked = False
        while True:
            self.lease.check()
            if self.lease.desired is Desired.CANCEL:
                raise Leave
            if not saves and self.retry.stop_requested():
                raise Leave
            if not asked and self.retry.stop_requested():
                log.info("trainer.asked_to_stop")
                trainer.send(Stop(job=self.job.id))
                asked = True
            if asked and self.retry.must_stop():
                log.warning("trainer.stop_timed_out", seconds=self.settings.stop_seconds)
                raise Leave
            if self.lease.is_stuck():
                raise Stuck(f"the trainer made no progress for {self.settings.stuck_seconds:.0f} s")
            event = trainer.receive(timeout=TICK)
            if event is not None and event.job != self.job.id:
                continue  # a late event of the trainer's previous job
            if event is not None:
                self.lease.mark_progress()
            self.leased.flush_if_due()
            match event:
                case None | Working():
                    continue
                case PhaseEntered(phase=phase):
                    log.info("phase.entered", phase=phase)
                    self.leased.write(attempts.set_phase, phase)
                case Notice(level=level, message=message):
                    self.leased.add_event(level, message)
                case Measured(metrics=metrics):
                    self.leased.add_metrics(metrics, trainer.received_at)
                    self.tracking.add(metrics)
                case CheckpointSaved():
                    self.upload_checkpoint(event)
                case Prepared(plan=plan):
                    self.finish_planning(plan)
                    return event
                case Done() | Verified() | Exported():
                    self.leased.flush()
                    return event
                case Failed() if isinstance(command, MakeExport):
                    log.warning("export.failed", export=command.name, code=event.code, message=event.message)
                    return event
                case Stopped(step=step):
                    log.info("trainer.stopped", step=step)
                    raise Leave
                case Failed():
                    self.handle_failure(event, trainer)
                    return None

    def upload_checkpoint(self, event: CheckpointSaved) -> None:
        """Upload a checkpoint, commit its row, and delete the oldest checkpoints."""
        self.leased.flush()
        folder = Path(event.path)
        prefix = f"checkpoints/{self.job.tenant_id}/{self.job.id}/{self.lease.epoch}/{event.step}/"
        failpoint(Failpoint.BEFORE_CHECKPOINT_UPLOAD)
        files = self.retry.call(lambda: storage.put_folder(prefix, folder))
        failpoint(Failpoint.AFTER_CHECKPOINT_UPLOAD)
        self.leased.write(attempts.add_checkpoint, step=event.step, prefix=prefix, files=files, metrics=event.metrics)
        log.info("checkpoint.saved", step=event.step)
        failpoint(Failpoint.AFTER_CHECKPOINT_ROW)
        shutil.rmtree(folder)
        for dropped in self.retry.call(self._drop_checkpoints):
            self.retry.call(partial(storage.delete_prefix, dropped))

    def _drop_checkpoints(self) -> list[str]:
        with session_scope() as session:
            return checkpoints.drop_checkpoints(session, self.job.id, self.lease.epoch, keep=KEPT_CHECKPOINTS)

    def finish_planning(self, plan: Plan) -> None:
        """Store the plan of a valid dataset, queue the job, and ring for a training worker."""
        for warning in plan.warnings:
            self.leased.add_event("warn", warning)
        state = self.leased.write(attempts.finish_planning, plan)
        log.info("job.planned", state=state, rows=plan.rows, trained_tokens=plan.trained_tokens)
        failpoint(Failpoint.AFTER_PLAN)
        if state is State.QUEUED:
            ring(Queue.TRAIN)  # if the broker is down, the sweeper rings again

    def handle_failure(self, event: Failed, trainer: TrainerProcess) -> None:
        """Fail the job for a user's error, count a crash for any other; raise `Leave` for a full disk."""
        self.leased.flush()
        if event.code == "disk_full":
            raise self.leased.disk_full(event.message)
        error = JobError(
            code=event.code,
            message=event.message,
            param=event.param,
            hint=event.hint,
            step=event.step,
            last_log_lines=trainer.last_log_lines() if event.retryable else [],
        )
        log.warning("trainer.failed", code=event.code, message=event.message, retryable=event.retryable)
        if event.retryable:
            self.leased.crash(error)
        else:
            self.fail_job(error)

    def fail_job(self, error: JobError) -> None:
        """End the job for good. Trackers get their last chance to report a problem first."""
        self.tracking.last_call()
        self.leased.fail(error)

    def can_step_down(self) -> bool:
        """Return whether the plan has a fallback level below the job's, which needs less memory."""
        if not self.job.plan:
            return False
        return self.job.fallback_level < Plan.model_validate(self.job.plan).fallback_levels - 1

    # ------------------------------------------------------------ publishing

    def publish(self, trained: Train, done: Done) -> None:
        """Upload and verify the adapter, add exports and manifest, then mark the job `succeeded` in one transaction."""
        job, epoch = self.job, self.lease.epoch
        self.leased.write(attempts.set_phase, Phase.VERIFYING)
        failpoint(Failpoint.BEFORE_PUBLISH)
        prefix = f"adapters/{job.tenant_id}/{job.id}/"
        files = self.retry.call(lambda: storage.put_files(prefix, Path(done.path), epoch=epoch))
        failpoint(Failpoint.AFTER_ADAPTER_UPLOAD)
        verified = self.verify(trained, done, prefix, files)
        if verified is None:
            return  # the uploaded files are garbage if the job has ended, and are overwritten otherwise
        failpoint(Failpoint.AFTER_PROOF)
        loss = verified.proof.tuned.loss
        self.leased.add_event("info", f"the published adapter, downloaded and reloaded: loss {loss:.4f}")
        exported = self.export(trained, done, verified, prefix)
        failpoint(Failpoint.AFTER_EXPORTS)
        self.leased.write(attempts.set_phase, Phase.PUBLISHING)
        result = publishing.put_result(job, retry=self.retry)
        failpoint(Failpoint.AFTER_RESULT_UPLOAD)
        name = self.retry.call(self._name)
        sealed, signed_by = publishing.seal(
            prefix, files, job, name=name, verified=verified, exported=exported, epoch=epoch, retry=self.retry
        )
        failpoint(Failpoint.AFTER_MANIFEST)
        proof = verified.proof.model_dump(mode="json")

        def finish(session: Session, job_id: str, epoch: int) -> State | None:
            adapter = Adapter(
                job_id=job_id,
                tenant_id=job.tenant_id,
                name=name,
                base_model=job.base_model,
                prefix=prefix,
                files=sealed,
                bytes=sum(file["bytes"] for file in sealed),
                proof=proof,
                exports=[export.model_dump(mode="json") for export in exported.exports],
                signed_by=signed_by,
            )
            if done.report.fit is not None:
                devices.report(session, done.report.fit.device)
                devices.weigh(session, job, done.report.fit)
            file = publishing.result_row(job, result)
            return attempts.succeed(session, job_id, epoch, report=done.report, adapter=adapter, result_file=file)

        self.tracking.last_call()
        state = self.leased.write(finish)
        log.info("job.finished", state=state)
        failpoint(Failpoint.AFTER_FINISH)
        if state is State.SUCCEEDED:
            publishing.delete_strays(prefix, sealed, retry=self.retry)
        else:
            self.retry.call(lambda: storage.delete_prefix(prefix))
            self.retry.call(lambda: storage.delete(result.key))

    def verify(self, trained: Train, done: Done, prefix: str, files: list[storage.Entry]) -> Verified | None:
        """Download the published files, as any user would, and verify them in a process that has trained nothing.

        Returns None if they fail; the job has then ended or gone back to the queue.
        """
        folder = self.work_dir / PUBLISHED
        try:
            publishing.fetch_back(prefix, files, Path(done.path), folder, epoch=self.lease.epoch, retry=self.retry)
        except publishing.Damaged as damaged:
            hint = "the bucket returns other bytes than were uploaded: check the bucket and any proxy in front of it"
            self.leased.crash(JobError(code="adapter_corrupt", message=str(damaged), hint=hint))
            return None
        if not _fits_second_trainer(done.report):
            trainer_pool.dismiss(trainer_pool.Purpose.WORK)
        command = Verify(
            job=self.job.id,
            task=trained.task,
            recipe=trained.recipe,
            adapter_dir=str(folder),
            report=done.report,
            fallback_level=done.fallback_level,
        )
        final = self.run_trainer(command)
        return final if isinstance(final, Verified) else None

    def export(self, trained: Train, done: Done, verified: Verified, prefix: str) -> exporting.PublishedExports:
        """Make the exports that the user asked for, from the verified files."""
        if self.request.trainer.exports:
            self.leased.write(attempts.set_phase, Phase.EXPORTING)
            trainer_pool.make_room()
        return exporting.publish(
            exporting.commands(trained, done, verified, self.work_dir / PUBLISHED),
            prefix,
            make=self.run_trainer,
            add_event=self.leased.add_event,
            epoch=self.lease.epoch,
            retry=self.retry,
        )

    def _name(self) -> str:
        with session_scope() as session:
            return jobs.published_name(session, self.job)


def _fits_second_trainer(report: Report) -> bool:
    """Return whether the device has memory for another such run while this trainer keeps its base model loaded."""
    fit = report.fit
    return fit is not None and fit.measured_bytes + report.base_bytes <= fit.device.memory_bytes


class Stuck(Ended):
    """The trainer runs but makes no progress."""
