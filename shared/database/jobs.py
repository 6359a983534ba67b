"""What users do with jobs: submit, look up, list, cancel, pause and resume. Also what a worker reads of its job.

Owns: which requests are the same job. State changes are in `state_machine`, claims in `claims`, and the writes of a
worker with a lease in `attempts`. Must not touch S3. Must not ring (shared/broker/doorbell.py does).
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
    """Create the job for this request, or find the one that an earlier identical request created.

    Returns the job and whether it is new. Two requests with the same `idempotency_key` are the same job. With
    `retry_window` (seconds; None for a first try), a retry of an identical body is the same job too, because the
    official `openai` client retries by itself and sends no key. An advisory lock makes concurrent requests wait for
    each other. Raises NotFound, InvalidRequest, and Conflict if the key was used for another body.
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
        # peft computes the norm of the whole weight in each forward pass. That needs an int8 weight's scales, which
        # bitsandbytes drops during training.
        raise InvalidRequest('DoRA is not supported with int8; allowed: "nf4" or "none"', param="quantization")
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
    """Return the tenant's job. Raises NotFound, also for another tenant's job."""
    job = session.scalar(jobs_of(tenant_id).where(Job.id == job_id))
    if job is None:
        raise NotFound(f"no fine-tuning job {job_id!r}; list yours with GET /v1/fine_tuning/jobs", param="id")
    return job


def jobs_of(tenant_id: str) -> Select[Job]:
    """A query for the tenant's jobs with all that the API shows of them. It refreshes objects that the session has."""
    shown = select(Job).options(joinedload(Job.tenant), joinedload(Job.adapter)).where(Job.tenant_id == tenant_id)
    return shown.execution_options(populate_existing=True)


def list_jobs(
    session: Session, tenant_id: str, *, metadata: Mapping[str, str] | None, after: str | None, limit: int
) -> Rows[Job]:
    """Return a page of the tenant's jobs, newest first, without dry runs.

    `metadata` selects the jobs that have all these pairs (an empty mapping selects all jobs); None selects the jobs
    without metadata.
    """
    query = jobs_of(tenant_id).where(Job.dry_run.is_(False))
    if metadata is None:
        query = query.where(Job.request["metadata"].as_string().is_(None))
    elif metadata:
        query = query.where(Job.request["metadata"].contains(dict(metadata)))
    return keyset_rows(session, query, Job.id, after=after, limit=limit)


def list_events(session: Session, job_id: str, *, after: int | None, limit: int) -> Rows[JobEvent]:
    """Return a page of a job's events, newest first. `after` is the `seq` of the last event on the page before."""
    query = select(JobEvent).where(JobEvent.job_id == job_id)
    return keyset_rows(session, query, JobEvent.seq, after=after, limit=limit)


def latest_plan(session: Session, tenant_id: str, *, training_file: str, base: str) -> Plan | None:
    """Return the plan of the tenant's newest job or dry run on this file and base model, if one was planned."""
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
    """Cancel, pause or resume a job.

    A job that a worker has leased moves when the worker sees the request, within one heartbeat. Any other job moves at
    once. Raises NotFound, and Conflict if the job has ended or is already being cancelled.
    """
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
    """The job's place in the queue by priority and age, from 1; None if it is not queued.

    Claims also prefer tenants with fewer running jobs, so a job behind this one may start first.
    """
    if job.state != State.QUEUED:
        return None
    ahead = (Job.priority > job.priority) | ((Job.priority == job.priority) & (Job.created_at < job.created_at))
    count = select(func.count()).select_from(Job).where(Job.state == State.QUEUED, ahead)
    return (session.scalar(count) or 0) + 1


# ---------------------------------------------------------------- what a worker reads


class Inputs(NamedTuple):
    """The rows of a job's base model and datasets."""

    base: BaseModelRow
    training: File
    validation: File | None


def check_schema(session: Session) -> None:
    """Read the table of jobs, to check that the server and the schema are there. Errors appear as from any query."""
    session.execute(select(Job.id).limit(1))


def inputs_of(session: Session, job: Job) -> Inputs:
    """Return the base model and datasets of a job, including deleted ones: a running job keeps its inputs."""
    validation = session.get_one(File, job.validation_file) if job.validation_file else None
    return Inputs(session.get_one(BaseModelRow, job.base_model), session.get_one(File, job.training_file), validation)


def metrics_of(session: Session, job_id: str, *, last: int | None = None) -> list[Metrics]:
    """Return the recorded steps of a job in order, or only the `last` ones."""
    rows = select(JobMetric).where(JobMetric.job_id == job_id).order_by(JobMetric.step.desc()).limit(last)
    return [Metrics.model_validate(row.values) for row in session.scalars(rows)][::-1]


def published_name(session: Session, job: Job) -> str:
    """Return the name that the job's fine-tuned model will have."""
    tenant = session.get_one(Tenant, job.tenant_id)
    return fine_tuned_name(job.base_model, tenant.name, job.request.get("suffix"), job.id)


def _origin(session: Session, tenant_id: str, request: JobCreate) -> tuple[BaseModelRow, AdapterSource | None]:
    """Return the base model, and the adapter that training starts from, if any."""
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
    """Find the job that an earlier identical request created. Raises Conflict if the key came with another body."""
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
