"""Wrong clocks, and processes that are stopped for longer than their lease and then continue."""

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


def test_workers_with_clocks_an_hour_off_do_all_jobs(
    fleet: Callable[..., Fleet], servers: Servers, figures: Callable[[dict[str, Any]], None]
) -> None:
    """Only `time.time` is wrong. Leases depend on Postgres's clock and on the boot-time clock."""
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
    shown = ours.client.fine_tuning.jobs.retrieve(running)
    if shown.status == "running" and shown.estimated_finish is not None:
        assert abs(shown.estimated_finish - time.time()) < HOUR / 2
    ours.settle()
    found = ours.check()
    ours.check_adapters()
    assert set(ours.states().values()) == {"succeeded"}
    assert (found.overlaps, found.crashes) == (0, 1)
    figures(found._asdict())


def test_a_worker_stopped_past_its_lease_cannot_overlap_its_successor(
    fleet: Callable[..., Fleet], servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """Like a suspended machine: slot and trainer wake up together after another attempt has taken the job."""
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
    """Stop a slot and its trainer until another attempt trains, then continue them."""
    [job] = ours.submit(max_steps=400, save_every=50, step_ms=20)
    until(lambda: len(ours.witness_of(job).splitlines()) > 10, "the job trains")
    sleeper = next(trainer for trainer in ours.processes().trainers if trainer.job == job)
    for pid in (sleeper.slot, sleeper.pid):
        os.kill(pid, signal.SIGSTOP)
    until(lambda: int(ours.witness_of(job).splitlines()[-1].split()[0]) > sleeper.epoch, "its successor trains")
    for pid in (sleeper.pid, sleeper.slot):
        os.kill(pid, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{sleeper.pid}/cwd").exists(), "the zombie's trainer is killed")
