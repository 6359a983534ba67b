"""Jobs as their users see them: submit, look up, list, cancel, pause and resume.

How states change is in `state_machine`, how a worker gets a job in `claims`, what the holder of a lease writes in
`attempts`. Must not touch S3, nor ring.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import Select, func, select, update
from sqlalchemy.orm import Session, joinedload

from shared.database import adapters
from shared.database.adapters import AdapterSource
from shared.database.base_models import get_base_model
from shared.database.files import get_usable_file
from shared.database.paging import Rows, keyset_rows
from shared.database.session import wait_for_lock
from shared.database.state_machine import LIVE, Reason, transition
from shared.database.tables import BaseModelRow, File, Job, JobEvent, JobMetric, Tenant
from shared.errors import Conflict, InvalidRequest, NotFound
from shared.ids import fine_tuned_name, new_id
from shared.schemas.requests import TERMINAL, Desired, JobCreate, Quantization, State
from shared.schemas.results import Metrics, Plan

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


# ---------------------------------------------------------------- what the sweeper asks


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
