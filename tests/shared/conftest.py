"""A database and a bucket prefix of their own for tests that write below the API, on the run's real servers."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from deploy.local.folder import Record
from shared.db import engine, session_scope
from shared.models import BaseModel, File, Tenant
from shared.tenants import ensure_tenant

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def database(stack: Record) -> Iterator[Engine]:
    """A migrated database that no worker of the stack looks at."""
    name = f"unit_{secrets.token_hex(4)}"
    with engine(stack.database_url).connect().execution_options(isolation_level="AUTOCOMMIT") as admin:
        admin.execute(text(f"CREATE DATABASE {name}"))
    url = stack.database_url.rsplit("/", 1)[0] + f"/{name}"
    subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(ROOT / "migrations" / "alembic.ini"), "upgrade", "head"],
        env=os.environ | {"MILLINER_DATABASE_URL": url},
        check=True,
        capture_output=True,
    )
    bind = engine(url)
    yield bind
    bind.dispose()


@pytest.fixture
def tenant(database: Engine) -> Tenant:
    with session_scope(database) as session:
        return ensure_tenant(session, f"t-{secrets.token_hex(4)}")


@pytest.fixture
def dataset(database: Engine, tenant: Tenant) -> str:
    """The id of a file row, and a base model to go with it. Nothing here reads the bytes."""
    file_id = f"file-{secrets.token_hex(15)}"
    with session_scope(database) as session:
        session.add(
            File(
                id=file_id,
                tenant_id=tenant.id,
                filename="a.jsonl",
                purpose="fine-tune",
                status="processed",
                bytes=1,
                sha256="0" * 64,
                key=f"files/{tenant.id}/{file_id}",
            )
        )
        if session.get(BaseModel, "tiny") is None:
            session.add(
                BaseModel(
                    name="tiny",
                    public_id="org/tiny",
                    revision="1",
                    digest="d",
                    prefix="models/d/",
                    files=[],
                    config={},
                    parameters=1,
                    bytes=1,
                )
            )
    return file_id
