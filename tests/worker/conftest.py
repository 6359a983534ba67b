"""Fixtures: a tiny base model, so that whole jobs take seconds, and this process as a worker with its own database."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Set before transformers is imported: no test may contact a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from sqlalchemy import Engine, text, update

from deploy.local.folder import Record
from shared import settings, storage
from shared.broker import doorbell
from shared.database import jobs
from shared.database.session import session_scope
from shared.database.tables import BaseModelRow, File, Job
from shared.database.tenants import ensure_tenant
from shared.schemas.requests import JobCreate, State
from tests.results import PLAN
from tests.tiny import tiny_llama

ROW = b'{"text": "a hat"}\n'

# A model this small is slower with two threads, and much slower on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(stack: Record, llama: str) -> str:
    """The name of a tiny base model in the stack's catalog."""
    command = [sys.executable, "-m", "deploy.local", "add-model", "tiny", llama, "--data", stack.data]
    subprocess.run([*command, "--public-id", "acme/tiny", "--revision", "1"], check=True, capture_output=True)
    return "tiny"


@pytest.fixture
def as_worker(stack: Record, database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configure this process as a worker of the unit database."""
    environment = {
        "DATABASE_URL": database.url.set(drivername="postgresql").render_as_string(hide_password=False),
        "REDIS_URL": stack.redis_url.replace("/0", "/9"),
        "S3_ENDPOINT": stack.s3.endpoint,
        "S3_BUCKET": stack.s3.bucket,
        "S3_ACCESS_KEY": stack.s3.access_key,
        "S3_SECRET_KEY": stack.s3.secret_key,
        "CACHE_DIR": str(tmp_path / "cache"),
        "MIN_FREE_BYTES": "0",
        "CRASH_BACKOFF_SECONDS": "0",
        "WARM_SECONDS": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"MILLINER_{name}", value)
    caches = (settings.get_settings, storage.client, doorbell.celery_app)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def job(as_worker: None) -> str:
    """The id of the only job in the unit database: queued, with its objects in the bucket."""
    with session_scope() as session:
        session.execute(text("TRUNCATE jobs, job_events, job_metrics, checkpoints, adapters CASCADE"))
        tenant = ensure_tenant(session, f"t-{secrets.token_hex(4)}")
    file_id, model = f"file-{secrets.token_hex(15)}", f"m-{secrets.token_hex(4)}"
    key = f"files/{tenant.id}/{file_id}"
    storage.put_bytes(key, ROW)
    storage.put_bytes(f"models/{model}/config.json", b"{}")
    config = storage.Entry(path="config.json", bytes=2, sha256=storage.sha256_of_bytes(b"{}"))
    with session_scope() as session:
        session.add(
            File(
                id=file_id, tenant_id=tenant.id, filename="a", purpose="fine-tune", status="processed", bytes=len(ROW),
                sha256=storage.sha256_of_bytes(ROW), key=key,
            )
        )  # fmt: skip
        session.add(
            BaseModelRow(
                name=model, public_id="org/m", revision="1", digest=model, prefix=f"models/{model}/", files=[config],
                config={}, parameters=1, bytes=2,
            )
        )  # fmt: skip
        session.flush()
        job, _ = jobs.submit(session, tenant.id, JobCreate(model=model, training_file=file_id))
        recipe = PLAN.recipe.model_copy(update={"micro_batch": 4})
        plan = PLAN.model_copy(update={"recipe": recipe, "fallback_levels": 5})  # 4, 2, 1, recomputed, unpacked
        session.execute(update(Job).where(Job.id == job.id).values(state=State.QUEUED, plan=plan.model_dump()))
    return job.id
