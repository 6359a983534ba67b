"""The parent's end of the pipe, with the real child at the other end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.bare_task import task
from worker.child.trainer_process import Died, TrainerProcess
from worker.trainer.protocol import Failed, PhaseEntered, Prepare


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainerProcess]:
    monkeypatch.setenv("MILLINER_S3_SECRET_KEY", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    session = TrainerProcess(tmp_path, visible_device="")
    yield session
    session.close()


def test_the_child_answers_with_the_jobs_id(session: TrainerProcess, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    session.send(Prepare(job="ftjob-1", task=task(tmp_path, empty)))
    phase, failed = hear(session), hear(session)
    assert isinstance(phase, PhaseEntered)
    assert isinstance(failed, Failed)
    assert failed.job == "ftjob-1"
    assert not failed.retryable


def test_the_environment_is_built_from_nothing(session: TrainerProcess) -> None:
    environ = Path(f"/proc/{session.pid}/environ").read_text()
    assert "s3cret" not in environ
    assert "HF_HUB_OFFLINE=1" in environ


def test_a_killed_child_is_ended_with_its_signal(session: TrainerProcess) -> None:
    os.kill(session.pid, signal.SIGKILL)
    with pytest.raises(Died, match="killed by SIGKILL") as ended:
        hear(session)
    assert ended.value.signal == "SIGKILL"


def test_freezing_stops_the_whole_group_and_thawing_lets_it_go_on(session: TrainerProcess) -> None:
    session.freeze()
    assert session.frozen
    in_state(session.pid, "T")
    session.thaw()
    assert not session.frozen
    in_state(session.pid, "SR")


def test_a_dead_child_can_be_signalled_and_closed_again(session: TrainerProcess) -> None:
    session.close()
    session.kill()
    session.freeze()
    assert not session.frozen


def hear(session: TrainerProcess) -> object:
    deadline = time.monotonic() + 60
    while (event := session.receive(timeout=1)) is None:
        assert time.monotonic() < deadline, session.last_log_lines()
    return event


def in_state(pid: int, states: str) -> None:
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in states:
        assert time.monotonic() < deadline
        time.sleep(0.01)
