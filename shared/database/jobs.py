"""The state machine of a job: what its states are, what users do to it, how a worker gets it.

Owns every change of state: `transition` is the only writer of `state`, one guarded UPDATE and one event row in the same
transaction. What the holder of a lease writes is in shared/database/attempts.py. Postgres's clock only. Must not touch S3, nor
ring.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, case, func, select, text, update
from sqlalchemy.orm import Session, joinedload

from shared.broker.queues import Queue
from shared.database import adapters
from shared.database.adapters import AdapterSource
from shared.database.base_models import get_base_model
from shared.database.files import get_usable_file
from shared.database.paging import Rows, keyset_rows
from shared.database.session import wait_for_lock
from shared.database.tables import BaseModelRow, File, Job, JobEvent, JobMetric, Tenant
from shared.errors import Conflict, InvalidRequest, NotFound
from shared.ids import fine_tuned_name, new_id
from shared.schemas.requests import TERMINAL, Desired, JobCreate, Phase, Quantization, State
from shared.schemas.results import Metrics, Plan

WAITING = {Queue.PREPARE: State.VALIDATING, Queue.TRAIN: State.QUEUED}
LIVE = frozenset(State) - TERMINAL
LEASABLE = frozenset({State.VALIDATING, State.RUNNING})


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
    OUT_OF_MEMORY = "out_of_memory"
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
    Reason.PREEMPTED: Move(LEASABLE, None, "info", "The attempt was given back; the job waits for the next"),
    Reason.CRASHED: Move(LEASABLE, None, "warn", "The attempt crashed; the job will be tried again"),
    Reason.OUT_OF_MEMORY: Move(LEASABLE, None, "warn", "The attempt was killed for its memory; the next takes less"),
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
        values |= {"lease_owner": None, "lease_expires_at": None, "phase": None, "rung_at": None, "ring_count": 0}
    guard = [Job.id == job_id, Job.state.in_(move.source)]
    if epoch is not None:
        guard += [Job.lease_epoch == epoch, Job.lease_owner.is_not(None)]
    moved = update(Job).where(*guard).values(state=target, reason=reason, event_seq=Job.event_seq + 1, **values)
    returning = moved.returning(Job.event_seq, Job.lease_epoch).execution_options(synchronize_session=False)
    now = session.execute(returning).one_or_none()
    if now is None:
        return False
    session.add(
        JobEvent(
            job_id=job_id,
            seq=now.event_seq,
            lease_epoch=now.lease_epoch,
            level=move.level,
            type="message",
            message=message or move.message,
        )
    )
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
    wait_for_lock(session, lock)
    earlier = _earlier(session, tenant_id, digest, idempotency_key, retry_window)
    if earlier is not None:
        return earlier, False
    base, start = _origin(session, tenant_id, request)
    lora = adapters.keep_shape(request.lora, start) if start is not None else request.lora
    if lora.use_dora and request.quantization is Quantization.INT8:
        # peft takes the norm of the whole weight in each forward, whose scales bitsandbytes lets go of in training.
        raise InvalidRequest('int8 bears no DoRA; allowed with it: "nf4" or "none"', param="quantization")
    if start is not None:
        body["lora"] = lora.model_dump(mode="json")
    method = request.method.type
    get_usable_file(session, tenant_id, request.training_file, method, "training_file")
    if request.validation_file is not None:
        get_usable_file(session, tenant_id, request.validation_file, method, "validation_file")
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
        start_name=start.name if start else None,
        start_prefix=start.prefix if start else None,
        start_sha256=start.sha256 if start else None,
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


def list_jobs(
    session: Session, tenant_id: str, *, metadata: Mapping[str, str] | None, after: str | None, limit: int
) -> Rows[Job]:
    """A page of the tenant's jobs, newest first, without dry runs.

    `metadata` keeps the jobs that have all these pairs; None keeps those that have no metadata.
    """
    query = jobs_of(tenant_id).where(Job.dry_run.is_(False))
    if metadata is None:
        query = query.where(Job.request["metadata"].as_string().is_(None))
    elif metadata:
        query = query.where(Job.request["metadata"].contains(dict(metadata)))
    return keyset_rows(session, query, Job.id, after=after, limit=limit)


def list_events(session: Session, job_id: str, *, after: int | None, limit: int) -> Rows[JobEvent]:
    """A page of a job's events, newest first; `after` is the sequence number of the last one seen."""
    query = select(JobEvent).where(JobEvent.job_id == job_id)
    return keyset_rows(session, query, JobEvent.seq, after=after, limit=limit)


def latest_plan(session: Session, tenant_id: str, *, training_file: str, base: str) -> Plan | None:
    """The plan of the tenant's newest job, or dry run, on this file and base model."""
    planned = (
        select(Job.plan)
        .where(
            Job.tenant_id == tenant_id,
            Job.training_file == training_file,
            Job.base_model == base,
            Job.plan.is_not(None),
        )
        .order_by(Job.id.desc())
        .limit(1)
    )
    found = session.scalar(planned)
    return None if found is None else Plan.model_validate(found)


def set_desired_state(session: Session, tenant_id: str, job_id: str, desired: Desired) -> Job:
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
    """The place in line by priority and age, from 1; None unless it waits. A tenant with less running may overtake."""
    if job.state != State.QUEUED:
        return None
    ahead = (Job.priority > job.priority) | ((Job.priority == job.priority) & (Job.created_at < job.created_at))
    count = select(func.count()).select_from(Job).where(Job.state == State.QUEUED, ahead)
    return (session.scalar(count) or 0) + 1


# ---------------------------------------------------------------- how a worker gets a job


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
        unpaced = Job.progress.op("||")(func.jsonb_build_object("seconds_per_step", None))
        values = lease | {"attempt": attempt, "phase": Phase.STAGING, "progress": unpaced}
        transition(session, job.id, Reason.CLAIMED, epoch=None, message=message, values=values)
    session.refresh(job)
    return job


class Inputs(NamedTuple):
    """The rows that a job trains from."""

    base: BaseModelRow
    training: File
    validation: File | None


def check_schema(session: Session) -> None:
    """Read the table of jobs. Raises, on leaving the scope, if the server or the schema is not there."""
    session.execute(select(Job.id).limit(1))


def inputs_of(session: Session, job: Job) -> Inputs:
    """The base model and the datasets of a job, deleted ones included: what a running job uses stays."""
    validation = session.get_one(File, job.validation_file) if job.validation_file else None
    return Inputs(session.get_one(BaseModelRow, job.base_model), session.get_one(File, job.training_file), validation)


def metrics_of(session: Session, job_id: str, *, last: int | None = None) -> list[Metrics]:
    """The recorded steps of a job in order; only the `last` ones if that is given."""
    rows = select(JobMetric).where(JobMetric.job_id == job_id).order_by(JobMetric.step.desc()).limit(last)
    return [Metrics.model_validate(row.values) for row in session.scalars(rows)][::-1]


def published_name(session: Session, job: Job) -> str:
    """The name that clients will use for the job's fine-tuned model."""
    tenant = session.get_one(Tenant, job.tenant_id)
    return fine_tuned_name(job.base_model, tenant.name, job.request.get("suffix"), job.id)


def disown(session: Session, owner: str) -> None:
    """Give back what was claimed for a slot that knows nothing of it: the answer to its claim was lost."""
    for job in session.scalars(select(Job).where(Job.lease_owner == owner).with_for_update()).all():
        transition(session, job.id, Reason.PREEMPTED, epoch=job.lease_epoch)


# ---------------------------------------------------------------- what the sweeper asks


def claimable(queue: Queue) -> list[ColumnElement[bool]]:
    """Which rows a worker of this queue could take, back-off aside. A paused dataset is still read, then it waits."""
    wanted = Job.desired_state == Desired.RUN if queue is Queue.TRAIN else Job.desired_state != Desired.CANCEL
    return [Job.state == WAITING[queue], Job.lease_owner.is_(None), wanted]


def expired() -> ColumnElement[bool]:
    """The lease has run out by Postgres's clock."""
    return Job.lease_owner.is_not(None) & (Job.lease_expires_at < func.clock_timestamp())


class Expired(NamedTuple):
    """A lease that has run out."""

    job_id: str
    epoch: int
    owner: str


def lock_expired(session: Session, *, limit: int) -> list[Expired]:
    """Lock jobs whose lease has run out. Rows that somebody else has locked are left for the next round."""
    rows = select(Job.id, Job.lease_epoch, Job.lease_owner).where(expired()).limit(limit)
    return [
        Expired(job_id, epoch, str(owner))
        for job_id, epoch, owner in session.execute(rows.with_for_update(skip_locked=True))
    ]


def to_ring_for(session: Session, queue: Queue, *, backoff: float, limit: int) -> Sequence[str]:
    """Claimable jobs that nobody was told of, or was told too long ago (`backoff` seconds, doubled with each ring).

    They count as told from here on: a worker that is woken must not find their rows locked.
    """
    waited = func.clock_timestamp() - Job.rung_at
    doublings = func.least(func.greatest(Job.ring_count - 1, 0), 5)
    patience = func.power(2, doublings) * text(f"interval '{backoff:f}s'")
    due = (
        select(Job.id)
        .where(
            *claimable(queue),
            Job.not_before <= func.clock_timestamp(),
            Job.rung_at.is_(None) | (waited > patience),
        )
        .order_by(Job.priority.desc(), Job.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    told = update(Job).where(Job.id.in_(due.scalar_subquery()))
    marked = told.values(rung_at=func.clock_timestamp(), ring_count=Job.ring_count + 1).returning(Job.id)
    return session.scalars(marked.execution_options(synchronize_session=False)).all()


def not_rung(session: Session, job_ids: Sequence[str]) -> None:
    """The broker was not told of these after all."""
    waiting = update(Job).where(Job.id.in_(job_ids), Job.lease_owner.is_(None))
    session.execute(waiting.values(rung_at=None))


def _origin(session: Session, tenant_id: str, request: JobCreate) -> tuple[BaseModelRow, AdapterSource | None]:
    """The base, and the adapter on it that training starts from, if any."""
    named = None if adapters.names_adapter(request.model) else get_base_model(session, request.model)
    start = adapters.adapter_source(session, tenant_id, request)
    return named or get_base_model(session, start.base if start else request.model), start


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
