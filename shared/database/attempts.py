"""Everything that a worker writes to a job while it has the lease.

Every write names the lease epoch. If no row matches, the worker has lost its lease, and the function returns False or
None: the worker must then write nothing more, here or in the bucket. Times come from Postgres's clock.
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

#: Seconds.
LONGEST_BACKOFF = 300.0
_LOSSES = {"training": "train_loss", "validation": "valid_loss"}


def renew(session: Session, job_id: str, epoch: int, *, lease_seconds: float) -> Desired | None:
    """Extend the lease and return the state that the user wants; None if this worker has lost the lease."""
    desired = session.scalar(
        _update_leased(job_id, epoch).values(lease_expires_at=_from_now(lease_seconds)).returning(Job.desired_state)
    )
    return None if desired is None else Desired(desired)


def set_phase(session: Session, job_id: str, epoch: int, phase: Phase) -> bool:
    """Set the phase of the job."""
    return session.scalar(_update_leased(job_id, epoch).values(phase=phase).returning(Job.id)) is not None


def add_event(session: Session, job_id: str, epoch: int, *, level: str, message: str) -> bool:
    """Add a message to the job's events."""
    seq = session.scalar(_update_leased(job_id, epoch).values(event_seq=Job.event_seq + 1).returning(Job.event_seq))
    if seq is None:
        return False
    session.add(JobEvent(job_id=job_id, seq=seq, lease_epoch=epoch, level=level, type="message", message=message))
    return True


def record_metrics(
    session: Session, job_id: str, epoch: int, batch: Sequence[Metrics], progress: dict[str, Any]
) -> bool:
    """Store the metrics of a batch of steps, and the last step as an event in the form that OpenAI uses.

    A step and the evaluation after it are two `Metrics` and become one row. `progress` is stored with the current time
    as `at`, in Unix seconds; readers count the remaining time down from it.
    """
    steps: dict[int, dict[str, Any]] = {}
    for metrics in batch:
        steps.setdefault(metrics.step, {}).update(metrics.model_dump(exclude_none=True))
    data = steps[batch[-1].step]
    dated = cast(progress, JSONB).op("||")(func.jsonb_build_object("at", func.extract("epoch", _from_now(0))))
    seq = session.scalar(
        _update_leased(job_id, epoch).values(event_seq=Job.event_seq + 1, progress=dated).returning(Job.event_seq)
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
    """Record an uploaded checkpoint. It replaces one that an earlier attempt made at the same step."""
    if session.scalar(_update_leased(job_id, epoch).values(phase=Job.phase).returning(Job.id)) is None:
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
    """Store the plan of a validated job and queue it. A dry run ends here, as do a cancel and a pause.

    Returns the new state; None if this worker has lost the lease.
    """
    job = lock_leased_job(session, job_id, epoch)
    if job is None:
        return None
    reason = Reason.DRY_RUN if job.dry_run else Reason.PLANNED
    reason = {Desired.CANCEL: Reason.CANCELLED, Desired.PAUSE: Reason.PAUSED}.get(Desired(job.desired_state), reason)
    values: dict[str, Any] = {"plan": plan.model_dump(mode="json"), "queued_at": func.clock_timestamp()}
    return MOVES[reason].target if transition(session, job_id, reason, epoch=epoch, values=values) else None


def succeed(
    session: Session, job_id: str, epoch: int, *, report: Report, adapter: Adapter, result_file: File
) -> State | None:
    """End the job as succeeded, with its adapter and result file. A cancel accepted earlier takes precedence.

    Returns the new state; None if this worker has lost the lease.
    """
    job = lock_leased_job(session, job_id, epoch)
    if job is None:
        return None
    if job.desired_state == Desired.CANCEL:
        return State.CANCELLED if transition(session, job_id, Reason.CANCELLED, epoch=epoch) else None
    session.add_all([adapter, result_file])
    session.flush()
    values = {"report": report.model_dump(mode="json"), "result_file": result_file.id}
    return State.SUCCEEDED if transition(session, job_id, Reason.COMPLETED, epoch=epoch, values=values) else None


def fail(session: Session, job_id: str, epoch: int, error: JobError) -> bool:
    """End the job as failed, for a reason that its user must fix. A cancel accepted earlier takes precedence."""
    job = lock_leased_job(session, job_id, epoch)
    if job is not None and job.desired_state == Desired.CANCEL:
        return transition(session, job_id, Reason.CANCELLED, epoch=epoch)
    values = {"error": error.model_dump(mode="json")}
    return transition(
        session, job_id, Reason.INVALID, epoch=epoch, message=f"The job failed: {error.message}", values=values
    )


def release(session: Session, job_id: str, epoch: int, *, message: str | None = None, wait: float = 0.0) -> bool:
    """Release the job. It is cancelled or paused if its user wants that, and otherwise waits for another attempt.

    A job that waits is not claimed for `wait` seconds. No crash is counted.
    """
    job = lock_leased_job(session, job_id, epoch)
    if job is None:
        return False
    requested = _requested(job)
    if requested is not None:
        return transition(session, job_id, requested, epoch=epoch)
    again = {"preempt_count": Job.preempt_count + 1, "not_before": _from_now(wait)}
    return transition(session, job_id, Reason.PREEMPTED, epoch=epoch, message=message, values=again)


def step_down(session: Session, job_id: str, epoch: int) -> bool:
    """End an attempt that the kernel killed for lack of memory. The next one halves the micro-batch.

    No crash is counted.
    """
    job = lock_leased_job(session, job_id, epoch)
    if job is None:
        return False
    less = {"fallback_level": Job.fallback_level + 1}
    return transition(session, job_id, _requested(job) or Reason.OUT_OF_MEMORY, epoch=epoch, values=less)


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
    """Count a crash. The job waits for another attempt, or fails as poison at its `max_crashes`th crash.

    The next attempt starts after `backoff` seconds, doubled with each crash, at most LONGEST_BACKOFF. `silent` is for
    the sweeper, which reports a crash because the lease expired; then the call changes nothing unless it has.
    """
    job = lock_leased_job(session, job_id, epoch)
    if job is None or (silent and not session.scalar(select(Job.id).where(Job.id == job_id, expired()))):
        return False
    requested = _requested(job)
    if requested is not None:
        return transition(session, job_id, requested, epoch=epoch)
    crashes = job.crash_count + 1
    if crashes >= max_crashes:
        end: dict[str, Any] = {"error": error.model_dump(mode="json"), "crash_count": crashes}
        message = f"{MOVES[Reason.POISON].message} ({crashes} times): {error.message}"
        return transition(session, job_id, Reason.POISON, epoch=epoch, message=message, values=end)
    reason = Reason.LEASE_EXPIRED if silent else Reason.CRASHED
    message = f"{MOVES[reason].message}: {error.message}"
    wait = min(backoff * 2.0 ** min(crashes - 1, 60), LONGEST_BACKOFF)
    again = {"crash_count": crashes, "not_before": _from_now(wait)}
    return transition(session, job_id, reason, epoch=epoch, message=message, values=again)


def _update_leased(job_id: str, epoch: int) -> Any:
    """An UPDATE that matches the job only while this epoch has its lease."""
    leased = update(Job).where(Job.id == job_id, Job.lease_epoch == epoch, Job.lease_owner.is_not(None))
    return leased.where(Job.state.in_(LEASABLE)).execution_options(synchronize_session=False)


def lock_leased_job(session: Session, job_id: str, epoch: int) -> Job | None:
    """Lock the job and read it afresh; None if this epoch does not have its lease."""
    leased = select(Job).where(Job.id == job_id, Job.lease_epoch == epoch, Job.lease_owner.is_not(None))
    return session.scalar(leased.with_for_update().execution_options(populate_existing=True))


def _from_now(seconds: float) -> ColumnElement[datetime]:
    return func.clock_timestamp() + timedelta(seconds=seconds)


def _requested(job: Job) -> Reason | None:
    """The move that the user has requested for a job whose worker releases it."""
    if job.desired_state == Desired.CANCEL:
        return Reason.CANCELLED
    return Reason.PAUSED if job.desired_state == Desired.PAUSE and job.state == State.RUNNING else None
