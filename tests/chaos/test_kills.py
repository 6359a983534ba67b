"""kill -9 of our processes at random moments, and SIGTERM at random steps: nothing is lost, and the cost is measured.

Servers stay up here. The seeds are fixed, so that a run can be repeated as far as the kernel's scheduler allows.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import Event, Thread
from typing import Any, NamedTuple

from tests.chaos.fleet import SHORT, Fleet, kill, now, percentile
from tests.chaos.servers import Servers, until

KILLS = {"trainer": 100, "slot": 65, "main": 20, "api": 20}
SOAK_KILLS = {"trainer": 450, "slot": 400, "main": 100, "api": 100}
#: Most kills of one job: its back-off doubles with each crash, and the kills should reach many jobs.
MOST_KILLS = 5
LONGEST_RECOVERY = float(SHORT["MILLINER_LEASE_SECONDS"]) + float(SHORT["MILLINER_SWEEP_SECONDS"]) + 5.0
LONGEST_DRAIN = 25.0


class Line(NamedTuple):
    """One witness line."""

    epoch: int
    step: int
    at: float


@dataclass(frozen=True)
class Kill:
    """What was killed, when, and which attempts it ended (job → epoch)."""

    kind: str
    at: float
    attempts: dict[str, int]


def test_random_kills_lose_no_job(
    fleet: Callable[..., Fleet], servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """Trainers, slots, Celery mains and the API are killed while jobs are submitted and run."""
    ours = fleet(servers, workers=2, slots=4, settings={"MILLINER_CRASH_BACKOFF_SECONDS": "0.001"})
    chance, kills, began = random.Random(3), list[Kill](), time.monotonic()
    planned = [kind for kind, count in size(KILLS, SOAK_KILLS).items() for _ in range(count)]
    chance.shuffle(planned)
    with steady_jobs(ours, chance, at_once=9):
        for kind in planned:
            kills.append(one_kill(ours, kind, chance, kills))
    storm_seconds = time.monotonic() - began
    ours.settle()
    states = ours.states()
    assert {state for job, state in states.items() if job in set(ours.accepted)} == {"succeeded"}
    found, compared = ours.check(), ours.check_adapters()
    recoveries = recovered(ours, kills)
    figures(
        {
            "kills": {kind: planned.count(kind) for kind in KILLS},
            "storm_seconds": round(storm_seconds, 1),
            **found._asdict() | {"steps_repeated": sum(found.steps_repeated)},
            "adapters_compared": compared,
            "steps_repeated_per_restart": round(sum(found.steps_repeated) / max(1, len(found.steps_repeated)), 2),
            "recovery_seconds": {
                kind: {"n": len(v), "p50": round(percentile(v, 0.5), 2), "p95": round(percentile(v, 0.95), 2)}
                for kind, v in recoveries.items()
            },
        }
    )
    assert found.overlaps == 0
    assert compared == found.jobs
    share = size(0.5, 0.95)  # a CI machine may be busy
    assert percentile(recoveries["trainer"] + recoveries["slot"], share) <= LONGEST_RECOVERY


def test_a_drained_worker_loses_no_step(
    fleet: Callable[..., Fleet], servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """SIGTERM at random steps: exit code 0 in time, and every job continues with its next step."""
    ours = fleet(servers, workers=2, slots=3)

    def drain(name: str) -> list[float]:
        chance = random.Random(name)
        return [one_drain(ours, name, chance) for _ in range(size(8, 50))]

    with steady_jobs(ours, random.Random(4), at_once=6, step_ms=60), ThreadPoolExecutor() as pool:
        drains = [seconds for each in pool.map(drain, ["train-0", "train-1"]) for seconds in each]
    ours.settle()
    found, compared = ours.check(), ours.check_adapters()
    figures(
        {
            "drains": len(drains),
            "drain_seconds": {"p50": round(percentile(drains, 0.5), 2), "max": round(max(drains), 2)},
            **found._asdict() | {"steps_repeated": sum(found.steps_repeated)},
            "adapters_compared": compared,
        }
    )
    assert max(drains) <= LONGEST_DRAIN
    assert found.crashes == 0
    assert found.preemptions > 0
    assert compared == found.jobs
    for job in ours.accepted:
        lines = witness(ours, job)
        assert [line.step for line in lines] == list(range(1, len(lines) + 1)), f"{job} lost or repeated a step"


@contextmanager
def steady_jobs(fleet: Fleet, chance: random.Random, *, at_once: int, step_ms: int = 40) -> Iterator[None]:
    """Keep `at_once` jobs of 20 to 60 steps unfinished while the block lasts."""
    over, lengths = Event(), random.Random(chance.random())

    def feed() -> None:
        while not over.wait(0.1):
            if len(fleet.unfinished()) < at_once:
                fleet.submit(1, step_ms=step_ms, max_steps=lengths.randint(20, 60), save_every=lengths.randint(5, 20))

    feeder = Thread(target=feed, name="feeder")
    feeder.start()
    try:
        until(fleet.training, "a job trains")
        yield
    finally:
        over.set()
        feeder.join()


def one_kill(fleet: Fleet, kind: str, chance: random.Random, before: list[Kill]) -> Kill:
    """Kill one process of a kind after a short random time.

    A trainer (or its slot) has then begun zero to nine steps. A Celery main is killed only while all others run:
    otherwise the test would measure how long Celery takes to start.
    """
    time.sleep(chance.uniform(0.02, 0.3))
    kills_of = Counter(job for each in before for job in each.attempts)
    steps, pick = chance.randint(0, 9), chance.random()
    while True:
        now_running = fleet.processes()
        candidates = [t for t in now_running.trainers if kills_of[t.job] < MOST_KILLS and fleet.steps_of(t) >= steps]
        all_running = {"api", *(slot.program for slot in now_running.slots)} == set(fleet.env)
        pids = {
            "api": [fleet.main("api")],
            "main": list(now_running.mains.values()) if all_running else [],
            "slot": [trainer.slot for trainer in candidates],
            "trainer": [trainer.pid for trainer in candidates],
        }[kind]
        victim, at = sorted(pids)[int(pick * len(pids))] if pids else None, now()
        if victim is not None and kill(victim):
            mains = now_running.mains
            slots = {slot.pid for slot in now_running.slots if victim in (slot.pid, mains.get(slot.program))}
            return Kill(kind, at, {t.job: t.epoch for t in now_running.trainers if t.pid == victim or t.slot in slots})
        time.sleep(0.05)


def one_drain(fleet: Fleet, name: str, chance: random.Random) -> float:
    """Send SIGTERM to a training worker at a random step; returns the seconds until it exited with 0."""

    def trains() -> bool:
        now_running = fleet.processes()
        mine = {slot.pid for slot in now_running.slots if slot.program == name}
        return any(trainer.slot in mine for trainer in fleet.training())

    until(trains, f"{name} trains")
    time.sleep(chance.uniform(0, 1))
    process, asked_at = fleet.crew.process(name), time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(2 * LONGEST_DRAIN) == 0
    return time.monotonic() - asked_at


def recovered(fleet: Fleet, kills: list[Kill]) -> dict[str, list[float]]:
    """Seconds from a kill to the next step of each job that it interrupted, by kind of kill.

    If a job was killed again before that step, only the later kill counts. Jobs without a remaining step are left out.
    So are jobs without a step before the kill, because they wait for their turn.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for job in fleet.accepted:
        lines = witness(fleet, job)
        mine = [each for each in kills if job in each.attempts]
        for i, each in enumerate(mine):
            end = mine[i + 1].at if i + 1 < len(mine) else math.inf
            if not any(line.at < each.at for line in lines):
                continue
            after = [line.at for line in lines if line.epoch > each.attempts[job] and line.at > each.at]
            if after and after[0] < end:
                found[each.kind].append(after[0] - each.at)
    return found


def witness(fleet: Fleet, job: str) -> list[Line]:
    """Every step that any attempt began, in file order, which must also be the order of time."""
    rows = [line.split() for line in fleet.witness_of(job).splitlines()]
    lines = [Line(int(epoch), int(step), float(at)) for epoch, step, _, at in rows]
    assert all(a.at <= b.at for a, b in pairwise(lines))
    return lines
