"""Devices count while workers report them; measured runs are found by base model, quantization and device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from shared.database import devices, jobs
from shared.database.session import session_scope
from shared.database.tables import Job, Tenant
from shared.schemas.memory import Device, MeasuredFit
from shared.schemas.requests import JobCreate, Quantization

A10 = Device(kind="cuda", name="NVIDIA A10", memory_bytes=24 * 10**9)
CPU = Device(kind="cpu", name="a CPU", memory_bytes=16 * 10**9)


@pytest.fixture(autouse=True)
def _no_devices(database: Engine) -> Iterator[None]:
    with session_scope(database) as session:
        session.execute(text("TRUNCATE devices, memory_weighings"))
    yield
    with session_scope(database) as session:
        session.execute(text("TRUNCATE devices, memory_weighings"))


def measured(device: Device, computed: int, taken: int) -> MeasuredFit:
    return MeasuredFit(
        device=device,
        rows=4,
        length=128,
        computed_bytes=computed,
        predicted_bytes=computed,
        rehearsed_bytes=None,
        measured_bytes=taken,
    )


def make(database: Engine, tenant: Tenant, dataset: str, quantization: Quantization = Quantization.NF4) -> Job:
    with session_scope(database) as session:
        request = JobCreate(model="tiny", training_file=dataset, quantization=quantization)
        return jobs.submit(session, tenant.id, request)[0]


def test_a_device_is_one_row_however_often_it_is_reported(database: Engine) -> None:
    for device in (CPU, A10, CPU):
        with session_scope(database) as session:
            devices.report(session, device)
    with session_scope(database) as session:
        found = devices.known(session, digest="d", quantization=Quantization.NF4)
    assert [(one.name, one.memory_bytes, one.weighings) for one in found] == [
        ("NVIDIA A10", 24 * 10**9, []),
        ("a CPU", 16 * 10**9, []),
    ]


def test_a_device_that_is_no_longer_reported_does_not_count(database: Engine) -> None:
    with session_scope(database) as session:
        devices.report(session, A10)
        session.execute(text("UPDATE devices SET seen_at = clock_timestamp() - interval '31 days'"))
        assert devices.known(session, digest="d", quantization=Quantization.NF4) == []
        devices.report(session, A10)
        assert len(devices.known(session, digest="d", quantization=Quantization.NF4)) == 1


def test_runs_are_separated_by_base_quantization_and_device(database: Engine, tenant: Tenant, dataset: str) -> None:
    runs = [
        (Quantization.NF4, A10, 5),
        (Quantization.NF4, CPU, 6),
        (Quantization.INT8, A10, 7),
        (Quantization.NF4, A10, 8),
    ]
    for quantization, device, taken in runs:
        job = make(database, tenant, dataset, quantization)
        with session_scope(database) as session:
            devices.report(session, device)
            devices.weigh(session, job, measured(device, 4, taken))
    with session_scope(database) as session:
        found = devices.known(session, digest="d", quantization=Quantization.NF4)
        of_kind = devices.weighings(session, digest="d", quantization=Quantization.INT8, kind="cuda")
        of_another_base = devices.weighings(session, digest="e", quantization=Quantization.NF4, kind="cuda")
    assert [(one.name, [run.measured_bytes for run in one.weighings]) for one in found] == [
        ("NVIDIA A10", [8, 5]),
        ("a CPU", [6]),
    ]
    assert [run.measured_bytes for run in of_kind] == [7]
    assert of_another_base == []


def test_a_job_has_one_measured_run(database: Engine, tenant: Tenant, dataset: str) -> None:
    job = make(database, tenant, dataset)
    for taken in (5, 9):
        with session_scope(database) as session:
            devices.weigh(session, job, measured(CPU, 4, taken))
    with session_scope(database) as session:
        runs = devices.weighings(session, digest="d", quantization=Quantization.NF4, kind="cpu", name="a CPU")
    assert [run.measured_bytes for run in runs] == [9]
