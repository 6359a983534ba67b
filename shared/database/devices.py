"""The devices that training workers have reported, and what runs took on them: two tables.

Owns: which devices count as there. Postgres's clock only. Must not predict: shared/estimation/memory_model.py and
shared/schemas/memory.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.database.tables import BaseModelRow, DeviceReport, Job, MemoryWeighing
from shared.schemas.memory import Device, KnownDevice, MeasuredFit, Weighing
from shared.schemas.requests import JobCreate, Quantization

#: A device counts for so long after it was heard of. Each worker reports its own when it starts and with each job.
COUNTS_FOR = timedelta(days=30)
#: Runs of one base on one device that are looked at.
LATEST = 50


def report(session: Session, device: Device) -> None:
    """A worker says what it trains on."""
    row = insert(DeviceReport).values(**device.model_dump())
    seen = {"seen_at": func.clock_timestamp()}
    session.execute(row.on_conflict_do_update(index_elements=["kind", "name", "memory_bytes"], set_=seen))


def weigh(session: Session, job: Job, fit: MeasuredFit) -> None:
    """A run is over: keep what was computed for it and what it took."""
    values = {
        "digest": session.get_one(BaseModelRow, job.base_model).digest,
        "quantization": JobCreate.model_validate(job.request).quantization.value,
        "kind": fit.device.kind,
        "name": fit.device.name,
        "computed_bytes": fit.computed_bytes,
        "measured_bytes": fit.measured_bytes,
    }
    row = insert(MemoryWeighing).values(job_id=job.id, **values)
    session.execute(row.on_conflict_do_update(index_elements=["job_id"], set_=values))


def known(session: Session, *, digest: str, quantization: Quantization) -> list[KnownDevice]:
    """The devices that count, the largest first, and how runs of this base came out on each."""
    fresh = DeviceReport.seen_at > func.clock_timestamp() - COUNTS_FOR
    rows = session.scalars(select(DeviceReport).where(fresh).order_by(DeviceReport.memory_bytes.desc())).all()
    return [
        KnownDevice(
            kind=row.kind,
            name=row.name,
            memory_bytes=row.memory_bytes,
            weighings=weighings(session, digest=digest, quantization=quantization, kind=row.kind, name=row.name),
        )
        for row in rows
    ]


def weighings(
    session: Session, *, digest: str, quantization: Quantization, kind: str, name: str | None = None
) -> Sequence[Weighing]:
    """The latest runs of a base on a device, or on every device of a kind, newest first."""
    found = select(MemoryWeighing).where(
        MemoryWeighing.digest == digest,
        MemoryWeighing.quantization == quantization.value,
        MemoryWeighing.kind == kind,
    )
    if name is not None:
        found = found.where(MemoryWeighing.name == name)
    rows = session.scalars(found.order_by(MemoryWeighing.created_at.desc()).limit(LATEST)).all()
    return [Weighing(computed_bytes=row.computed_bytes, measured_bytes=row.measured_bytes) for row in rows]
