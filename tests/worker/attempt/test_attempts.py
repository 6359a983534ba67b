"""What an attempt does about a stuck trainer, a full disk, too little memory, and damaged objects.

One attempt at a time, in this process, with its own database and work directory; the trainers are small commands.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from shared import linux, settings, storage
from shared.broker.queues import Queue
from shared.database import attempts, claims, jobs, state_machine
from shared.database.session import session_scope
from shared.database.tables import Job, JobEvent
from shared.schemas.requests import Desired, State
from shared.schemas.results import Metrics
from worker.attempt.runner import run_next

Attempt = Callable[..., Job]


@pytest.fixture
def attempt(job: str, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Run one attempt at the queued job with the given settings, and return the job's row."""

    def once(**values: str) -> Job:
        for name, value in values.items():
            monkeypatch.setenv(f"MILLINER_{name}", value)
        settings.get_settings.cache_clear()
        run_next(Queue.TRAIN, owner="here", slot=0, draining=lambda: False)
        with session_scope() as session:
            return session.get_one(Job, job)

    return once


def test_a_silent_trainer_is_stuck_and_its_job_fails_after_too_many_crashes(attempt: Attempt) -> None:
    values = {"TRAINER_COMMAND": "sh -c 'echo loading >&2; sleep 600'", "STUCK_SECONDS": "0.3", "MAX_CRASHES": "2"}
    first = attempt(**values)
    assert (first.state, first.reason, first.crash_count) == (State.QUEUED, state_machine.Reason.CRASHED, 1)
    second = attempt(**values)
    assert (second.state, second.reason) == (State.FAILED, state_machine.Reason.POISON)
    assert second.error is not None
    assert (second.error["code"], second.error["last_log_lines"]) == ("trainer_stuck", ["loading"])


def test_a_job_that_crashed_too_often_names_the_last_signal_and_gives_advice(attempt: Attempt) -> None:
    job = attempt(TRAINER_COMMAND="sh -c 'echo so far >&2; kill -9 $$'", MAX_CRASHES="1")
    assert job.error is not None
    assert (job.state, job.reason, job.error["code"]) == (State.FAILED, state_machine.Reason.POISON, "trainer_crashed")
    assert "SIGKILL" in job.error["message"]
    assert "out of memory" in job.error["message"]
    assert "max_length" in job.error["hint"]
    assert job.error["last_log_lines"] == ["so far"]


def test_a_full_disk_gives_the_job_back_without_counting_a_crash(attempt: Attempt, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=False).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        (disk / "ballast").write_bytes(bytes(64 * 1024))
        job = attempt(CACHE_DIR=str(disk))
        assert (job.state, job.reason, job.crash_count) == (State.QUEUED, state_machine.Reason.PREEMPTED, 0)
        assert "worker's disk is full" in events(job)[-1]
        with session_scope() as session:
            assert session.scalar(select(Job.not_before > Job.created_at).where(Job.id == job.id))
        assert [path.name for path in (disk / "work").iterdir()] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_worker_with_a_full_disk_claims_no_job(attempt: Attempt) -> None:
    job = attempt(MIN_FREE_BYTES=str(2**62))
    assert (job.state, job.attempt) == (State.QUEUED, 0)


def test_an_out_of_memory_kill_steps_down_until_the_last_fallback_level(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's counter is faked, because no test may exhaust the machine's memory. The kill is real."""
    kills = iter(range(100))
    monkeypatch.setattr(linux, "oom_kill_count", lambda: next(kills))
    values = {"TRAINER_COMMAND": "sh -c 'kill -9 $$'", "MAX_CRASHES": "1"}
    # Micro-batch 4 → 2 → 1, then activations recomputed, then examples unpacked.
    for level in (1, 2, 3, 4):
        job = attempt(**values)
        assert (job.reason, job.fallback_level, job.crash_count) == (state_machine.Reason.OUT_OF_MEMORY, level, 0)
    last = attempt(**values)
    assert (last.state, last.reason) == (State.FAILED, state_machine.Reason.POISON)
    assert last.error is not None
    assert "out of memory" in last.error["message"]


def test_a_supervisor_without_progress_is_killed_so_that_its_lease_expires(as_worker: None) -> None:
    hung = """
        import time
        from shared.linux import boot_time
        from worker.attempt.lease import Lease
        with Lease("ftjob-none", 1, boot_time()):
            time.sleep(60)
    """
    environment = {"MILLINER_STUCK_SECONDS": "0.3", "MILLINER_HEARTBEAT_SECONDS": "30"}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(hung)],
        env=os.environ | environment,
        timeout=50,
        check=False,
        capture_output=True,
    )
    assert process.returncode == -9, process.stderr


def test_a_job_continues_when_no_log_can_be_written(as_worker: None, attempt: Attempt) -> None:
    """The worker's stderr is a full disk."""
    script = """
        from shared.broker.queues import Queue
        from shared.telemetry import configure, log
        from worker.attempt.runner import run_next
        configure("worker")
        log.info("disk.fills")
        assert run_next(Queue.TRAIN, owner="here", slot=0, draining=lambda: False)
    """
    with Path("/dev/full").open("w") as full:
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=os.environ | {"MILLINER_TRAINER_COMMAND": "sh -c 'exit 3'"},
            stderr=full, stdout=full, timeout=60, check=True,
        )  # fmt: skip
    job = attempt(MIN_FREE_BYTES=str(2**62))
    assert (job.attempt, job.crash_count, job.reason) == (1, 1, state_machine.Reason.CRASHED)


def test_a_requested_pause_survives_an_out_of_memory_kill(attempt: Attempt) -> None:
    job = attempt(MIN_FREE_BYTES=str(2**62))
    with session_scope() as session:
        claimed = claims.claim(session, Queue.TRAIN, owner="w", lease_seconds=60)
        assert claimed is not None
        assert claimed.id == job.id
        jobs.set_desired_state(session, job.tenant_id, job.id, Desired.PAUSE)
    with session_scope() as session:
        assert attempts.step_down(session, job.id, claimed.lease_epoch)
        assert session.get_one(Job, job.id, populate_existing=True).state == State.PAUSED


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    attempt: Attempt, job: str, tmp_path: Path
) -> None:
    """The newest has other bytes in the bucket than its row says. The trainer is `cat`, which sends invalid events."""
    with session_scope() as session:
        claimed = claims.claim(session, Queue.TRAIN, owner="w", lease_seconds=60)
        assert claimed is not None
    for step in (20, 40):
        folder = tmp_path / str(step)
        folder.mkdir()
        (folder / "state.json").write_text(str(step))
        prefix = f"checkpoints/{claimed.tenant_id}/{job}/1/{step}/"
        files = storage.put_folder(prefix, folder)
        metrics = Metrics(step=step, total_steps=60)
        with session_scope() as session:
            assert attempts.add_checkpoint(session, job, 1, step=step, prefix=prefix, files=files, metrics=metrics)
    storage.put_bytes(f"{prefix}state.json", b"41")
    with session_scope() as session:
        assert attempts.release(session, job, 1)
    after = attempt(TRAINER_COMMAND="sh -c cat")
    messages = events(after)
    assert any("Checkpoint of step 40 is damaged; trying the one before it" in message for message in messages)
    assert "Resuming from the checkpoint of step 20" in messages


def events(job: Job) -> list[str]:
    with session_scope() as session:
        mine = select(JobEvent.message).where(JobEvent.job_id == job.id).order_by(JobEvent.seq)
        return list(session.scalars(mine).all())


def test_a_damaged_start_adapter_fails_the_job(attempt: Attempt, job: str) -> None:
    storage.put_bytes("adapters/changed/adapter_model.safetensors", b"other bytes")
    with session_scope() as session:
        row = session.get_one(Job, job)
        row.start_name, row.start_prefix, row.start_sha256 = "ft:x", "adapters/changed/", "0" * 64
    ended = attempt(TRAINER_COMMAND="false")
    assert (ended.state, ended.attempt) == (State.FAILED, 1)
    assert ended.error is not None
    assert ended.error["code"] == "object_lost"
    assert "adapters/changed/adapter_model.safetensors" in ended.error["message"]
    assert "start from another adapter" in ended.error["hint"]
