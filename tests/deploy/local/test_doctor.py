"""`milliner doctor` reports what works, what does not, and how to fix it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from deploy.local.folder import Folder, Record

ROOT = Path(__file__).resolve().parents[3]


def doctor(data: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MILLINER_")} | settings
    command = [sys.executable, "-m", "deploy.local", "doctor", "--data", str(data), *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)


def failed(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return name and fix of each part that is not ok."""
    return {check["name"]: check["mend"] for check in json.loads(done.stdout)["checks"] if not check["ok"]}


def test_a_healthy_stack_passes_every_check(stack: Record) -> None:
    done = doctor(Path(stack.data))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("✓") == 12
    assert "✗" not in done.stdout


def test_a_server_that_hangs_is_reported(stack: Record) -> None:
    record = Folder(Path(stack.data)).record()
    assert record is not None
    os.kill(record.pids.valkey, signal.SIGSTOP)
    try:
        done = doctor(Path(stack.data), "--json")
    finally:
        os.kill(record.pids.valkey, signal.SIGCONT)
    assert done.returncode == 1
    assert "MILLINER_REDIS_URL" in failed(done)["redis"]


def test_without_a_stack_it_prints_how_to_start_one(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert done.returncode == 1
    assert "✗" in done.stdout
    assert "milliner up --data" in done.stdout


def test_servers_named_by_settings_are_checked(stack: Record, tmp_path: Path) -> None:
    named = {
        "MILLINER_DATABASE_URL": stack.database_url,
        "MILLINER_REDIS_URL": stack.redis_url,
        "MILLINER_S3_ENDPOINT": stack.s3.endpoint,
        "MILLINER_S3_BUCKET": stack.s3.bucket,
        "MILLINER_S3_ACCESS_KEY": stack.s3.access_key,
        "MILLINER_S3_SECRET_KEY": stack.s3.secret_key,
    }
    assert doctor(tmp_path, **named).returncode == 0
    assert set(failed(doctor(tmp_path, "--json", **named | {"MILLINER_S3_BUCKET": "elsewhere"}))) == {"s3"}
    empty = named | {"MILLINER_DATABASE_URL": stack.database_url.removesuffix("milliner") + "postgres"}
    assert set(failed(doctor(tmp_path, "--json", **empty))) == {"postgres", "base models"}
