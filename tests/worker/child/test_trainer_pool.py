"""A kept trainer does the next work like a new one, and keeps nothing of the last."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.settings import get_settings
from tests.worker.bare_task import task
from worker.child import trainer_pool
from worker.child.trainer_pool import Purpose
from worker.child.trainer_process import TrainerProcess
from worker.trainer.protocol import Failed, Prepare


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MILLINER_CACHE_DIR", str(tmp_path / "cache"))
    get_settings.cache_clear()
    yield tmp_path / "cache" / "work"
    for purpose in Purpose:
        trainer_pool.dismiss(purpose)
    get_settings.cache_clear()


def test_a_kept_trainer_is_reused_and_a_closed_one_leaves_no_files(cache: Path) -> None:
    first = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, first)
    assert trainer_pool.take(Purpose.WORK, visible_device="") is first
    other = trainer_pool.take(Purpose.WORK, visible_device="")
    assert other.pid != first.pid
    trainer_pool.keep(Purpose.WORK, first)
    trainer_pool.keep(Purpose.WORK, other)
    assert not first.is_running()
    assert trainer_pool.take(Purpose.WORK, visible_device="") is other
    trainer_pool.close(other)
    assert not list(cache.iterdir())


def test_a_trainer_that_has_worked_is_never_used_for_a_proof() -> None:
    used = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, used)
    fresh = trainer_pool.take(Purpose.PROOF, visible_device="")
    assert fresh is not used
    trainer_pool.close(fresh)


def test_a_trainer_of_another_device_is_replaced_and_a_frozen_one_is_thawed() -> None:
    first = trainer_pool.take(Purpose.WORK, visible_device="")
    first.freeze()
    trainer_pool.keep(Purpose.WORK, first)
    until(first.is_stopped)
    assert trainer_pool.take(Purpose.WORK, visible_device="") is first
    until(lambda: not first.is_stopped())
    trainer_pool.keep(Purpose.WORK, first)
    second = trainer_pool.take(Purpose.WORK, visible_device="1")
    assert second is not first
    assert not first.is_running()
    trainer_pool.close(second)


def test_a_trainer_that_died_while_idle_is_replaced() -> None:
    first = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, first)
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not first.is_running())
    second = trainer_pool.take(Purpose.WORK, visible_device="")
    assert second is not first
    trainer_pool.close(second)


def test_an_idle_trainer_is_closed_after_warm_seconds(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("MILLINER_WARM_SECONDS", "0.1")
    get_settings.cache_clear()
    trainer = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, trainer)
    until(lambda: not trainer.is_running() and not list(cache.iterdir()))
    monkeypatch.setenv("MILLINER_WARM_SECONDS", "0")
    get_settings.cache_clear()
    trainer = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, trainer)
    assert not trainer.is_running()


def test_log_lines_of_earlier_work_are_hidden(llama: str) -> None:
    """Lines of another tenant's job may be in the same log."""
    trainer = trainer_pool.take(Purpose.WORK, visible_device="")
    send_failing_command(trainer, llama, "first")
    assert any("Traceback" in line for line in trainer.last_log_lines())
    trainer_pool.keep(Purpose.WORK, trainer)
    assert trainer_pool.take(Purpose.WORK, visible_device="").last_log_lines() == []
    send_failing_command(trainer, llama, "second")
    assert any("Traceback" in line for line in trainer.last_log_lines())
    trainer_pool.close(trainer)


def test_an_idle_trainer_does_not_freeze_itself(llama: str) -> None:
    """Even if it gets no `alive` for longer than `silence_seconds`."""
    trainer = trainer_pool.take(Purpose.WORK, visible_device="")
    send_failing_command(trainer, llama, "first", silence=0.5)
    time.sleep(1.5)
    assert not trainer.is_stopped()
    send_failing_command(trainer, llama, "second", silence=0.5)
    trainer_pool.close(trainer)


def send_failing_command(trainer: TrainerProcess, base: str, job: str, *, silence: float = 60.0) -> None:
    """Send a command that fails with a traceback, because its dataset is a folder; wait for the failure."""
    failing = task(Path(base), Path(base)).model_copy(update={"silence_seconds": silence})
    trainer.send(Prepare(job=job, task=failing))
    deadline = time.monotonic() + 60
    while not isinstance(event := trainer.receive(timeout=0.05), Failed):
        trainer.send_alive(job)
        if trainer.is_stopped():
            trainer.thaw()
        assert time.monotonic() < deadline
    assert (event.job, event.retryable) == (job, True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
