"""`/v1/fine_tuning/jobs`: create, list, retrieve, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request

from api.deps import BellDep, SessionDep, TenantDep
from api.paging import page
from api.present import checkpoint_out, event_out, job_out
from shared.broker.queues import Queue
from shared.database import checkpoints, jobs
from shared.database.session import after_commit
from shared.database.tables import Job
from shared.errors import InvalidRequest
from shared.failpoints import Failpoint, failpoint
from shared.ids import fine_tuned_name
from shared.schemas.requests import Desired, JobCreate
from shared.schemas.responses import Checkpoint as CheckpointOut
from shared.schemas.responses import Event, Page
from shared.schemas.responses import Job as JobOut
from shared.settings import get_settings

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
Limit = Annotated[int, Query(ge=1, le=100)]
_METADATA = re.compile(r"metadata\[(.{1,64})\]")
_EVENT_ID = re.compile(r"ftevent-[0-9a-f]{30}-(\d{1,18})")


@router.post("")
def create_job(
    body: JobCreate,
    tenant: TenantDep,
    session: SessionDep,
    bell: BellDep,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    x_stainless_retry_count: Annotated[int, Header()] = 0,
) -> JobOut:
    """Create a fine-tuning job. Returns once it is committed to Postgres, even if the broker is down.

    A repeated request with the same `Idempotency-Key` returns the same job. So does an automatic retry by the official
    client: an identical body sent again within five minutes, marked by `x-stainless-retry-count`.
    """
    _check_integrations(body)
    window = get_settings().retry_window_seconds if x_stainless_retry_count > 0 else None
    job, new = jobs.submit(session, tenant.id, body, idempotency_key=idempotency_key, retry_window=window)
    if new:
        failpoint(Failpoint.BEFORE_SUBMIT_COMMIT)
        after_commit(session, lambda: failpoint(Failpoint.AFTER_SUBMIT_COMMIT))
        after_commit(session, lambda: bell.ring(Queue.PREPARE))
    return _job_out(session, job)


@router.get("")
def list_jobs(
    request: Request, tenant: TenantDep, session: SessionDep, after: str | None = None, limit: Limit = 20
) -> Page[JobOut]:
    """List your jobs, newest first, without dry runs.

    `metadata[k]=v` keeps the jobs with this pair, `metadata=null` those without metadata.
    """
    metadata: dict[str, str] | None = {}
    for key, value in request.query_params.multi_items():
        if (match := _METADATA.fullmatch(key)) and metadata is not None:
            metadata[match.group(1)] = value
        elif key == "metadata" and value == "null":
            metadata = None
    found = jobs.list_jobs(session, tenant.id, metadata=metadata, after=after, limit=limit)
    return page(found, lambda job: _job_out(session, job))


@router.get("/{job_id}")
def retrieve_job(job_id: str, tenant: TenantDep, session: SessionDep) -> JobOut:
    """Return one job with its phase, queue position, progress, plan, report and adapter."""
    return _job_out(session, jobs.get_job(session, tenant.id, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, tenant: TenantDep, session: SessionDep) -> JobOut:
    """Cancel a job: at once if no worker has it, otherwise within one heartbeat of its worker."""
    return _job_out(session, jobs.set_desired_state(session, tenant.id, job_id, Desired.CANCEL))


@router.post("/{job_id}/pause")
def pause_job(job_id: str, tenant: TenantDep, session: SessionDep) -> JobOut:
    """Pause a job. A running job saves a checkpoint and frees its worker slot."""
    return _job_out(session, jobs.set_desired_state(session, tenant.id, job_id, Desired.PAUSE))


@router.post("/{job_id}/resume")
def resume_job(job_id: str, tenant: TenantDep, session: SessionDep, bell: BellDep) -> JobOut:
    """Resume a paused job from its last checkpoint."""
    job = jobs.set_desired_state(session, tenant.id, job_id, Desired.RUN)
    after_commit(session, lambda: bell.ring(Queue.TRAIN))
    return _job_out(session, job)


@router.get("/{job_id}/events")
def list_events(
    job_id: str, tenant: TenantDep, session: SessionDep, after: str | None = None, limit: Limit = 20
) -> Page[Event]:
    """List the events of a job, newest first."""
    jobs.get_job(session, tenant.id, job_id)
    match = _EVENT_ID.fullmatch(after or "")
    if after is not None and match is None:
        raise InvalidRequest(f"after={after!r} is not an event id; pass the id of the last event seen", param="after")
    seq = int(match.group(1)) if match else None
    return page(jobs.list_events(session, job_id, after=seq, limit=limit), event_out)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, tenant: TenantDep, session: SessionDep, after: str | None = None, limit: Limit = 10
) -> Page[CheckpointOut]:
    """List the checkpoints of a job, newest first."""
    job = jobs.get_job(session, tenant.id, job_id)
    name = fine_tuned_name(job.base_model, job.tenant.name, job.request.get("suffix"), job.id)
    found = checkpoints.list_checkpoints(session, job_id, after=after, limit=limit)
    return page(found, lambda checkpoint: checkpoint_out(checkpoint, name))


def _check_integrations(body: JobCreate) -> None:
    """Raise InvalidRequest for an integration that is not in MILLINER_INTEGRATIONS.

    Only workers have the addresses and keys of trackers; the API knows just which ones are enabled.
    """
    enabled = get_settings().integrations
    for i, integration in enumerate(body.integrations or ()):
        if integration.type not in enabled:
            raise InvalidRequest(
                f"integration {integration.type!r} is not enabled on this server; "
                f"enabled: {', '.join(sorted(enabled)) or 'none'}. "
                f"Remove it from the request, or ask the operator to add it to MILLINER_INTEGRATIONS",
                param=f"integrations.{i}.type",
                code="integration_not_available",
            )


def _job_out(session: SessionDep, job: Job) -> JobOut:
    return job_out(job, queue_position=jobs.queue_position(session, job))
