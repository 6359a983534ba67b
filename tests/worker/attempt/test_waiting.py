"""Retries while a server is down, and when an attempt stops retrying. The lease is real, but its threads do not run."""

from __future__ import annotations

import time
from threading import Event
from typing import Any

import pytest

from shared.errors import Unavailable
from shared.linux import boot_time
from shared.schemas.requests import Desired
from worker.attempt import waiting
from worker.attempt.lease import Lease, Lost
from worker.attempt.waiting import Leave, Retry


@pytest.fixture
def lease() -> Lease:
    return Lease("ftjob-none", 1, boot_time())


def test_a_call_is_retried_until_the_server_answers(lease: Lease) -> None:
    answers = iter([Unavailable("down"), "up"])
    assert retry(lease).call(lambda: answer(answers)) == "up"


def test_any_other_error_is_raised(lease: Lease) -> None:
    with pytest.raises(KeyError):
        retry(lease).call(lambda: dict[str, str]()["none"])


def test_a_cancel_abandons_a_server_that_hangs(lease: Lease) -> None:
    silent = Event()
    lease.desired = Desired.CANCEL
    with pytest.raises(Leave):
        retry(lease).call(silent.wait)
    silent.set()


@pytest.mark.parametrize("cause", ["pause", "drain"])
def test_a_pause_or_drain_waits_for_stop_seconds(lease: Lease, cause: str) -> None:
    silent, began = Event(), time.monotonic()
    if cause == "pause":
        lease.desired = Desired.PAUSE
    with pytest.raises(Leave):
        retry(lease, draining=lambda: cause == "drain", stop_seconds=0.5).call(silent.wait)
    assert time.monotonic() - began >= 0.5
    silent.set()


def test_a_drain_retries_after_a_transient_error(lease: Lease) -> None:
    answers = iter([Unavailable("once"), "kept"])
    assert retry(lease, draining=lambda: True, stop_seconds=10).call(lambda: answer(answers)) == "kept"


def test_reading_a_dataset_ignores_a_pause(lease: Lease) -> None:
    lease.desired = Desired.PAUSE
    assert not retry(lease, honours_pause=False).stop_requested()


def test_a_lost_lease_ends_the_retries(lease: Lease) -> None:
    silent = Event()
    lease.lose()
    with pytest.raises(Lost):
        retry(lease).call(silent.wait)
    silent.set()


def test_a_long_outage_is_reported_once(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WARN_AFTER", 0.5)
    warnings: list[str] = []
    answers = iter([Unavailable("no bucket"), Unavailable("no bucket"), "up"])
    assert retry(lease, warn=warnings.append).call(lambda: answer(answers)) == "up"
    assert warnings == ["Waiting for a server that does not answer: no bucket"]


def retry(lease: Lease, **options: Any) -> Retry:
    defaults: dict[str, Any] = {"draining": lambda: False, "warn": print, "honours_pause": True, "stop_seconds": 5.0}
    return Retry(lease, **defaults | options)


def answer(answers: Any) -> str:
    result = next(answers)
    if isinstance(result, Exception):
        raise result
    return str(result)
