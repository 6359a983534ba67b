"""A trainer that is kept does the next piece of work as a fresh one would, and knows nothing of the last."""

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


def test_what_is_kept_is_taken_again_and_what_is_closed_leaves_nothing(cache: Path) -> None:
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


def test_proof_is_never_given_to_one_that_has_worked() -> None:
    worked = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, worked)
    proves = trainer_pool.take(Purpose.PROOF, visible_device="")
    assert proves is not worked
    trainer_pool.close(proves)


def test_one_for_another_device_is_not_taken_and_one_that_is_frozen_goes_on() -> None:
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


def test_one_that_died_while_idle_is_replaced() -> None:
    first = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, first)
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not first.is_running())
    second = trainer_pool.take(Purpose.WORK, visible_device="")
    assert second is not first
    trainer_pool.close(second)


def test_it_ends_when_nobody_wants_it(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("MILLINER_WARM_SECONDS", "0.1")
    get_settings.cache_clear()
    session = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, session)
    until(lambda: not session.is_running() and not list(cache.iterdir()))
    monkeypatch.setenv("MILLINER_WARM_SECONDS", "0")
    get_settings.cache_clear()
    session = trainer_pool.take(Purpose.WORK, visible_device="")
    trainer_pool.keep(Purpose.WORK, session)
    assert not session.is_running()


def test_log_lines_are_of_this_work_alone(llama: str) -> None:
    """Another tenant's may be in the same log."""
    session = trainer_pool.take(Purpose.WORK, visible_device="")
    ask(session, llama, "first")
    assert any("Traceback" in line for line in session.last_log_lines())
    trainer_pool.keep(Purpose.WORK, session)
    assert trainer_pool.take(Purpose.WORK, visible_device="").last_log_lines() == []
    ask(session, llama, "second")
    assert any("Traceback" in line for line in session.last_log_lines())
    trainer_pool.close(session)


def test_idle_trainer_needs_no_supervisor(llama: str) -> None:
    """For far longer than a busy one may be without a word."""
    session = trainer_pool.take(Purpose.WORK, visible_device="")
    ask(session, llama, "first", silence=0.5)
    time.sleep(1.5)
    assert not session.is_stopped()
    ask(session, llama, "second", silence=0.5)
    trainer_pool.close(session)


def ask(session: TrainerProcess, base: str, job: str, *, silence: float = 60.0) -> None:
    """Something that goes wrong, with a traceback: the dataset is a folder."""
    told = task(Path(base), Path(base)).model_copy(update={"silence_seconds": silence})
    session.send(Prepare(job=job, task=told))
    deadline = time.monotonic() + 60
    while not isinstance(event := session.receive(timeout=0.05), Failed):
        session.tell_alive(job)
        if session.is_stopped():
            session.thaw()
        assert time.monotonic() < deadline
    assert (event.job, event.retryable) == (job, True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
