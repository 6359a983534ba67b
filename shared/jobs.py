"""The state machine of a job: submit, claim, renew, record, finish, reclaim.

Owns every write to the `jobs` row. `transition` is the only writer of `state`: one guarded UPDATE and one event row
in the same transaction. A worker's write names its lease epoch; zero rows updated means that the lease has moved on
and the worker is a zombie, which the functions below report as False or None. Postgres's clock only. Must not touch S3
or Redis.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, case, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, joinedload

from shared.errors import Conflict, InvalidRequest, NotFound
from shared.ids import new_id
from shared.models import Adapter, BaseModel, Checkpoint, File, Job, JobEvent, JobMetric
from shared.queue import Queue
from shared.schemas import TERMINAL, Desired, JobCreate, JobError, Metrics, Phase, Plan, Report, State
from shared.storage import Entry

WAITING = {Queue.PREPARE: State.VALIDATING, Queue.TRAIN: State.QUEUED}
LIVE = frozenset(State) - TERMINAL
LEASABLE = frozenset({State.VALIDATING, State.RUNNING})
_LOSSES = {"training": "train_loss", "validation": "valid_loss"}


class Reason(StrEnum):
    """Why a job is in its state. Stored; the state follows from it (see MOVES)."""

    PLANNED = "planned"
    CLAIMED = "claimed"
    COMPLETED = "completed"
    DRY_RUN = "dry_run"
    INVALID = "invalid"
    POISON = "poison"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    RESUMED = "resumed"
    PREEMPTED = "preempted"
    CRASHED = "crashed"
    LEASE_EXPIRED = "lease_expired"


class Move(NamedTuple):
    """From which states, to which; None is back to wait: `running → queued`, `validating_files` stays."""

    source: frozenset[State]
    target: State | None
    level: str
    message: str


MOVES = {
    Reason.PLANNED: Move(frozenset({State.VALIDATING}), State.QUEUED, "info", "Files validated, job queued"),
    Reason.DRY_RUN: Move(frozenset({State.VALIDATING}), State.CANCELLED, "info", "Dry run: planned, not trained"),
    Reason.CLAIMED: Move(frozenset({State.QUEUED}), State.RUNNING, "info", "Fine-tuning job started"),
    Reason.COMPLETED: Move(frozenset({State.RUNNING}), State.SUCCEEDED, "info", "The job has successfully completed"),
    Reason.INVALID: Move(LEASABLE, State.FAILED, "error", "The job failed"),
    Reason.POISON: Move(LEASABLE, State.FAILED, "error", "The job failed: it crashed too often"),
    Reason.CANCELLED: Move(LIVE, State.CANCELLED, "warn", "The job was cancelled"),
    Reason.PAUSED: Move(LIVE, State.PAUSED, "info", "The job was paused"),
    Reason.RESUMED: Move(frozenset({State.PAUSED}), State.QUEUED, "info", "The job was resumed"),
    Reason.PREEMPTED: Move(LEASABLE, None, "warn", "The worker is shutting down; the job goes on elsewhere"),
    Reason.CRASHED: Move(LEASABLE, None, "warn", "The attempt crashed; the job will be tried again"),
    Reason.LEASE_EXPIRED: Move(LEASABLE, None, "warn", "The worker fell silent; the job will be tried again"),
}


def transition(
    session: Session,
    job_id: str,
    reason: Reason,
    *,
    epoch: int | None,
    message: str | None = None,
    values: dict[str, Any] | None = None,
) -> bool:
    """Move a job as MOVES says and write the event; False if it was not in a state, or at an epoch, that allows it.

    Every move but a claim gives up the lease. `epoch=None` is for moves that no worker makes; `values` are columns to
    set beside the state.
    """
    move, values = MOVES[reason], dict(values or {})
    target: Any = move.target
    if target is None:
        target = case((Job.state == State.RUNNING, State.QUEUED), else_=Job.state)
    if move.target in TERMINAL:
        values["finished_at"] = func.clock_timestamp()
    if reason is not Reason.CLAIMED:
        values |= {"lease_owner": None, "lease_expires_at": None, "phase": None, "published_at": None, "ring_count": 0}
    guard = [Job.id == job_id, Job.state.in_(move.source)]
    if epoch is not None:
        guard.append(Job.lease_epoch == epoch)
    moved = update(Job).where(*guard).values(state=target, reason=reason, event_seq=Job.event_seq + 1, **values)
    seq = session.scalar(moved.returning(Job.event_seq).execution_options(synchronize_session=False))
    if seq is None:
        return False
    session.add(JobEvent(job_id=job_id, seq=seq, level=move.level, type="message", message=message or move.message))
    session.flush()
    return True


# ---------------------------------------------------------------- what users do


def submit(
    session: Session,
    tenant_id: str,
    request: JobCreate,
    *,
    idempotency_key: str | None = None,
    retry_window: float | None = None,
) -> tuple[Job, bool]:
    """The job for this request, and whether it is new.

    The same `idempotency_key` is the same job. `retry_window` (seconds; None for a first try) makes a retry of an
    identical body the same job too: the stock client retries by itself and sends no key. Both are decided under a lock.
    """
    body = request.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
    lock = f"{tenant_id} {idempotency_key or digest.hex()}"
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(lock, 0))))
    earlier = _earlier(session, tenant_id, digest, idempotency_key, retry_window)
    if earlier is not None:
        return earlier, False
    base = session.get(BaseModel, request.model)
    if base is None:
        names = ", ".join(session.scalars(select(BaseModel.name).order_by(BaseModel.name))) or "none yet"
        raise NotFound(
            f"base model {request.model!r} not found; allowed: {names}", param="model", code="model_not_found"
        )
    _usable_file(session, tenant_id, request.training_file, "training_file")
    if request.validation_file is not None:
        _usable_file(session, tenant_id, request.validation_file, "validation_file")
    job = Job(
        id=new_id("ftjob-"),
        tenant_id=tenant_id,
        base_model=base.name,
        training_file=request.training_file,
        validation_file=request.validation_file,
        request=body,
        request_sha256=digest,
        idempotency_key=idempotency_key,
        seed=request.seed if request.seed is not None else secrets.randbelow(2**31),
        dry_run=request.dry_run,
        state=State.VALIDATING,
        priority=request.priority,
        event_seq=1,
    )
    session.add(job)
    session.flush()
    created = f"Created fine-tuning job: {job.id}"
    session.add(JobEvent(job_id=job.id, seq=1, level="info", type="message", message=created))
    session.flush()
    return get_job(session, tenant_id, job.id), True


def get_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """The tenant's job; another tenant's is `NotFound` too."""
    job = session.scalar(jobs_of(tenant_id).where(Job.id == job_id))
    if job is None:
        raise NotFound(f"no fine-tuning job {job_id!r}; list yours with GET /v1/fine_tuning/jobs", param="id")
    return job


def jobs_of(tenant_id: str) -> Select[Job]:
    """The tenant's jobs with all that the wire object shows, read afresh."""
    shown = select(Job).options(joinedload(Job.tenant), joinedload(Job.adapter)).where(Job.tenant_id == tenant_id)
    return shown.execution_options(populate_existing=True)


def live_file() -> ColumnElement[bool]:
    """Neither deleted nor expired."""
    fresh = File.expires_at.is_(None) | (File.expires_at > func.clock_timestamp())
    return File.deleted_at.is_(None) & fresh


def ask(session: Session, tenant_id: str, job_id: str, desired: Desired) -> Job:
    """Cancel, pause or resume. A leased job's worker obeys within one heartbeat; any other job moves at once."""
    job = session.scalar(select(Job).where(Job.tenant_id == tenant_id, Job.id == job_id).with_for_update())
    if job is None or job.state in TERMINAL or (job.desired_state == Desired.CANCEL and desired is not Desired.CANCEL):
        found = get_job(session, tenant_id, job_id)
        what = found.state if found.state in TERMINAL else "already being cancelled"
        raise Conflict(f"job {job_id} is {what}; allowed: {', '.join(sorted(LIVE))}", code="job_not_active")
    session.execute(update(Job).where(Job.id == job_id).values(desired_state=desired))
    if job.lease_owner is None:
        _move_unleased(session, job, desired)
    return get_job(session, tenant_id, job_id)


def queue_position(session: Session, job: Job) -> int | None:
    """How many waiting jobs a worker would take before this one, plus one; None unless it waits."""
    if job.state != State.QUEUED:
        return None
    ahead = (Job.priority > job.priority) | ((Job.priority == job.priority) & (Job.created_at < job.created_at))
    count = select(func.count()).select_from(Job).where(Job.state == State.QUEUED, ahead)
    return (session.scalar(count) or 0) + 1


# ---------------------------------------------------------------- what workers do, each guarded by the epoch


def claim(session: Session, queue: Queue, *, owner: str, lease_seconds: float) -> Job | None:
    """Take the next job of a queue under a fresh lease: by priority, then the tenant with least running, then age."""
    running = (
        select(Job.tenant_id, func.count().label("n"))
        .where(Job.lease_owner.is_not(None), Job.state == State.RUNNING)  # the lease, because it is what is indexed
        .group_by(Job.tenant_id)
        .cte()
    )
    job = session.scalar(
        select(Job)
        .outerjoin(running, running.c.tenant_id == Job.tenant_id)
        .where(*claimable(queue), Job.not_before <= func.clock_timestamp())
        .order_by(Job.priority.desc(), func.coalesce(running.c.n, 0), Job.created_at, Job.id)
        .limit(1)
        .with_for_update(of=Job, skip_locked=True)
    )
    if job is None:
        return None
    lease: dict[str, Any] = {
        "lease_epoch": Job.lease_epoch + 1,
        "lease_owner": owner,
        "lease_expires_at": func.clock_timestamp() + timedelta(seconds=lease_seconds),
        "started_at": func.coalesce(Job.started_at, func.clock_timestamp()),
    }
    if queue is Queue.PREPARE:
        session.execute(update(Job).where(Job.id == job.id).values(**lease, phase=Phase.TOKENIZING))
    else:
        attempt = job.attempt + 1
        message = None if attempt == 1 else f"{MOVES[Reason.CLAIMED].message} (attempt {attempt})"
        values = lease | {"attempt": attempt, "phase": Phase.STAGING}
        transition(session, job.id, Reason.CLAIMED, epoch=None, message=message, values=values)
    session.refresh(job)
    return job


def renew(session: Session, job_id: str, epoch: int, *, lease_seconds: float) -> Desired | None:
    """Extend the lease and read what the user wants; None if the lease is no longer ours."""
    desired = session.scalar(
        _held(job_id, epoch)
        .values(lease_expires_at=func.clock_timestamp() + timedelta(seconds=lease_seconds))
        .returning(Job.desired_state)
    )
    return None if desired is None else Desired(desired)


def enter(session: Session, job_id: str, epoch: int, phase: Phase) -> bool:
    """Say what the job is doing now."""
    return session.scalar(_held(job_id, epoch).values(phase=phase).returning(Job.id)) is not None


def note(session: Session, job_id: str, epoch: int, *, level: str, message: str) -> bool:
    """Add a line to the job's events."""
    seq = session.scalar(_held(job_id, epoch).values(event_seq=Job.event_seq + 1).returning(Job.event_seq))
    if seq is None:
        return False
    session.add(JobEvent(job_id=job_id, seq=seq, level=level, type="message", message=message))
    return True


def record(session: Session, job_id: str, epoch: int, batch: Sequence[Metrics], progress: dict[str, Any]) -> bool:
    """Store a batch of steps, the last of them as an event too, as OpenAI shows them.

    A step and the evaluation after it come as two `Metrics` and make one row.
    """
    steps: dict[int, dict[str, Any]] = {}
    for metrics in batch:
        steps.setdefault(metrics.step, {}).update(metrics.model_dump(exclude_none=True))
    data = steps[batch[-1].step]
    seq = session.scalar(
        _held(job_id, epoch).values(event_seq=Job.event_seq + 1, progress=progress).returning(Job.event_seq)
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
    session.add(JobEvent(job_id=job_id, seq=seq, level="info", type="metrics", message=message, data=data))
    return True


def checkpointed(
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
            set_={k: newer.excluded[k] for k in ("lease_epoch", "prefix", "files", "metrics")} | {"deleted_at": None},
        )
    )
    return True


def latest_checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    """The job's live checkpoints, newest first."""
    live = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    return session.scalars(live.order_by(Checkpoint.step.desc())).all()


def drop_checkpoints(session: Session, job_id: str, epoch: int, *, keep: int) -> list[str]:
    """Retire all but the newest `keep` checkpoints; returns the prefixes whose objects may go."""
    if _locked(session, job_id, epoch) is None:
        return []
    old = [checkpoint.id for checkpoint in latest_checkpoints(session, job_id)[keep:]]
    dropped = update(Checkpoint).where(Checkpoint.id.in_(old)).values(deleted_at=func.clock_timestamp())
    return list(session.scalars(dropped.returning(Checkpoint.prefix)).all())


def planned(session: Session, job_id: str, epoch: int, plan: Plan) -> State | None:
    """The dataset is good: queue the job, or end it where it was a dry run or its user has changed their mind."""
    job = _locked(session, job_id, epoch)
    if job is None:
        return None
    reason = Reason.DRY_RUN if job.dry_run else Reason.PLANNED
    reason = {Desired.CANCEL: Reason.CANCELLED, Desired.PAUSE: Reason.PAUSED}.get(Desired(job.desired_state), reason)
    values: dict[str, Any] = {"plan": plan.model_dump(mode="json"), "queued_at": func.clock_timestamp()}
    return MOVES[reason].target if transition(session, job_id, reason, epoch=epoch, values=values) else None


def succeeded(
    session: Session, job_id: str, epoch: int, *, report: Report, adapter: Adapter, result_file: File
) -> State | None:
    """End the job well, with its adapter and result file; a cancel that was accepted before wins."""
    job = _locked(session, job_id, epoch)
    if job is None:
        return None
    if job.desired_state == Desired.CANCEL:
        return State.CANCELLED if transition(session, job_id, Reason.CANCELLED, epoch=epoch) else None
    session.add_all([adapter, result_file])
    session.flush()
    values = {"report": report.model_dump(mode="json"), "result_file": result_file.id}
    return State.SUCCEEDED if transition(session, job_id, Reason.COMPLETED, epoch=epoch, values=values) else None


def failed(session: Session, job_id: str, epoch: int, error: JobError) -> bool:
    """End the job for a reason that its user must mend."""
    values = {"error": error.model_dump(mode="json")}
    return transition(
        session, job_id, Reason.INVALID, epoch=epoch, message=f"The job failed: {error.message}", values=values
    )


def released(session: Session, job_id: str, epoch: int) -> bool:
    """Give the job back with its checkpoint: to its user's wish, or to the queue where the worker is draining."""
    job = _locked(session, job_id, epoch)
    if job is None:
        return False
    wish = _wish(job)
    if wish is not None:
        return transition(session, job_id, wish, epoch=epoch)
    return transition(session, job_id, Reason.PREEMPTED, epoch=epoch, values={"preempt_count": Job.preempt_count + 1})


def crashed(
    session: Session,
    job_id: str,
    epoch: int,
    error: JobError,
    *,
    backoff: float,
    max_crashes: int,
    silent: bool = False,
) -> bool:
    """Count a crash: try again after `backoff` seconds (doubled each time), or end the job as poison.

    `silent` is the sweeper's case, whose worker said nothing; it holds only while the lease has truly expired.
    """
    job = _locked(session, job_id, epoch)
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
    wait = func.clock_timestamp() + timedelta(seconds=backoff * 2 ** (crashes - 1))
    reason = Reason.LEASE_EXPIRED if silent else Reason.CRASHED
    message = f"{MOVES[reason].message}: {error.message}"
    again = {"crash_count": crashes, "not_before": wait}
    return transition(session, job_id, reason, epoch=epoch, message=message, values=again)


# ---------------------------------------------------------------- what the sweeper asks


def claimable(queue: Queue) -> list[ColumnElement[bool]]:
    """Which rows a worker of this queue could take, back-off aside."""
    return [Job.state == WAITING[queue], Job.lease_owner.is_(None), Job.desired_state == Desired.RUN]


def expired() -> ColumnElement[bool]:
    """The lease has run out by Postgres's clock."""
    return Job.lease_owner.is_not(None) & (Job.lease_expires_at < func.clock_timestamp())


def unrung(session: Session, queue: Queue, *, backoff: float, limit: int = 64) -> Sequence[str]:
    """Claimable jobs that nobody was told of, or was told too long ago (`backoff` seconds, doubled with each ring)."""
    waited = func.clock_timestamp() - Job.published_at
    doublings = func.least(func.greatest(Job.ring_count - 1, 0), 5)
    patience = func.power(2, doublings) * text(f"interval '{backoff:f}s'")
    due = Job.published_at.is_(None) | (waited > patience)
    return session.scalars(
        select(Job.id)
        .where(*claimable(queue), Job.not_before <= func.clock_timestamp(), due)
        .order_by(Job.priority.desc(), Job.created_at)
        .limit(limit)
    ).all()


def rung(session: Session, job_ids: Sequence[str]) -> None:
    """Remember that the broker was told of these."""
    told = update(Job).where(Job.id.in_(job_ids))
    session.execute(told.values(published_at=func.clock_timestamp(), ring_count=Job.ring_count + 1))


def _held(job_id: str, epoch: int) -> Any:
    held = update(Job).where(Job.id == job_id, Job.lease_epoch == epoch, Job.lease_owner.is_not(None))
    return held.where(Job.state.in_(LEASABLE)).execution_options(synchronize_session=False)


def _locked(session: Session, job_id: str, epoch: int) -> Job | None:
    held = select(Job).where(Job.id == job_id, Job.lease_epoch == epoch, Job.lease_owner.is_not(None))
    return session.scalar(held.with_for_update().execution_options(populate_existing=True))


def _wish(job: Job) -> Reason | None:
    """Where the user wants a job to go that its worker lets go of."""
    if job.desired_state == Desired.CANCEL:
        return Reason.CANCELLED
    return Reason.PAUSED if job.desired_state == Desired.PAUSE and job.state == State.RUNNING else None


def _move_unleased(session: Session, job: Job, desired: Desired) -> None:
    if desired is Desired.CANCEL:
        transition(session, job.id, Reason.CANCELLED, epoch=None)
    elif desired is Desired.PAUSE and job.state == State.QUEUED:
        transition(session, job.id, Reason.PAUSED, epoch=None)
    elif desired is Desired.RUN and job.state == State.PAUSED:
        transition(session, job.id, Reason.RESUMED, epoch=None)


def _earlier(
    session: Session, tenant_id: str, digest: bytes, idempotency_key: str | None, retry_window: float | None
) -> Job | None:
    if idempotency_key is not None:
        job = session.scalar(jobs_of(tenant_id).where(Job.idempotency_key == idempotency_key))
        if job is not None and job.request_sha256 != digest:
            raise Conflict(
                f"Idempotency-Key {idempotency_key!r} was used for job {job.id} with another body; use a new key",
                code="idempotency_key_reused",
            )
        return job
    if retry_window is None:
        return None
    recent = Job.created_at > func.clock_timestamp() - timedelta(seconds=retry_window)
    same = jobs_of(tenant_id).where(Job.request_sha256 == digest, Job.idempotency_key.is_(None), recent)
    return session.scalar(same.order_by(Job.created_at.desc()).limit(1))


def _usable_file(session: Session, tenant_id: str, file_id: str, param: str) -> None:
    """Locks the row against deletion until the job is there to need it."""
    mine = select(File).where(File.id == file_id, File.tenant_id == tenant_id, live_file())
    file = session.scalar(mine.with_for_update(read=True))
    if file is None:
        raise NotFound(f"no file {file_id!r}; upload one with POST /v1/files", param=param, code="file_not_found")
    if file.purpose != "fine-tune":
        raise InvalidRequest(f"file {file_id} has purpose {file.purpose!r}; allowed: 'fine-tune'", param=param)
