"""Fixtures that all tests share: one real stack per run, with PostgreSQL, Valkey, S3, the API and both workers."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import openai
import pytest
from sqlalchemy import Engine, text

from deploy.local.folder import Folder, Record
from deploy.local.process import preparation
from shared.database.session import engine, session_scope
from shared.database.tenants import create_key, ensure_tenant

ROOT = Path(__file__).resolve().parents[1]

# Short times, so that a lost worker is detected within seconds instead of a minute.
SHORT = {
    "MILLINER_LEASE_SECONDS": "6",
    "MILLINER_HEARTBEAT_SECONDS": "1",
    "MILLINER_FENCE_SECONDS": "4",
    "MILLINER_SWEEP_SECONDS": "0.5",
    "MILLINER_RERING_SECONDS": "2",
    "MILLINER_CRASH_BACKOFF_SECONDS": "0.2",
    "MILLINER_INTEGRATIONS": "wandb",  # jobs may ask for it; the workers have no key
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the chaos tests at full size: hours instead of minutes")
    parser.addoption("--stack", metavar="DIR", help="use the stack running in this folder instead of starting one")
    parser.addoption("--figures", metavar="DIR", help="folder for the measurements of the chaos tests")


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    """The output of `up --json` of a running stack. The stack ends with the tests, even if they are killed."""
    if folder := request.config.getoption("--stack"):
        record = Folder(Path(folder)).record()
        assert record, f"no stack is running in {folder}"
        yield record
        return
    data = tmp_path_factory.mktemp("stack")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MILLINER_")}
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "deploy.local", "up", "--data", str(data), "--json"],
        cwd=ROOT,
        env=clean | SHORT,
        stdout=subprocess.PIPE,
        process_group=0,
        preexec_fn=preparation(SIGTERM),  # noqa: PLW1509 (pytest has one thread here)
    )
    with supervisor:
        assert supervisor.stdout is not None
        printed = supervisor.stdout.readline()
        try:
            assert printed, "the stack did not start; its output is above"
            record = Record.model_validate_json(printed)
            yield record
            engine(record.database_url).dispose()
        finally:
            supervisor.terminate()


@pytest.fixture(scope="session")
def database(stack: Record) -> Iterator[Engine]:
    """A migrated database that no worker of the stack uses."""
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


@pytest.fixture(scope="session")
def client(stack: Record) -> Iterator[openai.OpenAI]:
    """The official client, unchanged, for the stack's own tenant."""
    with openai.OpenAI(base_url=stack.base_url, api_key=stack.api_key) as client:
        yield client


@pytest.fixture(scope="session")
def stranger(stack: Record) -> Iterator[openai.OpenAI]:
    """The official client for another tenant."""
    with session_scope(engine(stack.database_url)) as session:
        key = create_key(session, ensure_tenant(session, "stranger"), name="tests")
    with openai.OpenAI(base_url=stack.base_url, api_key=key) as client:
        yield client


@pytest.fixture(scope="session")
def quotes() -> bytes:
    """Sixty rows in the demo's format."""
    rows = [{"text": f'Quote by SPEAKER {i % 7}: "hat number {i} is felt"'} for i in range(60)]
    return "\n".join(json.dumps(row) for row in rows).encode()
