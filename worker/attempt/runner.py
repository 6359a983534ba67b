"""One attempt, top to bottom: claim, stage, run the trainer, record what it says, publish, finish.

Owns the order of effects. Files go to S3 first and become real by a row, which names our epoch; a row that is refused
means that the lease moved on (`Lost`), and then nothing more is written. A server that is down is waited for, under the
lease: an outage is not the job's fault and is no crash; nor is a full disk, which gives the job back. Every gap between
two effects is a named crash point (shared/failpoints.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from shared import storage
from shared.broker.doorbell import ring
from shared.broker.queues import Queue
from shared.database import attempts, checkpoints, claims, devices, jobs
from shared.database.session import session_scope
from shared.database.tables import Adapter, Job
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

RECORD_EVERY = 1.0
KEPT_CHECKPOINTS = 3
TRACKER_SECONDS = 3.0  # of the 25 that a draining worker has
PUBLISHED = "published"  # what lies in the bucket, fetched back
#: What an attempt goes on from. An export that failed is one of these: the job goes on without it.
LastWord = Prepared | Done | Verified | Exported | Failed | None
PURPOSES = {Verify: trainer_pool.Purpose.PROOF, MakeExport: trainer_pool.Purpose.EXPORT}


def run_next(queue: Queue, *, owner: str, slot: int, draining: Callable[[], bool]) -> Outcome:
    """Claim one job of this queue and see it through."""
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
            attempt = Attempt(job, lease, queue, draining, held)
            attempt.run(slot)
            outcome = attempt.outcome
    except (Lost, Leave):
        log.warning("job.left")
    finally:
        unbind("job", "epoch", "attempt")
    return outcome


class Attempt(LeasedJob):
    """The state of one attempt: its job under its lease, and what it holds on this machine."""

    def __init__(self, job: Job, lease: Lease, queue: Queue, draining: Callable[[], bool], held: ExitStack) -> None:
        # A paused dataset is still read.
        super().__init__(job, lease, draining=draining, heeds_pause=queue is Queue.TRAIN)
        self.queue = queue
        self.held = held

    def run(self, slot: int) -> None:
        """See the job to its end, back to the queue, or to a counted crash, whatever happens here."""
        try:
            self.request = JobCreate.model_validate(self.job.request)
            self.work_dir = self.held.enter_context(cache.work_dir(f"{self.job.id}-{self.lease.epoch}"))
            if self.queue is Queue.TRAIN:
                self.tracking = Tracking(self.job, self.request.integrations or [], complain=self.complain)
            command = stage(
                self.job,
                self.request,
                self.queue,
                work_dir=self.work_dir,
                held=self.held,
                patience=self.patience,
                tell=self.tell,
            )
            failpoint(Failpoint.AFTER_STAGE)
            done = self.talk(command, slot)
            if isinstance(command, Train) and isinstance(done, Done):
                self.publish(command, done, slot)
        except Leave as leave:
            self.release(leave)
        except Lost:
            raise
        except storage.Corrupt as lost:
            hint = "the bucket has lost or changed it: upload the dataset again, have the base model imported again, "
            hint += "or start from another adapter"
            self.end(JobError(code="object_lost", message=str(lost), hint=hint))
        except Exception as error:
            log.exception("attempt.broke")
            if is_disk_full(error):
                self.release(self.no_room(str(error)))
                return
            message = f"{type(error).__name__}: {error}"
            self.crash(JobError(code="internal_error", message=message, hint="the worker's log has the traceback"))
        finally:
            self.tracking.end(lost=self.lease.is_lost(), wait=TRACKER_SECONDS if self.patience.is_draining() else 0.0)

    def talk(self, command: Prepare | Train | Verify | MakeExport, slot: int) -> LastWord:
        """Take a trainer, tell it what to do, and listen until it has had its last word.

        Returns what there is to go on from; any other end has been dealt with, and the trainer is gone.
        """
        self.lease.hold()
        purpose, said = PURPOSES.get(type(command), trainer_pool.Purpose.WORK), None
        session = trainer_pool.take(purpose, visible_device=cache.visible_device(slot))
        self.lease.guard(session)
        failpoint(Failpoint.AFTER_TRAINER_START)
        try:
            self.lease.hold()
            session.send(command)
            said = self.listen(session, command)
            return said
        except Ended as end:
            session.kill()  # before the job is given up: one that is stuck lives
            self.lease.check()
            if isinstance(command, MakeExport):
                return Failed(job=self.job.id, code="trainer_crashed", message=str(end), retryable=True)
            if isinstance(end, Died) and end.out_of_memory and self.can_shrink():
                self.flush()
                self.guarded(lambda s: attempts.step_down(s, self.job.id, self.lease.epoch))
                return None
            code = "trainer_stuck" if isinstance(end, Stuck) else "trainer_crashed"
            hint = "the last log lines tell more"
            if isinstance(end, Died) and end.signal == "SIGKILL":
                hint += "; a smaller trainer.micro_batch or trainer.max_length needs less memory"
            lines = session.last_log_lines()
            self.crash(JobError(code=code, message=str(end), hint=hint, last_log_lines=lines))
            return None
        finally:
            self.lease.guard(None)
            if said is None:
                trainer_pool.close(session)
            else:
                trainer_pool.keep(purpose, session)

    # ------------------------------------------------------------ listening

    def listen(  # noqa: PLR0912 (one branch an event)
        self, session: TrainerProcess, command: Prepare | Train | Verify | MakeExport
    ) -> LastWord:
        """Obey the lease and the user, and take in events until one of them is the last.

        A trainer that trains is asked to stop and given time; of any other nothing would be kept.
        """
        saves = isinstance(command, Train)
        asked = False
        while True:
            self.lease.check()
            if self.lease.desired is Desired.CANCEL:
                raise Leave
            if not saves and self.patience.is_asked_to_leave():
                raise Leave
            if not asked and self.patience.is_asked_to_leave():
                log.info("trainer.asked_to_stop")
                session.send(Stop(job=self.job.id))
                asked = True
            if asked and self.patience.is_over():
                log.warning("trainer.too_slow", seconds=self.settings.stop_seconds)
                raise Leave
            if self.lease.is_stuck():
                raise Stuck(f"the trainer got nowhere for {self.settings.stuck_seconds:.0f} s")
            event = session.receive(timeout=TICK)
            if event is not None and event.job != self.job.id:
                continue  # a straggler of the work before
            if event is not None:
                self.lease.progressed()
            if self.pending and time.monotonic() - self.recorded_at >= RECORD_EVERY:
                self.flush()
            match event:
                case None | Working():
                    continue
                case PhaseEntered(phase=phase):
                    log.info("phase.entered", phase=phase)
                    self.enter(phase)
                case Notice(level=level, message=message):
                    self.tell(level, message)
                case Measured(metrics=metrics):
                    self.pace.note(metrics, session.heard_at)
                    self.pending.append(metrics)
                    self.tracking.note(metrics)
                case CheckpointSaved():
                    self.keep(event)
                case Prepared(plan=plan):
                    self.plan(plan)
                    return event
                case Done() | Verified() | Exported():
                    self.flush()
                    return event
                case Failed() if isinstance(command, MakeExport):
                    log.warning("export.failed", export=command.name, code=event.code, message=event.message)
                    return event
                case Stopped(step=step):
                    log.info("trainer.stopped", step=step)
                    raise Leave
                case Failed():
                    self.fail(event, session)
                    return None

    def keep(self, event: CheckpointSaved) -> None:
        """Upload a checkpoint, make it real, let the oldest go."""
        self.flush()
        folder, epoch = Path(event.path), self.lease.epoch
        prefix = f"checkpoints/{self.job.tenant_id}/{self.job.id}/{epoch}/{event.step}/"
        failpoint(Failpoint.BEFORE_CHECKPOINT_UPLOAD)
        files = self.patience.do(lambda: storage.put_folder(prefix, folder))
        failpoint(Failpoint.AFTER_CHECKPOINT_UPLOAD)
        self.guarded(
            lambda s: attempts.add_checkpoint(
                s, self.job.id, epoch, step=event.step, prefix=prefix, files=files, metrics=event.metrics
            )
        )
        log.info("checkpoint.saved", step=event.step)
        failpoint(Failpoint.AFTER_CHECKPOINT_ROW)
        shutil.rmtree(folder)
        for old in self.patience.do(self._retired):
            self.patience.do(partial(storage.delete_prefix, old))

    def _retired(self) -> list[str]:
        with session_scope() as session:
            return checkpoints.drop_checkpoints(session, self.job.id, self.lease.epoch, keep=KEPT_CHECKPOINTS)

    # ------------------------------------------------------------ endings

    def plan(self, plan: Plan) -> None:
        """The dataset is good: queue the job and ring for a trainer."""
        for warning in plan.warnings:
            self.tell("warn", warning)
        state = self.guarded(lambda s: attempts.finish_planning(s, self.job.id, self.lease.epoch, plan))
        log.info("job.planned", state=state, rows=plan.rows, trained_tokens=plan.trained_tokens)
        failpoint(Failpoint.AFTER_PLAN)
        if state is State.QUEUED:
            ring(Queue.TRAIN)  # unheard, the sweeper rings again

    def publish(self, trained: Train, done: Done, slot: int) -> None:
        """Adapter up, back again and proven; its manifest; then one transaction that makes the job `succeeded`."""
        job, epoch = self.job, self.lease.epoch
        self.enter(Phase.VERIFYING)
        failpoint(Failpoint.BEFORE_PUBLISH)
        prefix = f"adapters/{job.tenant_id}/{job.id}/"
        files = self.patience.do(lambda: storage.put_files(prefix, Path(done.path), epoch=epoch))
        failpoint(Failpoint.AFTER_ADAPTER_UPLOAD)
        verified = self.prove(trained, done, prefix, files, slot)
        if verified is None:
            return  # what lies in the bucket is garbage once the job has ended, and is written over otherwise
        failpoint(Failpoint.AFTER_PROOF)
        self.tell("info", f"the published adapter, fetched back and loaded anew: loss {verified.proof.tuned.loss:.4f}")
        exported = self.export(trained, done, verified, prefix, slot)
        failpoint(Failpoint.AFTER_EXPORTS)
        self.enter(Phase.PUBLISHING)
        result = publishing.put_result(job, patience=self.patience)
        failpoint(Failpoint.AFTER_RESULT_UPLOAD)
        name = self.patience.do(self._name)
        sealed, signed_by = publishing.seal(
            prefix, files, job, name=name, verified=verified, exported=exported, epoch=epoch, patience=self.patience
        )
        failpoint(Failpoint.AFTER_MANIFEST)
        proof = verified.proof.model_dump(mode="json")

        def finish(session: Any) -> State | None:
            adapter = Adapter(
                job_id=job.id,
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
            return attempts.succeed(session, job.id, epoch, report=done.report, adapter=adapter, result_file=file)

        self.tracking.last_call()
        state = self.guarded(finish)
        log.info("job.finished", state=state)
        failpoint(Failpoint.AFTER_FINISH)
        if state is State.SUCCEEDED:
            publishing.drop_strays(prefix, sealed, patience=self.patience)
        else:
            self.patience.do(lambda: storage.delete_prefix(prefix))
            self.patience.do(lambda: storage.delete(result.key))

    def prove(self, trained: Train, done: Done, prefix: str, files: list[storage.Entry], slot: int) -> Verified | None:
        """The published bytes, as anybody would get them, before a process that has trained nothing.

        None, with the job ended or given back, where they do not stand.
        """
        folder = self.work_dir / PUBLISHED
        try:
            publishing.fetch_back(
                prefix, files, Path(done.path), folder, epoch=self.lease.epoch, patience=self.patience
            )
        except publishing.Damaged as damaged:
            hint = "the bucket changes what is put there: check it, and what lies between"
            self.crash(JobError(code="adapter_corrupt", message=str(damaged), hint=hint))
            return None
        if not _has_room_for_another(done.report):
            trainer_pool.dismiss(trainer_pool.Purpose.WORK)
        command = Verify(
            job=self.job.id,
            task=trained.task,
            recipe=trained.recipe,
            adapter_dir=str(folder),
            report=done.report,
            fallback_level=done.fallback_level,
        )
        said = self.talk(command, slot)
        return said if isinstance(said, Verified) else None

    def export(self, trained: Train, done: Done, verified: Verified, prefix: str, slot: int) -> exporting.Published:
        """The further forms that the user asked for, of the bytes that were proven."""
        if self.request.trainer.exports:
            self.enter(Phase.EXPORTING)
            trainer_pool.make_room()

        commands = exporting.commands(trained, done, verified, self.work_dir / PUBLISHED)
        make, epoch = partial(self.talk, slot=slot), self.lease.epoch
        return exporting.publish(commands, prefix, make=make, tell=self.tell, epoch=epoch, patience=self.patience)

    def can_shrink(self) -> bool:
        """Whether the plan has a fallback level below the job's, which needs less memory."""
        if not self.job.plan:
            return False
        return self.job.fallback_level < Plan.model_validate(self.job.plan).fallback_levels - 1

    def _name(self) -> str:
        with session_scope() as session:
            return jobs.published_name(session, self.job)

    def fail(self, event: Failed, session: TrainerProcess) -> None:
        """A user's error ends the job; any other is a crash, and counted; a full disk is neither."""
        self.flush()
        if event.code == "disk_full":
            raise self.no_room(event.message)
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


def _has_room_for_another(report: Report) -> bool:
    """Beside a trainer that keeps its base, as much as that run took?"""
    fit = report.fit
    return fit is not None and fit.measured_bytes + report.base_bytes <= fit.device.memory_bytes


class Stuck(Ended):
    """The trainer lives and gets nowhere."""
