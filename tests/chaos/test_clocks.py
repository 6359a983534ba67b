"""Clocks that are wrong, and processes that stand still past their lease and then go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.fleet import Fleet, kill
from tests.chaos.servers import Servers, until

SKEW = Path(__file__).with_name("skew")
HOUR = 3600


def test_workers_an_hour_ahead_and_an_hour_behind_share_the_work(
    fleet: Callable[..., Fleet], servers: Servers, figures: Callable[[dict[str, Any]], None]
) -> None:
    """Their wall clock is that of Python's `time.time`; what decides is Postgres's clock, and the boot-time clock."""
    ours = fleet(servers, workers=2, slots=2)
    for name, seconds in (("train-0", HOUR), ("train-1", -HOUR), ("prepare", HOUR)):
        ours.relaunch(name, PYTHONPATH=str(SKEW), SKEW_SECONDS=str(seconds))
    ours.submit(8, max_steps=200)
    until(lambda: len(ours.training()) == 4, "both workers train")
    victim, other, *_ = ours.training()
    assert kill(victim.slot)
    running = other.job
    until(
        lambda: (ours.client.fine_tuning.jobs.retrieve(running).model_extra or {})["progress"] is not None, "progress"
    )
    told = ours.client.fine_tuning.jobs.retrieve(running)
    if told.status == "running" and told.estimated_finish is not None:
        assert abs(told.estimated_finish - time.time()) < HOUR / 2
    ours.settle()
    found = ours.check()
    ours.check_adapters()
    assert set(ours.states().values()) == {"succeeded"}
    assert (found.overlaps, found.crashes) == (0, 1)
    figures(found._asdict())


def test_supervisor_and_trainer_stand_still_past_the_lease_and_then_go_on(
    fleet: Callable[..., Fleet], servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """As a machine does that is suspended. The job has a successor by then; the sleepers wake up together."""
    ours = fleet(servers, workers=2, slots=2)
    for _ in range(size(2, 30)):
        sleep_past_the_lease(ours)
    ours.settle()
    found = ours.check()
    ours.check_adapters()
    assert set(ours.states().values()) == {"succeeded"}
    assert found.overlaps == 0
    figures(found._asdict())


def sleep_past_the_lease(ours: Fleet) -> None:
    """Stop a slot and its trainer until another attempt trains, then wake them up."""
    [job] = ours.submit(max_steps=400, save_every=50, step_ms=20)
    until(lambda: len(ours.said(job).splitlines()) > 10, "the job trains")
    sleeper = next(trainer for trainer in ours.look().trainers if trainer.job == job)
    for pid in (sleeper.slot, sleeper.pid):
        os.kill(pid, signal.SIGSTOP)
    until(lambda: int(ours.said(job).splitlines()[-1].split()[0]) > sleeper.epoch, "its successor trains")
    for pid in (sleeper.pid, sleeper.slot):
        os.kill(pid, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{sleeper.pid}/cwd").exists(), "the zombie's trainer is killed")
