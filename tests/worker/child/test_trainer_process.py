"""The parent's side of a trainer process, with a real child."""

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
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainerProcess]:
    monkeypatch.setenv("MILLINER_S3_SECRET_KEY", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    trainer = TrainerProcess(tmp_path, visible_device="")
    yield trainer
    trainer.close()


def test_the_child_answers_with_the_jobs_id(trainer: TrainerProcess, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    trainer.send(Prepare(job="ftjob-1", task=task(tmp_path, empty)))
    phase, failed = receive(trainer), receive(trainer)
    assert isinstance(phase, PhaseEntered)
    assert isinstance(failed, Failed)
    assert failed.job == "ftjob-1"
    assert not failed.retryable


def test_the_environment_has_no_secret_of_the_parent(trainer: TrainerProcess) -> None:
    environ = Path(f"/proc/{trainer.pid}/environ").read_text()
    assert "s3cret" not in environ
    assert "HF_HUB_OFFLINE=1" in environ


def test_the_signal_that_killed_a_child_is_reported(trainer: TrainerProcess) -> None:
    os.kill(trainer.pid, signal.SIGKILL)
    with pytest.raises(Died, match="killed by SIGKILL") as ended:
        receive(trainer)
    assert ended.value.signal == "SIGKILL"


def test_freezing_stops_the_child_and_thawing_continues_it(trainer: TrainerProcess) -> None:
    trainer.freeze()
    assert trainer.frozen
    wait_for_state(trainer.pid, "T")
    trainer.thaw()
    assert not trainer.frozen
    wait_for_state(trainer.pid, "SR")


def test_a_dead_child_can_be_signalled_and_closed_again(trainer: TrainerProcess) -> None:
    trainer.close()
    trainer.kill()
    trainer.freeze()
    assert not trainer.frozen


def receive(trainer: TrainerProcess) -> object:
    deadline = time.monotonic() + 60
    while (event := trainer.receive(timeout=1)) is None:
        assert time.monotonic() < deadline, trainer.last_log_lines()
    return event


def wait_for_state(pid: int, states: str) -> None:
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in states:
        assert time.monotonic() < deadline
        time.sleep(0.01)
