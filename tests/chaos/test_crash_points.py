"""Every failpoint: after a kill another attempt finishes the job; a process stopped there can change nothing later.

A slot's process is killed or stopped at the point. Its lease expires (the test sets the lease's end in the past), a
sweeper requeues the job, and a successor finishes it. A stopped process is then continued, as a zombie.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from typing import Any

import openai
import pytest

from deploy.local import services
from shared.broker.queues import Queue
from shared.failpoints import Action, Failpoint
from tests.chaos import slot
from tests.chaos.fleet import Fleet, now
from tests.chaos.servers import Servers, state_of, until

API = [Failpoint.AFTER_FILE_PUT, Failpoint.BEFORE_SUBMIT_COMMIT, Failpoint.AFTER_SUBMIT_COMMIT]
SWEEPER = [Failpoint.BEFORE_RECLAIM_COMMIT, Failpoint.AFTER_RECLAIM, Failpoint.AFTER_RERING]
DRAIN = [Failpoint.BEFORE_RELEASE, Failpoint.AFTER_RELEASE]
ATTEMPT = [point for point in Failpoint if point not in {*API, *SWEEPER, *DRAIN}]
STEPS = 12
FENCE = 1.5


@pytest.fixture(scope="module")
def ours(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet in which only the API runs; the tests run attempts one by one. No test should crash a job four times."""
    times = {"MILLINER_LEASE_SECONDS": "3", "MILLINER_FENCE_SECONDS": str(FENCE), "MILLINER_HEARTBEAT_SECONDS": "0.5"}
    fleet = Fleet(servers, tmp_path_factory.mktemp("fleet"), workers=0, max_crashes=4, settings=times)
    fleet.start()
    fleet.keep_down("prepare")
    yield fleet
    fleet.close()


@pytest.fixture
def job(ours: Fleet) -> Iterator[str]:
    """An accepted job. After the test it must have succeeded with the correct adapter, and no invariant is violated."""
    [job] = ours.submit(max_steps=STEPS, save_every=4, step_ms=15, exports=["merged"])
    yield job
    found = ours.check()
    assert found.overlaps == 0
    assert ours.states()[job] == "succeeded"
    ours.check_adapters()


@pytest.mark.parametrize("point", ATTEMPT)
def test_an_attempt_is_killed_at(ours: Fleet, job: str, point: Failpoint) -> None:
    for queue in queues_to(ours, point):
        assert ended(start(ours, queue, point, Action.KILL)) == -signal.SIGKILL
    succeed(ours, job)


@pytest.mark.parametrize("point", ATTEMPT)
def test_a_zombie_wakes_at(ours: Fleet, job: str, point: Failpoint) -> None:
    """The process is stopped at the point, loses its lease, and continues after its successor has finished the job."""
    for queue in queues_to(ours, point):
        zombie = start(ours, queue, point, Action.STOP)
        wait_stopped(zombie)
        succeed(ours, job)
        continue_process(zombie)
        assert ended(zombie) == 0


@pytest.mark.parametrize("action", [Action.KILL, Action.STOP])
@pytest.mark.parametrize("point", DRAIN)
def test_a_draining_worker_is_killed_or_stopped_at(ours: Fleet, job: str, point: Failpoint, action: Action) -> None:
    run(ours, Queue.PREPARE)
    process = start(ours, Queue.TRAIN, point, action, drain_after=0.2)
    if action is Action.KILL:
        assert ended(process) == -signal.SIGKILL
        succeed(ours, job)
        return
    wait_stopped(process)
    succeed(ours, job)
    continue_process(process)
    assert ended(process) == 0


@pytest.mark.parametrize("point", SWEEPER)
def test_a_sweeper_is_killed_at(ours: Fleet, job: str, point: Failpoint) -> None:
    assert ended(start(ours, Queue.PREPARE, Failpoint.AFTER_CLAIM, Action.KILL)) == -signal.SIGKILL
    expire_leases(ours)
    if point is Failpoint.AFTER_RERING:
        run(ours, "sweep")
        ours.sql("UPDATE jobs SET rung_at = NULL WHERE lease_owner IS NULL RETURNING id")
    assert ended(start(ours, "sweep", point, Action.KILL)) == -signal.SIGKILL
    succeed(ours, job)


@pytest.mark.parametrize("action", [Action.KILL, Action.RAISE])
@pytest.mark.parametrize("point", API[1:])
def test_the_api_dies_while_it_accepts_a_job(ours: Fleet, point: Failpoint, action: Action) -> None:
    """The client's retry returns the job if it was created, or creates it; either way there is one job."""
    serve(ours, f"{point}:{action}")
    before = ours.states()
    body: dict[str, Any] = {"model": "hat", "training_file": ours.dataset, "seed": int.from_bytes(os.urandom(3))}
    with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
        ours.client.with_options(max_retries=0).fine_tuning.jobs.create(**body)
    created = set(ours.states()) - set(before)
    assert len(created) == (point is Failpoint.AFTER_SUBMIT_COMMIT)
    serve(ours, "")
    job = ours.client.fine_tuning.jobs.create(**body, extra_headers={"x-stainless-retry-count": "1"})
    assert created <= {job.id}
    ours.accepted.append(job.id)
    succeed(ours, job.id)
    ours.check()


def test_the_api_dies_between_an_upload_and_its_row(ours: Fleet) -> None:
    serve(ours, f"{Failpoint.AFTER_FILE_PUT}:{Action.KILL}")
    files = ours.sql("SELECT count(*) FROM files")
    with pytest.raises(openai.APIConnectionError):
        ours.client.with_options(max_retries=0).files.create(file=("a.jsonl", b'{"text": "x"}\n'), purpose="fine-tune")
    assert ours.sql("SELECT count(*) FROM files") == files
    serve(ours, "")


def serve(ours: Fleet, fault: str) -> None:
    """Start an API with this fault; it is not restarted when it dies."""
    ours.relaunch("api", MILLINER_FAULT=fault)
    ours.kept_down.add("api")
    until(lambda: services.api_ready(ours.base_url), "the API is ready")


def queues_to(ours: Fleet, point: Failpoint) -> list[Queue]:
    """The queues in which an attempt passes the point. For those of training, the job is prepared first."""
    if point is Failpoint.AFTER_PLAN:
        return [Queue.PREPARE]
    run(ours, Queue.PREPARE)
    return [Queue.TRAIN]


def start(ours: Fleet, act: str, point: Failpoint, action: Action, *, drain_after: float = 1e9) -> ForkServerProcess:
    """Start a slot that is killed or stopped at the point."""
    env = ours.env["prepare"] | {"MILLINER_FAULT": f"{point}:{action}"}
    return slot.start([act], env, ours.folder.logs / "slot.log", drain_after=drain_after)


def run(ours: Fleet, *acts: str) -> None:
    """Run the acts in a slot without a fault."""
    assert ended(slot.start(acts, ours.env["prepare"], ours.folder.logs / "slot.log")) == 0


def wait_stopped(process: ForkServerProcess) -> None:
    """Wait until the process has stopped at its point, and then until its fence has passed by its own clock."""
    until(lambda: state_of(process.pid) == "T", "the slot has stopped at its point")
    since = now()
    until(lambda: now() - since > FENCE, "the fence has passed")


def continue_process(process: ForkServerProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)


def ended(process: ForkServerProcess) -> int | None:
    """Wait for the exit code; it is minus the signal's number if a signal killed the process."""
    process.join(60)
    return process.exitcode


def succeed(ours: Fleet, job: str) -> None:
    """Expire the job's lease, requeue it by a sweep, and run it to its end."""
    expire_leases(ours)
    run(ours, "sweep")
    ours.sql("UPDATE jobs SET not_before = clock_timestamp() WHERE lease_owner IS NULL RETURNING id")
    run(ours, *Queue)
    assert ours.states()[job] == "succeeded"


def expire_leases(ours: Fleet) -> None:
    """Set the end of every lease in the past, once all trainers without a supervisor have stopped by themselves.

    A trainer that never began to train, or has trained its last step, has nothing to stop.
    """
    lines = (line.split() for log in ours.witness.glob("*.log") for line in log.read_text().splitlines())
    reached = {int(pid): int(step) for _, step, pid, _ in lines}
    training = [pid for pid, step in reached.items() if step < STEPS]
    until(lambda: all(state_of(pid) in "TZX" for pid in training), "trainers without a supervisor stand still")
    past = "UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '1s'"
    ours.sql(f"{past} WHERE lease_owner IS NOT NULL RETURNING id")
