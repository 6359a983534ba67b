"""A lease on the real Postgres: renewed, fenced during an outage, and ended when its epoch changes.

The outage is simulated by a row lock: renewals wait for another transaction.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select, text, update

from deploy.local.folder import Record
from shared import settings
from shared.database.session import engine, session_scope
from shared.database.tables import BaseModelRow, File, Job
from shared.database.tenants import ensure_tenant
from shared.linux import boot_time
from shared.schemas.requests import Desired
from worker.attempt.lease import Lease, Lost
from worker.child.trainer_process import TrainerProcess

SHORT = {"HEARTBEAT_SECONDS": "0.1", "LEASE_SECONDS": "3", "FENCE_SECONDS": "0.8"}


@pytest.fixture
def database(stack: Record, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The stack's database, used by this process, with short timeouts."""
    for name, value in SHORT.items():
        monkeypatch.setenv(f"MILLINER_{name}", value)
    monkeypatch.setenv("MILLINER_DATABASE_URL", stack.database_url)
    settings.get_settings.cache_clear()
    yield engine()
    settings.get_settings.cache_clear()


@pytest.fixture
def job(database: Engine) -> Iterator[str]:
    """A running job, leased at epoch 5 for an hour, so that no sweeper of the stack takes it back."""
    job_id, file_id = f"ftjob-{secrets.token_hex(15)}", f"file-{secrets.token_hex(15)}"
    with session_scope() as session:
        tenant = ensure_tenant(session, "leases")
        session.add(
            File(
                id=file_id, tenant_id=tenant.id, filename="a", purpose="fine-tune", status="processed", bytes=0,
                sha256="0" * 64, key="k",
            )
        )  # fmt: skip
        base = session.scalars(select(BaseModelRow)).first()
        assert base is not None
        session.flush()
        session.add(
            Job(
                id=job_id, tenant_id=tenant.id, base_model=base.name, training_file=file_id, request={}, seed=0,
                request_sha256=b"", state="running", lease_epoch=5, lease_owner="test",
                lease_expires_at=func.clock_timestamp() + text("interval '1h'"),
            )
        )  # fmt: skip
    yield job_id
    with session_scope() as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(state="cancelled", lease_owner=None, lease_expires_at=None)
        )


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[TrainerProcess]:
    process = TrainerProcess(tmp_path, visible_device="")
    yield process
    process.close()


def test_a_renewal_reads_what_the_user_wants(job: str) -> None:
    with Lease(job, 5, boot_time()) as lease:
        assert lease.desired is Desired.RUN
        with session_scope() as session:
            session.execute(update(Job).where(Job.id == job).values(desired_state=Desired.PAUSE))
        until(lambda: lease.desired is Desired.PAUSE)
        lease.check()


def test_an_outage_freezes_the_trainer_and_its_end_thaws_it(job: str, trainer: TrainerProcess) -> None:
    with Lease(job, 5, boot_time()) as lease:
        lease.guard(trainer)
        with session_scope() as outage:
            outage.execute(select(Job.id).where(Job.id == job).with_for_update())
            until(lambda: trainer.frozen)
            assert process_state(trainer) == "T"
        until(lambda: not trainer.frozen)
        assert process_state(trainer) != "T"
        lease.check()


def test_a_changed_epoch_kills_the_trainer(job: str, trainer: TrainerProcess) -> None:
    with Lease(job, 5, boot_time()) as lease:
        lease.guard(trainer)
        with session_scope() as session:
            session.execute(update(Job).where(Job.id == job).values(lease_epoch=6))
        until(lambda: process_state(trainer) == "Z")
        with pytest.raises(Lost):
            lease.check()


def test_a_frozen_trainer_is_killed_and_never_thawed_when_its_epoch_changes(job: str, trainer: TrainerProcess) -> None:
    with Lease(job, 5, boot_time()) as lease:
        lease.guard(trainer)
        with session_scope() as rival:
            rival.execute(update(Job).where(Job.id == job).values(lease_epoch=6))
            until(lambda: trainer.frozen)
        until(lambda: process_state(trainer) == "Z")
        assert trainer.frozen
        with pytest.raises(Lost):
            lease.check()


def process_state(trainer: TrainerProcess) -> str:
    return Path(f"/proc/{trainer.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
