"""The devices that training workers have reported, and the peak memory of runs on them.

Owns: the tables `devices` and `memory_weighings`, and for how long a reported device counts. Times come from Postgres's
clock. Must not predict memory: shared/estimation/memory_model.py and shared/schemas/memory.py do.
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

#: A device counts for this long after its last report. A worker reports its device at its start and with each job.
DEVICE_TTL = timedelta(days=30)
#: How many runs of one base model on one device are read, newest first.
MAX_RUNS = 50


def report(session: Session, device: Device) -> None:
    """Store the device that a worker trains on."""
    row = insert(DeviceReport).values(**device.model_dump())
    seen = {"seen_at": func.clock_timestamp()}
    session.execute(row.on_conflict_do_update(index_elements=["kind", "name", "memory_bytes"], set_=seen))


def weigh(session: Session, job: Job, fit: MeasuredFit) -> None:
    """Store the computed and the measured peak memory of a finished run. A second call replaces the first."""
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
    """List the devices that count, largest memory first, each with the measured runs of this base model on it."""
    fresh = DeviceReport.seen_at > func.clock_timestamp() - DEVICE_TTL
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
    """List the latest runs of a base model, newest first: on the device `name`, or on all devices of a kind."""
    found = select(MemoryWeighing).where(
        MemoryWeighing.digest == digest,
        MemoryWeighing.quantization == quantization.value,
        MemoryWeighing.kind == kind,
    )
    if name is not None:
        found = found.where(MemoryWeighing.name == name)
    rows = session.scalars(found.order_by(MemoryWeighing.created_at.desc()).limit(MAX_RUNS)).all()
    return [Weighing(computed_bytes=row.computed_bytes, measured_bytes=row.measured_bytes) for row in rows]
