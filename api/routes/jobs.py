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
    """Accept a job. Answers once Postgres has it, whatever the broker does."""
    _check_integrations(body)
    window = get_settings().retry_window_seconds if x_stainless_retry_count > 0 else None
    job, new = jobs.submit(session, tenant.id, body, idempotency_key=idempotency_key, retry_window=window)
    if new:
        failpoint(Failpoint.BEFORE_SUBMIT_COMMIT)
        after_commit(session, lambda: failpoint(Failpoint.AFTER_SUBMIT_COMMIT))
        after_commit(session, lambda: bell.ring(Queue.PREPARE))
    return _shown(session, job)


@router.get("")
def list_jobs(
    request: Request, tenant: TenantDep, session: SessionDep, after: str | None = None, limit: Limit = 20
) -> Page[JobOut]:
    """The tenant's jobs, newest first, dry runs left out; `metadata[k]=v` filters, `metadata=null` finds bare ones."""
    metadata: dict[str, str] | None = {}
    for key, value in request.query_params.multi_items():
        if (match := _METADATA.fullmatch(key)) and metadata is not None:
            metadata[match.group(1)] = value
        elif key == "metadata" and value == "null":
            metadata = None
    found = jobs.list_jobs(session, tenant.id, metadata=metadata, after=after, limit=limit)
    return page(found, lambda job: _shown(session, job))


@router.get("/{job_id}")
def retrieve_job(job_id: str, tenant: TenantDep, session: SessionDep) -> JobOut:
    """One job, with its phase, queue position, progress, plan, report and adapter."""
    return _shown(session, jobs.get_job(session, tenant.id, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, tenant: TenantDep, session: SessionDep) -> JobOut:
    """Cancel: at once where no worker holds the job, within one heartbeat otherwise."""
    return _shown(session, jobs.set_desired_state(session, tenant.id, job_id, Desired.CANCEL))


@router.post("/{job_id}/pause")
def pause_job(job_id: str, tenant: TenantDep, session: SessionDep) -> JobOut:
    """Pause: a running job checkpoints and frees its slot."""
    return _shown(session, jobs.set_desired_state(session, tenant.id, job_id, Desired.PAUSE))


@router.post("/{job_id}/resume")
def resume_job(job_id: str, tenant: TenantDep, session: SessionDep, bell: BellDep) -> JobOut:
    """Resume a paused job from its last checkpoint."""
    job = jobs.set_desired_state(session, tenant.id, job_id, Desired.RUN)
    after_commit(session, lambda: bell.ring(Queue.TRAIN))
    return _shown(session, job)


@router.get("/{job_id}/events")
def list_events(
    job_id: str, tenant: TenantDep, session: SessionDep, after: str | None = None, limit: Limit = 20
) -> Page[Event]:
    """The job's events, newest first."""
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
    """The job's checkpoints, newest first."""
    job = jobs.get_job(session, tenant.id, job_id)
    name = fine_tuned_name(job.base_model, job.tenant.name, job.request.get("suffix"), job.id)
    found = checkpoints.list_checkpoints(session, job_id, after=after, limit=limit)
    return page(found, lambda checkpoint: checkpoint_out(checkpoint, name))


def _check_integrations(body: JobCreate) -> None:
    """Only workers know how to reach a tracker; which there are, both are told."""
    offered = get_settings().integrations
    for i, integration in enumerate(body.integrations or ()):
        if integration.type not in offered:
            raise InvalidRequest(
                f"this server tells nothing to {integration.type!r}; allowed: {', '.join(sorted(offered)) or 'none'}. "
                f"Leave it out, or ask the operator to set MILLINER_INTEGRATIONS",
                param=f"integrations.{i}.type",
                code="integration_not_available",
            )


def _shown(session: SessionDep, job: Job) -> JobOut:
    return job_out(job, queue_position=jobs.queue_position(session, job))
