"""The supervisor with real servers: what a stack provides, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest
from openai import OpenAI

from deploy.local import servers, services
from deploy.local.folder import Folder, Record

ROOT = Path(__file__).resolve().parents[3]
ENV = {name: value for name, value in os.environ.items() if not name.startswith("MILLINER_")}


def milliner(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.local", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=False, timeout=150)


def up(data: Path) -> Record:
    """Start a stack in the background, without the base model, whose import takes half a minute."""
    done = milliner("up", "--data", str(data), "--detach", "--json", "--no-base-model")
    assert done.returncode == 0, done.stderr
    return Record.model_validate_json(done.stdout)


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a stack that these tests may stop and kill; each test starts it with `up`."""
    data = tmp_path_factory.mktemp("own")
    yield data
    milliner("down", "--data", str(data))


# ---------------------------------------------------------------- the shared stack


def test_every_part_answers(stack: Record) -> None:
    assert servers.postgres_answers(stack.database_url)
    assert servers.valkey_answers(stack.redis_url)
    servers.try_s3(stack.s3)
    assert services.api_ready(stack.base_url)
    assert all(not gone(pid) for pid in vars(stack.pids).values())
    with OpenAI(base_url=stack.base_url, api_key=stack.api_key) as client:
        assert services.BUNDLED in [model.id for model in client.models.list()]


def test_wrong_passwords_are_refused(stack: Record) -> None:
    wrong = stack.database_url.replace("milliner:", "milliner:x", 1)
    assert not servers.postgres_answers(wrong)
    assert not servers.valkey_answers(stack.redis_url.replace("://:", "://:x"))
    assert not servers.s3_answers(stack.s3.model_copy(update={"secret_key": "x" * 43}))


def test_only_the_owner_can_read_the_folder(stack: Record) -> None:
    data = Path(stack.data)
    private = [data / name for name in ("secrets.json", "stack.json", "ports.json", "lock", "valkey/valkey.conf")]
    modes = {path: path.stat().st_mode & 0o777 for path in (data, *private, *(data / "logs").iterdir())}
    assert modes.pop(data) == 0o700
    assert set(modes.values()) == {0o600}, modes


def test_no_secret_is_on_a_command_line(stack: Record) -> None:
    lines = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in vars(stack.pids).values()).decode()
    secrets = Folder(Path(stack.data)).secrets().model_dump().values()
    assert not [secret for secret in secrets if secret in lines]


def test_a_second_up_is_refused(stack: Record) -> None:
    second = milliner("up", "--data", stack.data)
    assert second.returncode == 1
    assert "already runs" in second.stderr
    assert stack.base_url in second.stderr
    assert second.stdout == ""


def test_a_second_up_with_json_prints_the_running_stack(stack: Record) -> None:
    second = milliner("up", "--data", stack.data, "--detach", "--json")
    assert second.returncode == 0
    assert json.loads(second.stdout)["base_url"] == stack.base_url


@pytest.mark.parametrize("name", ["api", "valkey"])
def test_a_killed_process_is_restarted(stack: Record, name: str) -> None:
    folder = Folder(Path(stack.data))
    pid = getattr(folder.record().pids, name)  # type: ignore[union-attr]  # the stack runs
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: (record := folder.record()) is not None and getattr(record.pids, name) != pid)
    assert until(lambda: services.api_ready(stack.base_url) and servers.valkey_answers(stack.redis_url))
    record = folder.record()
    assert record is not None
    assert until(lambda: services.worker_listens(record.pids.train, stack.redis_url))
    assert record.model_copy(update={"pids": stack.pids}) == stack, "nothing but a pid has changed"


def test_two_stacks_run_side_by_side(stack: Record, own: Path) -> None:
    other = up(own)
    assert other.data != stack.data
    assert other.api_key != stack.api_key
    assert services.api_ready(other.base_url)
    assert services.api_ready(stack.base_url)
    ports, others = (set(vars(Folder(Path(record.data)).last_ports()).values()) for record in (stack, other))
    assert ports.isdisjoint(others)


# ---------------------------------------------------------------- a separate stack


def test_data_survives_down_and_up(own: Path) -> None:
    before = up(own)
    with psycopg.connect(before.database_url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    servers.s3_client(before.s3).put_object(Bucket=before.s3.bucket, Key="kept", Body=b"x" * 5_000_000)
    ended = milliner("down", "--data", str(own))
    assert ended.returncode == 0
    assert "has ended" in ended.stderr
    assert all(until(partial(gone, pid), 5) for pid in vars(before.pids).values())
    assert Folder(own).record() is None

    after = up(own)
    assert after.model_copy(update={"pids": before.pids}) == before, "ports, passwords and the key are the same"
    with psycopg.connect(after.database_url) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
    assert len(servers.s3_client(after.s3).get_object(Bucket=after.s3.bucket, Key="kept")["Body"].read()) == 5_000_000


def test_keys_are_made_listed_and_revoked(own: Path) -> None:
    record = up(own)
    secret = milliner("keys", "add", "acme", "--data", str(own)).stdout.strip()
    with OpenAI(base_url=record.base_url, api_key=secret, max_retries=0) as client:
        assert client.models.list().data == []
    key_id = secret.split("_")[1]
    listed = json.loads(milliner("keys", "ls", "--data", str(own), "--json").stdout)["data"]
    assert {"acme", "local"} <= {row["tenant"] for row in listed}
    assert milliner("keys", "revoke", key_id, "--data", str(own)).returncode == 0
    again = milliner("keys", "revoke", key_id, "--data", str(own))
    assert again.returncode == 1
    assert "no live key" in again.stderr


def test_killing_the_supervisor_ends_all_its_children(own: Path) -> None:
    before = up(own)
    os.kill(before.pids.supervisor, signal.SIGKILL)
    assert until(lambda: all(map(gone, vars(before.pids).values())), 40)
    after = up(own)
    assert after.model_copy(update={"pids": before.pids}) == before


def test_down_without_a_stack_reports_that_none_runs(tmp_path: Path) -> None:
    ended = milliner("down", "--data", str(tmp_path / "nowhere"))
    assert ended.returncode == 0
    assert "no stack runs" in ended.stderr


def test_a_child_that_cannot_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    """The database cluster has no configuration."""
    cluster = tmp_path / "postgres" / "data"
    cluster.mkdir(parents=True, mode=0o700)
    (cluster / "PG_VERSION").write_text("9.6\n")
    done = milliner("up", "--data", str(tmp_path), "--no-base-model")
    assert done.returncode == 1
    assert "postgres ended with exit code" in done.stderr
    assert "postgresql.conf" in done.stderr
    assert Folder(tmp_path).wait_until_stopped(timeout=5)
