"""An attempt at a job: everything that the holder of a lease may write.

Every write names the lease epoch. Zero rows updated means that the lease has moved on and the writer is a zombie, which
the functions report as False or None; it must then write nothing more, here or in the bucket. Postgres's clock only.
Must not touch S3 or Redis.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, cast, func, select, update
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session

from shared.database.claims import expired
from shared.database.state_machine import LEASABLE, MOVES, Reason, transition
from shared.database.tables import Adapter, Checkpoint, File, Job, JobEvent, JobMetric
from shared.ids import new_id
from shared.schemas.requests import Desired, Phase, State
from shared.schemas.results import JobError, Metrics, Plan, Report
from shared.storage import Entry

LONGEST_BACKOFF = 300.0
_LOSSES = {"training": "train_loss", "validation": "valid_loss"}


def renew(session: Session, job_id: str, epoch: int, *, lease_seconds: float) -> Desired | None:
    """Extend the lease and read what the user wants; None if the lease is no longer ours."""
    desired = session.scalar(
        _held(job_id, epoch).values(lease_expires_at=_in(lease_seconds)).returning(Job.desired_state)
    )
    return None if desired is None else Desired(desired)


def set_phase(session: Session, job_id: str, epoch: int, phase: Phase) -> bool:
    """Say what the job is doing now."""
    return session.scalar(_held(job_id, epoch).values(phase=phase).returning(Job.id)) is not None


def add_event(session: Session, job_id: str, epoch: int, *, level: str, message: str) -> bool:
    """Add a line to the job's events."""
    seq = session.scalar(_held(job_id, epoch).values(event_seq=Job.event_seq + 1).returning(Job.event_seq))
    if seq is None:
        return False
    session.add(JobEvent(job_id=job_id, seq=seq, lease_epoch=epoch, level=level, type="message", message=message))
    return True


def record_metrics(
    session: Session, job_id: str, epoch: int, batch: Sequence[Metrics], progress: dict[str, Any]
) -> bool:
    """Store a batch of steps, the last of them as an event too, as OpenAI shows them.

    A step and the evaluation after it come as two `Metrics` and make one row. `progress` gets the time: `at`, in Unix
    seconds, from which readers count the ETA down.
    """
    steps: dict[int, dict[str, Any]] = {}
    for metrics in batch:
        steps.setdefault(metrics.step, {}).update(metrics.model_dump(exclude_none=True))
    data = steps[batch[-1].step]
    dated = cast(progress, JSONB).op("||")(func.jsonb_build_object("at", func.extract("epoch", _in(0))))
    seq = session.scalar(
        _held(job_id, epoch).values(event_seq=Job.event_seq + 1, progress=dated).returning(Job.event_seq)
    )
    if seq is None:
        return False
    rows = [{"job_id": job_id, "step": step, "values": values} for step, values in steps.items()]
    merged = insert(JobMetric).values(rows)
    session.execute(
        merged.on_conflict_do_update(
            index_elements=["job_id", "step"], set_={"values": JobMetric.values.op("||")(merged.excluded["values"])}
        )
    )
    losses = [f"{name} loss={data[key]:.2f}" for name, key in _LOSSES.items() if key in data]
    message = f"Step {data['step']}/{data['total_steps']}: {', '.join(losses)}"
    session.add(
        JobEvent(job_id=job_id, seq=seq, lease_epoch=epoch, level="info", type="metrics", message=message, data=data)
    )
    return True


def add_checkpoint(
    session: Session, job_id: str, epoch: int, *, step: int, prefix: str, files: list[Entry], metrics: Metrics
) -> bool:
    """Make an uploaded checkpoint real. One of an earlier attempt at the same step gives way."""
    if session.scalar(_held(job_id, epoch).values(phase=Job.phase).returning(Job.id)) is None:
        return False
    row = {
        "id": new_id("ftckpt_"),
        "job_id": job_id,
        "step": step,
        "lease_epoch": epoch,
        "prefix": prefix,
        "files": files,
        "metrics": metrics.model_dump(exclude_none=True),
    }
    newer = insert(Checkpoint).values(**row)
    session.execute(
        newer.on_conflict_do_update(
            index_elements=["job_id", "step"],
            set_={k: newer.excluded[k] for k in ("lease_epoch", "prefix", "files", "metrics")}
            | {"deleted_at": None, "created_at": func.clock_timestamp()},
        )
    )
    return True


def finish_planning(session: Session, job_id: str, epoch: int, plan: Plan) -> State | None:
    """The dataset is good: queue the job, or end it where it was a dry run or its user has changed their mind."""
    job = lock_held_job(session, job_id, epoch)
    if job is None:
        return None
    reason = Reason.DRY_RUN if job.dry_run else Reason.PLANNED
    reason = {Desired.CANCEL: Reason.CANCELLED, Desired.PAUSE: Reason.PAUSED}.get(Desired(job.desired_state), reason)
    values: dict[str, Any] = {"plan": plan.model_dump(mode="json"), "queued_at": func.clock_timestamp()}
    return MOVES[reason].target if transition(session, job_id, reason, epoch=epoch, values=values) else None


def succeed(
    session: Session, job_id: str, epoch: int, *, report: Report, adapter: Adapter, result_file: File
) -> State | None:
    """End the job well, with its adapter and result file; a cancel that was accepted before wins."""
    job = lock_held_job(session, job_id, epoch)
    if job is None:
        return None
    if job.desired_state == Desired.CANCEL:
        return State.CANCELLED if transition(session, job_id, Reason.CANCELLED, epoch=epoch) else None
    session.add_all([adapter, result_file])
    session.flush()
    values = {"report": report.model_dump(mode="json"), "result_file": result_file.id}
    return State.SUCCEEDED if transition(session, job_id, Reason.COMPLETED, epoch=epoch, values=values) else None


def fail(session: Session, job_id: str, epoch: int, error: JobError) -> bool:
    """End the job for a reason that its user must mend; a cancel that was accepted before wins."""
    job = lock_held_job(session, job_id, epoch)
    if job is not None and job.desired_state == Desired.CANCEL:
        return transition(session, job_id, Reason.CANCELLED, epoch=epoch)
    values = {"error": error.model_dump(mode="json")}
    return transition(
        session, job_id, Reason.INVALID, epoch=epoch, message=f"The job failed: {error.message}", values=values
    )


def release(session: Session, job_id: str, epoch: int, *, message: str | None = None, wait: float = 0.0) -> bool:
    """Give the job back with its checkpoint: to its user's wish, or to the queue where the worker cannot go on.

    A job that is queued again is not claimed for `wait` seconds.
    """
    job = lock_held_job(session, job_id, epoch)
    if job is None:
        return False
    wish = _wish(job)
    if wish is not None:
        return transition(session, job_id, wish, epoch=epoch)
    again = {"preempt_count": Job.preempt_count + 1, "not_before": _in(wait)}
    return transition(session, job_id, Reason.PREEMPTED, epoch=epoch, message=message, values=again)


def step_down(session: Session, job_id: str, epoch: int) -> bool:
    """The kernel killed the attempt for its memory: the next one halves the micro-batch. No crash is counted."""
    job = lock_held_job(session, job_id, epoch)
    if job is None:
        return False
    less = {"fallback_level": Job.fallback_level + 1}
    return transition(session, job_id, _wish(job) or Reason.OUT_OF_MEMORY, epoch=epoch, values=less)


def crash(
    session: Session,
    job_id: str,
    epoch: int,
    error: JobError,
    *,
    backoff: float,
    max_crashes: int,
    silent: bool = False,
) -> bool:
    """Count a crash: try again after `backoff` seconds (doubled each time, five minutes at most), or end it as poison.

    `silent` is the sweeper's case, whose worker said nothing; it holds only while the lease has truly expired.
    """
    job = lock_held_job(session, job_id, epoch)
    if job is None or (silent and not session.scalar(select(Job.id).where(Job.id == job_id, expired()))):
        return False
    wish = _wish(job)
    if wish is not None:
        return transition(session, job_id, wish, epoch=epoch)
    crashes = job.crash_count + 1
    if crashes >= max_crashes:
        end: dict[str, Any] = {"error": error.model_dump(mode="json"), "crash_count": crashes}
        message = f"{MOVES[Reason.POISON].message} ({crashes} times): {error.message}"
        return transition(session, job_id, Reason.POISON, epoch=epoch, message=message, values=end)
    reason = Reason.LEASE_EXPIRED if silent else Reason.CRASHED
    message = f"{MOVES[reason].message}: {error.message}"
    again = {"crash_count": crashes, "not_before": _in(min(backoff * 2.0 ** min(crashes - 1, 60), LONGEST_BACKOFF))}
    return transition(session, job_id, reason, epoch=epoch, message=message, values=again)


def _held(job_id: str, epoch: int) -> Any:
    held = update(Job).where(Job.id == job_id, Job.lease_epoch == epoch, Job.lease_owner.is_not(None))
    return held.where(Job.state.in_(LEASABLE)).execution_options(synchronize_session=False)


def lock_held_job(session: Session, job_id: str, epoch: int) -> Job | None:
    held = select(Job).where(Job.id == job_id, Job.lease_epoch == epoch, Job.lease_owner.is_not(None))
    return session.scalar(held.with_for_update().execution_options(populate_existing=True))


def _in(seconds: float) -> ColumnElement[datetime]:
    return func.clock_timestamp() + timedelta(seconds=seconds)


def _wish(job: Job) -> Reason | None:
    """Where the user wants a job to go that its worker lets go of."""
    if job.desired_state == Desired.CANCEL:
        return Reason.CANCELLED
    return Reason.PAUSED if job.desired_state == Desired.PAUSE and job.state == State.RUNNING else None
