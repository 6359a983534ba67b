"""Postgres is restarted, killed, down for longer than a lease, or unreachable for one worker.

An outage may freeze trainers but restarts none. A worker that alone is cut off loses its jobs, and its trainer stops
before that. A job that was answered with 200 exists. The tests of this file share one fleet, on servers of their own.
Three of its workers reach Postgres through proxies; the fourth is always connected.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from deploy.local import servers as local
from tests.chaos.fleet import SHORT, Fleet, Trainer, now
from tests.chaos.servers import Servers, state_of, until

LEASE = float(SHORT["MILLINER_LEASE_SECONDS"])
CUTS = {"train-0": "blackhole", "train-1": "half_open", "train-2": "reset"}
HEALTHY = "train-3"
LONG = {"MILLINER_LEASE_SECONDS": "20", "MILLINER_FENCE_SECONDS": "15"}


class Cut(NamedTuple):
    """An attempt whose worker was cut off. Its lease ends at `lease_ends`, on the clock of the witness lines."""

    program: str
    trainer: Trainer
    lease_ends: float


@pytest.fixture(scope="module")
def shared(own_servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    via = {name: ["postgres"] for name in CUTS}
    fleet = Fleet(own_servers, tmp_path_factory.mktemp("fleet"), workers=4, slots=3, via=via)
    fleet.start()
    yield fleet
    fleet.close()


@pytest.fixture
def ours(shared: Fleet, own_servers: Servers) -> Iterator[Fleet]:
    """The shared fleet. Whatever a failed test has left broken is repaired for the next test."""
    yield shared
    if own_servers.crew.process("postgres").poll() is not None:
        own_servers.start_again("postgres")
    for proxy in shared.proxies.values():
        proxy.heal()
    for name in tuple(shared.kept_down):
        shared.bring_up(name)


def test_restarts_of_postgres_restart_no_trainer(
    ours: Fleet, own_servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """Postgres is restarted as an operator would, while long jobs train and short ones are submitted."""
    chance, mains, outages = random.Random(6), ours.processes().mains, list[float]()
    before = count_in_log(own_servers, "received fast shutdown request")
    jobs = ours.submit(5, step_ms=size(50, 200), max_steps=size(300, 4200), save_every=size(50, 500))
    until(lambda: all(map(ours.witness_of, jobs)), "the long jobs train")
    for _ in range(size(3, 27)):
        with ThreadPoolExecutor() as pool:
            submits, began = pool.submit(ours.submit, 2, step_ms=5), time.monotonic()
            with down(own_servers):
                pass
            outages.append(time.monotonic() - began)
            submits.result()
        time.sleep(chance.uniform(*size((1, 2), (5, 40))))
    assert set(jobs) & set(ours.unfinished()), "the long jobs ended before the last restart"
    succeed(ours)
    figures(
        {
            "restarts": count_in_log(own_servers, "received fast shutdown request") - before,
            "outage_seconds": {"longest": round(max(outages), 1), "mean": round(sum(outages) / len(outages), 1)},
            "renewals_missed": logged(ours, "lease.renewal_failed"),
            **ours.check()._asdict() | {"steps_repeated": 0},
        }
    )
    assert ours.restarted(jobs) == []
    assert count_in_log(own_servers, "received fast shutdown request") - before == len(outages)
    assert ours.processes().mains == mains


def test_postgres_killed_during_submits_and_publishing_loses_no_job(
    ours: Fleet, own_servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """Immediate shutdown and kill -9: every answered job exists once and succeeds."""
    recovered, refused = "automatic recovery in progress", served(ours, 503)
    before, deaths = count_in_log(own_servers, recovered), [signal.SIGQUIT, signal.SIGKILL] * size(2, 25)
    for number in deaths:
        ours.submit(4, step_ms=5, max_steps=10)
        until(lambda: publishing(ours) > 0, "a job is being published")
        with ThreadPoolExecutor() as pool:
            submits = pool.submit(ours.submit, 8, step_ms=5, max_steps=10)
            with down(own_servers, number):
                pass
            submits.result()
    succeed(ours, seconds=600)
    found, compared = ours.check(), ours.check_adapters()
    figures(
        {
            "deaths": len(deaths),
            "submits_refused_and_retried": served(ours, 503) - refused,
            **found._asdict() | {"steps_repeated": sum(found.steps_repeated)},
            "adapters_compared": compared,
        }
    )
    assert count_in_log(own_servers, recovered) - before == len(deaths)
    assert served(ours, 503) > refused
    assert found.overlaps == 0
    assert compared == found.jobs


def test_an_outage_longer_than_the_lease_only_freezes_trainers(
    ours: Fleet, own_servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """Every lease has expired when Postgres is back, but workers get the time to renew first."""
    seconds = size(1.6 * LEASE, 60.0)
    jobs = ours.submit(4, step_ms=50, max_steps=220)
    until(lambda: all(map(ours.witness_of, jobs)), "the jobs train")
    trainers = ours.training()
    assert len(trainers) == len(jobs)
    with down(own_servers):
        began = time.monotonic()
        until(lambda: {state_of(trainer.pid) for trainer in trainers} == {"T"}, "all trainers are frozen")
        frozen, steps = time.monotonic(), [ours.witness_of(job) for job in jobs]
        until(lambda: time.monotonic() > began + seconds, "the outage has lasted", seconds=2 * seconds)
        assert [ours.witness_of(job) for job in jobs] == steps
    back = time.monotonic()
    until(lambda: all(ours.witness_of(job) != was for job, was in zip(jobs, steps, strict=True)), "all train again")
    again = time.monotonic()
    succeed(ours)
    found = ours.check()
    figures(
        {
            "outage_seconds": round(back - began, 1),
            "lease_seconds": LEASE,
            "all_frozen_after_seconds": round(frozen - began, 1),
            "all_train_again_after_seconds": round(again - back, 1),
            "overlaps": found.overlaps,
        }
    )
    assert back - began > LEASE
    assert ours.restarted(jobs) == []


def test_workers_that_are_cut_off_lose_their_jobs_without_overlap(
    ours: Fleet, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """Three workers are cut off at once by different faults; the fourth requeues and finishes their jobs."""
    pids = {name: ours.main(name) for name in CUTS}
    rounds = [one_cut(ours) for _ in range(size(1, 10))]
    ours.submit(6)
    succeed(ours)
    found, compared = ours.check(), ours.check_adapters()
    faults = {name: dict(ours.proxies[name, "postgres"].faults) for name in CUTS}
    figures(
        {
            "cuts": CUTS,
            "rounds": len(rounds),
            "faults": faults,
            "all_frozen_after_seconds": round(max(frozen for frozen, _ in rounds), 1),
            "all_finished_elsewhere_after_seconds": round(max(finished for _, finished in rounds), 1),
            **found._asdict() | {"steps_repeated": sum(found.steps_repeated)},
            "adapters_compared": compared,
        }
    )
    assert all(faults.values())
    assert found.overlaps == 0
    assert {name: ours.main(name) for name in pids} == pids


def test_a_slow_connection_to_postgres_restarts_nothing(
    ours: Fleet, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """300 ms each way (half of that in CI): a transaction takes seconds. The lease is longer, but below the default.

    The slow worker is the only one, because any other would claim the jobs first.
    """
    for name in ours.processes().mains.keys() - {"prepare", "train-0"}:
        ours.keep_down(name)
    ours.relaunch("train-0", **LONG)
    proxy, began = ours.proxies["train-0", "postgres"], now()
    before = proxy.faults["latency"]
    proxy.latency(size(0.15, 0.3))
    jobs = ours.submit(size(3, 60), max_steps=10, save_every=size(10, 2))
    succeed(ours, seconds=3600)
    chunks = proxy.faults["latency"] - before
    figures(
        {
            "jobs": len(jobs),
            "chunks_delayed": chunks,
            "seconds": round(now() - began, 1),
            "overlaps": ours.check().overlaps,
        }
    )
    assert chunks > 0
    assert ours.restarted(jobs) == []


def one_cut(ours: Fleet) -> tuple[float, float]:
    """Cut off three training workers; returns the seconds until their trainers are frozen, and until all jobs are done.

    The fourth worker starts only after the cut, so that the three have the jobs.
    """
    ours.keep_down(HEALTHY)
    submit_until(ours, lambda: len(victims(ours)) == len(CUTS), step_ms=50, max_steps=200)
    began, chosen = now(), victims(ours)
    for name, fault in CUTS.items():
        getattr(ours.proxies[name, "postgres"], fault)()
    ours.bring_up(HEALTHY)
    cuts = [Cut(name, trainer, lease_end(ours, trainer)) for name, trainer in chosen.items()]
    assert len(cuts) == len(CUTS)
    until(lambda: all(state_of(cut.trainer.pid) == "T" for cut in cuts), "their trainers are frozen")
    frozen_at = now()
    succeed(ours)
    finished_at = now()
    assert all(state_of(cut.trainer.pid) == "T" for cut in cuts), (
        "a trainer continued although its worker cannot know yet that it was replaced"
    )
    before = [rows_of(ours, cut.trainer.job) for cut in cuts]
    for name in CUTS:
        ours.proxies[name, "postgres"].heal()
    until(lambda: all(state_of(cut.trainer.pid) == "X" for cut in cuts), "the zombies are killed")
    until(lambda: all(has_ended(ours, cut) for cut in cuts), "their attempts have ended")
    assert [rows_of(ours, cut.trainer.job) for cut in cuts] == before
    for cut in cuts:
        lines = [line.split() for line in ours.witness_of(cut.trainer.job).splitlines()]
        assert max(float(at) for epoch, _, _, at in lines if int(epoch) == cut.trainer.epoch) < cut.lease_ends
    jobs = [cut.trainer.job for cut in cuts]
    assert ours.restarted(jobs) == jobs
    return frozen_at - began, finished_at - began


@contextmanager
def down(servers: Servers, number: signal.Signals | None = None) -> Iterator[None]:
    """Postgres is down inside the block. `number` is the signal that ends it; without one it gets a fast shutdown."""
    if number is signal.SIGKILL:
        servers.freeze("postgres")  # so that none of its processes survives the postmaster
        servers.kill("postgres")
    else:
        servers.stop("postgres", number)
    assert not local.postgres_answers(servers.database_url("postgres"))
    yield
    servers.start_again("postgres")


def submit_until(ours: Fleet, condition: Callable[[], bool], **trainer: Any) -> None:
    """Submit four jobs, then one at a time, until `condition()` is true."""
    jobs = ours.submit(4, **trainer)
    until(lambda: all(map(ours.witness_of, jobs)) or condition(), "the jobs train")
    while not condition():
        jobs.extend(ours.submit(1, **trainer))
        until(lambda: ours.witness_of(jobs[-1]).count("\n") > 10 or condition(), "the job trains")


def trainers_of(ours: Fleet, name: str) -> list[Trainer]:
    """The trainers of one worker, including those that prepare datasets."""
    seen = ours.processes()
    mine = {slot.pid for slot in seen.slots if slot.program == name}
    return [trainer for trainer in seen.trainers if trainer.slot in mine]


def victims(ours: Fleet) -> dict[str, Trainer]:
    """For each worker that can be cut off: a trainer with a checkpoint and many steps left, if it has one."""
    return {name: t for name in CUTS for t in trainers_of(ours, name) if 11 <= ours.steps_of(t) <= 120}


def lease_end(ours: Fleet, trainer: Trainer) -> float:
    query = "SELECT extract(epoch FROM lease_expires_at - clock_timestamp())::float FROM jobs WHERE id = %s"
    [(seconds,)] = ours.sql(query, trainer.job)
    return now() + float(seconds)


def rows_of(ours: Fleet, job: str) -> list[tuple[Any, ...]]:
    """Every row that a worker could write about a job."""
    tables = {
        "jobs": "id",
        "job_events": "job_id",
        "checkpoints": "job_id",
        "job_metrics": "job_id",
        "adapters": "job_id",
    }
    return [
        row
        for table, key in tables.items()
        for row in ours.sql(f"SELECT to_jsonb(t)::text FROM {table} t WHERE {key} = %s ORDER BY 1", job)
    ]


def has_ended(ours: Fleet, cut: Cut) -> bool:
    lines = ours.crew.log(cut.program).read_text().splitlines()
    return any('"attempt.abandoned"' in line and cut.trainer.job in line for line in lines)


def succeed(ours: Fleet, *, seconds: float = 240) -> None:
    """Wait until all accepted jobs have succeeded; there must be no other jobs."""
    ours.settle(seconds)
    assert ours.states() == dict.fromkeys(ours.accepted, "succeeded")


def publishing(ours: Fleet) -> int:
    return int(ours.sql("SELECT count(*) FROM jobs WHERE phase = 'publishing'")[0][0])


def count_in_log(servers: Servers, text: str) -> int:
    """How often Postgres's log contains a text."""
    return servers.crew.log("postgres").read_text().count(text)


def logged(ours: Fleet, event: str) -> int:
    """How often workers have logged an event."""
    return sum(ours.crew.log(name).read_text().count(f'"{event}"') for name in ours.processes().mains)


def served(ours: Fleet, status: int) -> int:
    """How many requests the API has answered with a status."""
    return len(re.findall(rf'"status": {status}\b', ours.crew.log("api").read_text()))
