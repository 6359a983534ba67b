"""Waiting for a server, and when an attempt stops waiting. The lease is a real one whose threads do not run."""

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
from worker.attempt.waiting import Leave, Patience


@pytest.fixture
def lease() -> Lease:
    return Lease("ftjob-none", 1, boot_time())


def test_an_outage_is_waited_out(lease: Lease) -> None:
    answers = iter([Unavailable("down"), "up"])
    assert made(lease).do(lambda: answer(answers)) == "up"


def test_any_other_error_is_the_callers(lease: Lease) -> None:
    with pytest.raises(KeyError):
        made(lease).do(lambda: dict[str, str]()["none"])


def test_a_cancel_lets_go_of_a_server_that_says_nothing(lease: Lease) -> None:
    silent = Event()
    lease.desired = Desired.CANCEL
    with pytest.raises(Leave):
        made(lease).do(silent.wait)
    silent.set()


@pytest.mark.parametrize("asked", ["pause", "drain"])
def test_a_pause_or_drain_has_its_time(lease: Lease, asked: str) -> None:
    silent, began = Event(), time.monotonic()
    if asked == "pause":
        lease.desired = Desired.PAUSE
    with pytest.raises(Leave):
        made(lease, draining=lambda: asked == "drain", stop_seconds=0.5).do(silent.wait)
    assert time.monotonic() - began >= 0.5
    silent.set()


def test_a_transient_error_costs_a_drain_no_checkpoint(lease: Lease) -> None:
    answers = iter([Unavailable("once"), "kept"])
    assert made(lease, draining=lambda: True, stop_seconds=10).do(lambda: answer(answers)) == "kept"


def test_the_reading_of_a_dataset_heeds_no_pause(lease: Lease) -> None:
    lease.desired = Desired.PAUSE
    assert not made(lease, heeds_pause=False).is_asked_to_leave()


def test_a_lost_lease_ends_the_wait(lease: Lease) -> None:
    silent = Event()
    lease.lose()
    with pytest.raises(Lost):
        made(lease).do(silent.wait)
    silent.set()


def test_a_long_outage_is_told_of_once(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WORTH_TELLING", 0.5)
    told: list[str] = []
    answers = iter([Unavailable("no bucket"), Unavailable("no bucket"), "up"])
    assert made(lease, complain=told.append).do(lambda: answer(answers)) == "up"
    assert told == ["Waiting for a server that does not answer: no bucket"]


def made(lease: Lease, **options: Any) -> Patience:
    plain: dict[str, Any] = {"draining": lambda: False, "complain": print, "heeds_pause": True, "stop_seconds": 5.0}
    return Patience(lease, **plain | options)


def answer(answers: Any) -> str:
    found = next(answers)
    if isinstance(found, Exception):
        raise found
    return str(found)
