"""The tables. Postgres only: JSONB, partial indexes, `clock_timestamp()`.

The state machine lives in shared/database/jobs.py; a trigger (see the first migration) makes terminal states absorbing
even for hand-written SQL. Must not hold logic.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, Index, LargeBinary, MetaData, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from shared.schemas.requests import Desired, State

NOW = text("clock_timestamp()")


class Table(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it from the class)
        str: Text,
        datetime: DateTime(timezone=True),
        int: BigInteger,
        dict[str, Any]: JSONB(none_as_null=True),
        list[Any]: JSONB(none_as_null=True),
        bytes: LargeBinary,
    }


class Tenant(Table):
    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class ApiKey(Table):
    """`id` is the public part of the secret; only the SHA-256 of the whole is stored."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    sha256: Mapped[bytes]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    revoked_at: Mapped[datetime | None]


class File(Table):
    __tablename__ = "files"
    __table_args__ = (Index(None, "tenant_id", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    status: Mapped[str]
    status_details: Mapped[str | None]
    bytes: Mapped[int]
    sha256: Mapped[str]
    key: Mapped[str]
    report: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class BaseModelRow(Table):
    """A frozen base, mirrored into the bucket under `prefix`; `files` lists {path, bytes, sha256}."""

    __tablename__ = "base_models"

    name: Mapped[str] = mapped_column(primary_key=True)
    public_id: Mapped[str]
    revision: Mapped[str]
    license: Mapped[str | None]
    digest: Mapped[str]
    prefix: Mapped[str]
    files: Mapped[list[Any]]
    config: Mapped[dict[str, Any]]
    parameters: Mapped[int]
    bytes: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Job(Table):
    """The job. Written by shared/database/jobs.py only.

    `start_…` is the adapter that it begins with, as it was when the job was submitted: the name that clients know, the
    folder that it lies in, and the hash of its weights. Where it came from may go; the folder stays
    (shared/database/adapters.py).
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(s.value) for s in State)})", name="state"),
        CheckConstraint(f"desired_state IN ({', '.join(repr(d.value) for d in Desired)})", name="desired_state"),
        CheckConstraint("(lease_owner IS NULL) = (lease_expires_at IS NULL)", name="lease_whole"),
        CheckConstraint("state <> 'running' OR lease_owner IS NOT NULL", name="running_is_leased"),
        CheckConstraint("num_nulls(start_name, start_prefix, start_sha256) IN (0, 3)", name="start_whole"),
        Index(None, "tenant_id", "id"),
        Index(
            "ix_jobs_waiting",
            "state",
            text("priority DESC"),
            "created_at",
            postgresql_where=text("state IN ('validating_files', 'queued')"),
        ),
        Index("ix_jobs_leased", "lease_expires_at", postgresql_where=text("lease_owner IS NOT NULL")),
        Index("ix_jobs_starting", "start_prefix", postgresql_where=text("start_prefix IS NOT NULL")),
        Index("uq_jobs_idempotency", "tenant_id", "idempotency_key", unique=True),
        Index("ix_jobs_request", "tenant_id", "request_sha256"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    request: Mapped[dict[str, Any]]
    request_sha256: Mapped[bytes]
    idempotency_key: Mapped[str | None]
    seed: Mapped[int]
    dry_run: Mapped[bool] = mapped_column(server_default=text("false"))
    start_name: Mapped[str | None]
    start_prefix: Mapped[str | None]
    start_sha256: Mapped[str | None]

    state: Mapped[str]
    desired_state: Mapped[str] = mapped_column(server_default=Desired.RUN.value)
    phase: Mapped[str | None]
    reason: Mapped[str | None]
    priority: Mapped[int] = mapped_column(server_default=text("0"))
    not_before: Mapped[datetime] = mapped_column(server_default=NOW)
    lease_epoch: Mapped[int] = mapped_column(server_default=text("0"))
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    crash_count: Mapped[int] = mapped_column(server_default=text("0"))
    preempt_count: Mapped[int] = mapped_column(server_default=text("0"))
    fallback_level: Mapped[int] = mapped_column(server_default=text("0"))
    event_seq: Mapped[int] = mapped_column(server_default=text("0"))
    rung_at: Mapped[datetime | None]
    ring_count: Mapped[int] = mapped_column(server_default=text("0"))

    plan: Mapped[dict[str, Any] | None]
    progress: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    result_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    tenant: Mapped[Tenant] = relationship(lazy="raise")
    adapter: Mapped[Adapter | None] = relationship(lazy="raise")


class JobEvent(Table):
    """Append-only (a trigger sees to it); `seq` counts from 1 within a job, without gaps.

    `lease_epoch` is the job's when the event was written.
    """

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    lease_epoch: Mapped[int] = mapped_column(server_default=text("0"))
    data: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class JobMetric(Table):
    """One row a step. A resumed attempt overwrites the steps that it trains again."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[dict[str, Any]]


class Checkpoint(Table):
    """A checkpoint is real once this row is; `files` lists {path, bytes, sha256} under `prefix`."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index("uq_checkpoints_job_step", "job_id", "step", unique=True),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    lease_epoch: Mapped[int]
    prefix: Mapped[str]
    files: Mapped[list[Any]]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    deleted_at: Mapped[datetime | None]


class Preview(Table):
    """Rows of a dataset as a base's tokenizer sees them: asked for by a request that waits, answered by a worker.

    No lease: whoever takes it and dies is followed by another, and `takes` counts them.
    """

    __tablename__ = "previews"
    __table_args__ = (Index("ix_previews_waiting", "created_at", postgresql_where=text("finished_at IS NULL")),)

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    request: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    taken_at: Mapped[datetime | None]
    takes: Mapped[int] = mapped_column(server_default=text("0"))
    finished_at: Mapped[datetime | None]


class DeviceReport(Table):
    """What a training worker has said that it trains on; see shared/database/devices.py."""

    __tablename__ = "devices"

    kind: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    memory_bytes: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seen_at: Mapped[datetime] = mapped_column(server_default=NOW)


class MemoryWeighing(Table):
    """What one job's run took of its device, beside what was computed; `digest` is the base's."""

    __tablename__ = "memory_weighings"
    __table_args__ = (Index("ix_memory_weighings_base", "digest", "quantization", "kind", "created_at"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    digest: Mapped[str]
    quantization: Mapped[str]
    kind: Mapped[str]
    name: Mapped[str]
    computed_bytes: Mapped[int]
    measured_bytes: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Adapter(Table):
    """The published result of one job, known to clients as `name`.

    `proof` is what was shown of the published files before the job succeeded; `signed_by` the public key, base64;
    `exports` are the further forms that it was published in, or why one is not.
    """

    __tablename__ = "adapters"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(unique=True)
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    prefix: Mapped[str]
    files: Mapped[list[Any]]
    bytes: Mapped[int]
    proof: Mapped[dict[str, Any] | None]
    exports: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    signed_by: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    deleted_at: Mapped[datetime | None]
