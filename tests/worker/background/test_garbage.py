"""Which objects garbage collection deletes and which it keeps, with real Postgres and S3.

There is an orphan and a kept object of every kind, and every race in which an object is about to get its row. The
bucket belongs to the test, and no worker of the stack uses the database.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from deploy.local.folder import Record
from shared import settings, storage
from shared.database import attempts, checkpoints, files, jobs, state_machine
from shared.database.session import engine, session_scope
from shared.database.tables import Adapter, BaseModelRow, Checkpoint, File, Job, Table
from shared.database.tenants import ensure_tenant
from shared.ids import new_id
from shared.schemas.requests import JobCreate, Phase, State
from shared.schemas.results import Metrics
from worker.background import garbage

DAY = 86400.0
PAST, FUTURE = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
def bucket(stack: Record, database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, used by this process together with its own database and cache folder."""
    name = f"garbage-{secrets.token_hex(4)}"
    own = {f"S3_{key.upper()}": value for key, value in stack.s3.model_dump().items()} | {
        "S3_BUCKET": name,
        "DATABASE_URL": database.url.render_as_string(hide_password=False),
        "CACHE_DIR": str(tmp_path),
        "PURGE_SECONDS": "0.1",
    }
    for key, value in own.items():
        monkeypatch.setenv(f"MILLINER_{key}", value)
    reread()
    storage.client().create_bucket(Bucket=name)
    yield name
    storage.delete_many(everything())
    storage.client().delete_bucket(Bucket=name)
    reread()


@pytest.fixture
def empty(stack: Record) -> Iterator[str]:
    """The URL of a database with all tables and no rows, as after an installation lost its data."""
    name = f"empty_{secrets.token_hex(4)}"
    url = f"{stack.database_url.rsplit('/', 1)[0]}/{name}"
    with engine(stack.database_url).connect().execution_options(isolation_level="AUTOCOMMIT") as admin:
        admin.execute(text(f"CREATE DATABASE {name}"))
    Table.metadata.create_all(engine(url))
    yield url
    engine(url).dispose()


@pytest.fixture
def tenant(bucket: str) -> str:
    with session_scope() as session:
        return ensure_tenant(session, f"t-{secrets.token_hex(4)}").id


@pytest.fixture
def dataset(tenant: str) -> str:
    return a_file(tenant)


@pytest.fixture
def base(bucket: str) -> str:
    """The digest of a base model, which is also its name."""
    digest = secrets.token_hex(32)
    row = BaseModelRow(
        name=digest, public_id="org/tiny", revision="1", digest=digest, prefix=f"models/{digest}/", files=[],
        config={}, parameters=1, bytes=1,
    )  # fmt: skip
    with session_scope() as session:
        session.add(row)
    return digest


def test_orphans_of_every_kind_are_deleted_and_the_rest_is_kept(tenant: str, dataset: str, base: str) -> None:
    def job(state: State, **values: Any) -> str:
        return a_job(tenant, dataset, base, state=state, **values)

    running = job(State.RUNNING, lease_epoch=4, lease_owner="w")
    queued, ended = job(State.QUEUED, lease_epoch=4), job(State.SUCCEEDED, lease_epoch=4)
    needed, unneeded, deleted = (a_file(tenant, expires_at=PAST) for _ in range(3))
    job(State.PAUSED, validation_file=needed)
    job(State.FAILED, training_file=unneeded)
    job(State.SUCCEEDED, training_file=deleted)
    unknown, deleted_adapter = new_id("ftjob-"), job(State.SUCCEEDED)
    with session_scope() as session:
        session.execute(update(File).where(File.id == deleted).values(deleted_at=func.clock_timestamp()))
        session.add_all([an_adapter(tenant, ended, base), an_adapter(tenant, deleted_adapter, base, deleted_at=PAST)])
        session.add_all(a_checkpoint(tenant, job_id, step=10) for job_id in (running, queued))
        session.add_all([a_checkpoint(tenant, ended, step=10, deleted_at=PAST), a_checkpoint(tenant, ended, step=20)])

    kept = [
        f"checkpoints/{tenant}/{running}/3/10/a",  # its holder may be resuming from it
        f"checkpoints/{tenant}/{running}/4/20/a",  # its holder may be about to commit it
        f"checkpoints/{tenant}/{running}/5/20/a",  # of a later epoch
        f"checkpoints/{tenant}/{queued}/3/10/sub/a",
        f"checkpoints/{tenant}/{ended}/3/20/manifest.json",
        f"adapters/{tenant}/{running}/a",
        f"adapters/{tenant}/{queued}/a",
        f"adapters/{tenant}/{ended}/a",
        f"files/{tenant}/{dataset}",
        f"files/{tenant}/{needed}",
        f"models/{base}/config.json",
        f"models/{secrets.token_hex(32)}/of an import that was interrupted",
        *("unit/a", "files/readme.txt", "files/else/file-1", "models/tiny/a", f"files/{tenant}/{dataset}/a"),
        *(f"checkpoints/{tenant}/{ended}/3/a", f"checkpoints/{tenant}/{ended}/latest/3/a", f"adapters/{ended}/a"),
    ]
    fenced = [
        f"checkpoints/{tenant}/{running}/3/20/a",
        f"checkpoints/{tenant}/{queued}/4/20/a",
        f"checkpoints/{tenant}/{queued}/4/20/sub/b",
        f"checkpoints/{tenant}/{ended}/3/10/a",
        f"checkpoints/{tenant}/{ended}/4/30/a",
        f"adapters/{tenant}/{deleted_adapter}/a",
        f"adapters/{tenant}/{deleted_adapter}/b",
        f"files/{tenant}/{unneeded}",
        f"files/{tenant}/{deleted}",
    ]
    aged = [
        f"checkpoints/{tenant}/{unknown}/1/1/a",
        f"adapters/{tenant}/{unknown}/a",
        f"files/{tenant}/{new_id('file-')}",
    ]
    plant(*kept, *fenced, *aged)
    assert collect(orphan_seconds=DAY) == {"checkpoints": 5, "adapters": 2, "files": 2}
    assert everything() == sorted(kept + aged)
    assert collect(orphan_seconds=0) == {"checkpoints": 1, "adapters": 1, "files": 1}
    assert everything() == sorted(kept)
    assert collect(orphan_seconds=0) == {}


# ---------------------------------------------------------------- other databases


def test_with_an_empty_database_nothing_is_deleted(
    bucket: str, tenant: str, dataset: str, base: str, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(tenant, dataset, base, state=State.SUCCEEDED, lease_epoch=1)
    plant(
        f"files/{tenant}/{dataset}",
        f"files/{tenant}/{new_id('file-')}",
        f"adapters/{tenant}/{job}/a",
        f"checkpoints/{tenant}/{job}/1/10/a",
        f"checkpoints/{tenant}/{new_id('ftjob-')}/1/10/a",
        f"models/{base}/config.json",
    )
    storage.client().create_multipart_upload(Bucket=bucket, Key=f"files/{tenant}/{new_id('file-')}")
    before = everything()
    with monkeypatch.context() as patch:
        patch.setenv("MILLINER_DATABASE_URL", empty)
        reread()
        assert collect(orphan_seconds=0) == {}
    reread()
    assert everything() == before
    assert collect(orphan_seconds=0) == {"files": 1, "adapters": 1, "checkpoints": 2, "uploads": 1}


def test_tenants_of_two_databases_may_share_a_bucket(tenant: str) -> None:
    """One batch has keys of both."""
    ours, theirs = (f"files/{org}/{new_id('file-')}" for org in (tenant, new_id("org-")))
    plant(ours, theirs)
    assert collect(orphan_seconds=0) == {"files": 1}
    assert everything() == [theirs]


# ---------------------------------------------------------------- races


def test_a_checkpoint_committed_after_the_listing_is_kept(tenant: str, dataset: str, base: str) -> None:
    """The attempt commits the row and releases the job, both between the listing and the reading of the rows."""
    job = a_job(tenant, dataset, base, state=State.RUNNING, lease_epoch=1, lease_owner="w")
    plant(key := f"checkpoints/{tenant}/{job}/1/10/a")

    def commit(session: Session) -> None:
        metrics = Metrics(step=10, total_steps=20)
        prefix = f"checkpoints/{tenant}/{job}/1/10/"
        assert attempts.add_checkpoint(session, job, 1, step=10, prefix=prefix, files=[], metrics=metrics)
        assert attempts.release(session, job, 1)

    assert meanwhile("jobs", commit) == {}
    assert everything() == [key]


@pytest.mark.parametrize("kind", ["adapters", "files"])
def test_a_result_committed_after_the_listing_is_kept(kind: str, tenant: str, dataset: str, base: str) -> None:
    job = a_job(tenant, dataset, base, state=State.RUNNING, lease_epoch=1, lease_owner="w", phase=Phase.PUBLISHING)
    result = new_id("file-")
    plant(key := f"adapters/{tenant}/{job}/a" if kind == "adapters" else f"files/{tenant}/{result}")

    def commit(session: Session) -> None:
        session.add_all([an_adapter(tenant, job, base), file_row(tenant, result)])
        session.flush()
        assert state_machine.transition(session, job, state_machine.Reason.COMPLETED, epoch=1)

    assert meanwhile("jobs", commit) == {}
    assert everything() == [key]


def test_a_result_file_without_a_row_is_kept_while_its_job_is_publishing(tenant: str, dataset: str, base: str) -> None:
    job = a_job(tenant, dataset, base, state=State.RUNNING, lease_epoch=1, lease_owner="w", phase=Phase.PUBLISHING)
    plant(key := f"files/{tenant}/{new_id('file-')}")
    assert collect(orphan_seconds=0) == {}
    assert everything() == [key]
    with session_scope() as session:
        assert attempts.release(session, job, 1)
    assert collect(orphan_seconds=0) == {"files": 1}


def test_an_upload_is_kept_between_its_put_and_its_commit(tenant: str) -> None:
    file_id = new_id("file-")
    plant(key := f"files/{tenant}/{file_id}")
    with session_scope() as session:
        session.add(file_row(tenant, file_id))
        session.flush()
        assert collect(orphan_seconds=DAY) == {}
    assert collect(orphan_seconds=0) == {}
    assert everything() == [key]


def test_a_file_that_expires_during_a_submit_is_kept_until_the_job_has_ended(tenant: str, base: str) -> None:
    file_id = a_file(tenant, expires_at=datetime.now(UTC) + timedelta(seconds=0.5))
    plant(key := f"files/{tenant}/{file_id}")
    request = JobCreate(model=base, training_file=file_id)
    with session_scope() as session:
        job, _ = jobs.submit(session, tenant, request)
        until(lambda: bool(session.scalar(select(~files.live_file()).where(File.id == file_id))))
        assert collect(orphan_seconds=0) == {}  # the job is not visible yet, but the lock on its file is
    assert collect(orphan_seconds=0) == {}
    assert everything() == [key]
    with session_scope() as session:
        state_machine.transition(session, job.id, state_machine.Reason.CANCELLED, epoch=None)
    assert collect(orphan_seconds=0) == {"files": 1}
    with session_scope() as session:
        assert session.get_one(File, file_id).deleted_at is not None


def test_the_source_of_a_job_is_kept_until_the_job_has_ended(tenant: str, dataset: str, base: str) -> None:
    """The checkpoint is dropped and the model deleted: the waiting jobs alone keep the objects."""
    source, names = a_job(tenant, dataset, base, state=State.SUCCEEDED, lease_epoch=3), ("start_name", "start_sha256")
    prefixes = [f"checkpoints/{tenant}/{source}/3/10/", f"adapters/{tenant}/{source}/"]
    starting = [
        a_job(tenant, dataset, base, state=State.PAUSED, start_prefix=prefix, **dict.fromkeys(names, "x"))
        for prefix in prefixes
    ]
    with session_scope() as session:
        session.add(a_checkpoint(tenant, source, step=10, deleted_at=PAST))
        session.add(an_adapter(tenant, source, base, deleted_at=PAST))
    kept = [prefix + name for prefix in prefixes for name in ("adapter_model.safetensors", "manifest.json")]
    plant(*kept, f"checkpoints/{tenant}/{source}/3/20/a")
    assert collect(orphan_seconds=0) == {"checkpoints": 1}
    assert everything() == sorted(kept)
    with session_scope() as session:
        for job in starting:
            state_machine.transition(session, job, state_machine.Reason.CANCELLED, epoch=None)
    assert collect(orphan_seconds=0) == {"checkpoints": 2, "adapters": 2}


def test_a_source_dropped_after_the_listing_is_kept_for_a_job_submitted_before_the_drop(
    tenant: str, dataset: str, base: str
) -> None:
    """A submit, and the drop that waited for its lock, both between the listing and the reading of the rows."""
    source = a_job(tenant, dataset, base, state=State.RUNNING, lease_epoch=3, lease_owner="w")
    with session_scope() as session:
        session.add(checkpoint := a_checkpoint(tenant, source, step=10))
    plant(key := checkpoint.prefix + "adapter_model.safetensors")

    def act(session: Session) -> None:
        started = {"start_name": "x", "start_prefix": checkpoint.prefix, "start_sha256": "x"}
        row = {"tenant_id": tenant, "base_model": base, "training_file": dataset, "request": {}, "request_sha256": b""}
        session.add(Job(id=new_id("ftjob-"), seed=0, state=State.QUEUED, **row, **started))
        session.flush()
        assert checkpoints.drop_checkpoints(session, source, 3, keep=0) == []

    assert meanwhile("jobs", act) == {}
    assert everything() == [key]


def test_two_collectors_can_run_at_the_same_time(tenant: str, dataset: str, base: str) -> None:
    job = a_job(tenant, dataset, base, state=State.RUNNING, lease_epoch=2, lease_owner="w")
    plant(*(f"checkpoints/{tenant}/{job}/1/{step}/a" for step in range(garbage.BATCH + 10)))
    expired = [a_file(tenant, expires_at=PAST) for _ in range(5)]
    plant(*(f"files/{tenant}/{file_id}" for file_id in expired), key := f"checkpoints/{tenant}/{job}/2/1/a")
    with ThreadPoolExecutor() as pool:
        rounds = [pool.submit(collect, orphan_seconds=0) for _ in range(2)]
        assert sum(sum(done.result().values()) for done in rounds) >= garbage.BATCH + 15
    assert everything() == [key]


# ---------------------------------------------------------------- uploads, and the thread


def test_abandoned_multipart_uploads_are_aborted(bucket: str, tenant: str) -> None:
    ours, foreign = f"files/{tenant}/{new_id('file-')}", "files/else"
    for key in (ours, foreign):
        storage.client().create_multipart_upload(Bucket=bucket, Key=key)
    assert collect(orphan_seconds=DAY) == {}
    assert collect(orphan_seconds=0) == {"uploads": 1}
    assert [upload.key for upload in storage.unfinished("")] == [foreign]
    storage.abort(next(storage.unfinished("")))


def test_the_thread_survives_an_outage_and_sweeps_this_machine(
    tenant: str, stack: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(f"files/{tenant}/{a_file(tenant, expires_at=PAST)}")
    (tmp_path / "work" / "of a killed attempt").mkdir(parents=True)
    monkeypatch.setenv("MILLINER_S3_ENDPOINT", "http://127.0.0.1:9")
    reread()
    stop = Event()
    with capture_logs() as logs:
        thread = garbage.start(stop, head_start=1.0)
        try:
            until(lambda: any(line["event"] == "garbage.skipped" for line in logs), seconds=30)
            assert not list((tmp_path / "work").iterdir())
            monkeypatch.setenv("MILLINER_S3_ENDPOINT", stack.s3.endpoint)
            reread()
            until(lambda: not everything(), seconds=30)
        finally:
            stop.set()
            thread.join(30)
    assert not any(line["event"] == "garbage.failed" for line in logs)


# ---------------------------------------------------------------- test data


def collect(*, orphan_seconds: float) -> Counter[str]:
    return garbage.collect(settings.get_settings().model_copy(update={"orphan_seconds": orphan_seconds}))


def meanwhile(table: str, act: Callable[[Session], None], *, orphan_seconds: float = 0) -> Counter[str]:
    """Collect, and call `act` between the listing and the read of `table`, which is locked until then."""
    with ThreadPoolExecutor() as pool:
        with session_scope() as session:
            session.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
            round_: Future[Counter[str]] = pool.submit(collect, orphan_seconds=orphan_seconds)
            waiting = text(
                "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
                " WHERE c.relname = :table AND NOT l.granted"
            )
            until(lambda: bool(session.scalar(waiting, {"table": table})))
            act(session)
        return round_.result()


def everything() -> list[str]:
    return sorted(item.key for item in storage.listing(""))


def plant(*keys: str) -> None:
    for key in keys:
        storage.put_bytes(key, b"x")


def reread() -> None:
    settings.get_settings.cache_clear()
    storage.client.cache_clear()


def file_row(tenant: str, file_id: str, **values: Any) -> File:
    return File(
        id=file_id, tenant_id=tenant, filename="a", purpose="fine-tune", status="processed", bytes=1,
        sha256="0" * 64, key=f"files/{tenant}/{file_id}", **values,
    )  # fmt: skip


def a_file(tenant: str, **values: Any) -> str:
    file_id = new_id("file-")
    with session_scope() as session:
        session.add(file_row(tenant, file_id, **values))
    return file_id


def a_job(tenant: str, dataset: str, base: str, **values: Any) -> str:
    leased = {"lease_expires_at": FUTURE} if "lease_owner" in values else {}
    row = {"id": new_id("ftjob-"), "training_file": dataset} | leased | values
    with session_scope() as session:
        session.add(Job(tenant_id=tenant, base_model=base, request={}, seed=0, request_sha256=b"", **row))
    return str(row["id"])


def a_checkpoint(tenant: str, job: str, *, step: int, deleted_at: datetime | None = None) -> Checkpoint:
    """Return a checkpoint row of epoch 3."""
    prefix = f"checkpoints/{tenant}/{job}/3/{step}/"
    row = {"id": new_id("ftckpt_"), "job_id": job, "step": step, "lease_epoch": 3, "prefix": prefix}
    return Checkpoint(**row, files=[], metrics={}, deleted_at=deleted_at)


def an_adapter(tenant: str, job: str, base: str, **values: Any) -> Adapter:
    prefix = f"adapters/{tenant}/{job}/"
    return Adapter(job_id=job, tenant_id=tenant, name=job, base_model=base, prefix=prefix, files=[], bytes=1, **values)


def until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
