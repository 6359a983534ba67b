"""The real stack that the tests share: PostgreSQL, Valkey, S3, the API and both workers, one per run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import pytest

from deploy.local.folder import Record
from deploy.local.process import binding

ROOT = Path(__file__).resolve().parents[1]

# A lost worker is noticed within seconds instead of a minute.
SHORT = {
    "MILLINER_LEASE_SECONDS": "6",
    "MILLINER_HEARTBEAT_SECONDS": "1",
    "MILLINER_FENCE_SECONDS": "4",
    "MILLINER_SWEEP_SECONDS": "0.5",
    "MILLINER_RERING_SECONDS": "2",
    "MILLINER_CRASH_BACKOFF_SECONDS": "0.2",
}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    """What `up --json` printed. It ends with the tests, even if they are killed."""
    data = tmp_path_factory.mktemp("stack")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MILLINER_")}
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "deploy.local", "up", "--data", str(data), "--json"],
        cwd=ROOT,
        env=clean | SHORT,
        stdout=subprocess.PIPE,
        process_group=0,
        preexec_fn=binding(SIGTERM),  # noqa: PLW1509 (pytest has one thread here)
    )
    with supervisor:
        assert supervisor.stdout is not None
        printed = supervisor.stdout.readline()
        try:
            assert printed, "the stack did not start; its words are above"
            yield Record.model_validate_json(printed)
        finally:
            supervisor.terminate()
