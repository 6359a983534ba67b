"""Fixtures of the checks: a Postgres without the rest of the stack."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from deploy.local import servers
from deploy.local.folder import Folder
from deploy.local.process import end, spawn, stop


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-released", action="store_true", help="write the current schema as the released one")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty database."""
    folder = Folder(tmp_path_factory.mktemp("postgres")).create()
    secrets, ports = folder.secrets(), folder.ports()
    inherit = folder.children_fd(timeout=0)
    assert inherit is not None
    initdb, server = servers.initdb(folder, secrets), servers.postgres(folder, ports)
    assert initdb is not None
    assert spawn(initdb, log=folder.logs / "initdb.log", inherit=inherit).wait(60) == 0
    servers.adopt_cluster(folder)
    process = spawn(server, log=folder.logs / "postgres.log", inherit=inherit)
    maintenance = servers.database_url(ports, secrets, database="postgres")
    try:
        deadline = time.monotonic() + 30
        while not servers.postgres_answers(maintenance):
            assert time.monotonic() < deadline, (folder.logs / "postgres.log").read_text()
            time.sleep(0.05)
        servers.create_database(maintenance)
        yield servers.database_url(ports, secrets)
    finally:
        stop(process, server)
        end(process, server, asked_at=time.monotonic())
