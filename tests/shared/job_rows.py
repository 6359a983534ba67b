"""Jobs and the rows that go with them, written as the API and a worker write them."""

from __future__ import annotations

from sqlalchemy import Engine

from shared.broker.queues import Queue
from shared.database import attempts, claims, jobs
from shared.database.session import session_scope
from shared.database.tables import Adapter, File, Job, Tenant
from shared.schemas.requests import JobCreate, State
from tests.results import PLAN


def make(database: Engine, tenant: Tenant, dataset: str, *, priority: int = 0, dry_run: bool = False) -> Job:
    body = JobCreate(model="tiny", training_file=dataset, priority=priority, dry_run=dry_run)
    with session_scope(database) as session:
        return jobs.submit(session, tenant.id, body)[0]


def queued(database: Engine, tenant: Tenant, dataset: str, *, priority: int = 0) -> Job:
    job = make(database, tenant, dataset, priority=priority)
    epoch = claim(database, Queue.PREPARE).lease_epoch
    with session_scope(database) as session:
        assert attempts.finish_planning(session, job.id, epoch, PLAN) is State.QUEUED
    return job


def claim(database: Engine, queue: Queue) -> Job:
    with session_scope(database) as session:
        job = claims.claim(session, queue, owner="worker", lease_seconds=60)
    assert job is not None
    return job


def adapter(job: Job) -> Adapter:
    name = f"ft:tiny:t::{job.id}"
    return Adapter(job_id=job.id, tenant_id=job.tenant_id, name=name, base_model="tiny", prefix="a/", files=[], bytes=0)


def result_file(job: Job) -> File:
    return File(
        id=f"file-r{job.id[-20:]}", tenant_id=job.tenant_id, filename="step_metrics.csv",
        purpose="fine-tune-results", status="processed", bytes=0, sha256="0" * 64, key="r",
    )  # fmt: skip
