"""The broker is cut off, emptied, frozen or sent forged messages: this costs time, but never a job.

A message is only a hint to look into Postgres, so a lost, repeated or forged one can do no more than wake a worker. The
tests of this file share one fleet, on servers of their own.
"""

from __future__ import annotations

import base64
import json
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.local import servers as local
from shared.broker.queues import Queue
from tests.chaos.fleet import BASE, Fleet, kill, percentile
from tests.chaos.servers import Servers, until

KEYS = {queue: f"milliner:{queue}" for queue in Queue}
LISTENERS = ("prepare", "train-0", "train-1")
LONGEST_ANSWER = 5.0  # fails the test on a hang; the promised 0.5 s are measured as a figure


@pytest.fixture(scope="module")
def ours(own_servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(own_servers, tmp_path_factory.mktemp("fleet"), workers=2, slots=3)
    fleet.start()
    yield fleet
    fleet.close()


@pytest.fixture
def broker(ours: Fleet) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(ours.redis_url) as client:
        yield client


def test_killed_connections_restart_no_job(
    ours: Fleet, broker: redis.Redis, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """All connections of a healthy broker are killed repeatedly while jobs are submitted and run."""
    mains, jobs, killed = ours.processes().mains, ours.submit(4, step_ms=50), []
    for _ in range(size(14, 300)):
        killed.append(sum(broker.client_kill_filter(_type=kind, skipme=True) for kind in ("normal", "pubsub")))
        jobs += ours.submit(1)
        time.sleep(size(0.5, 2.0))
    lost = lost_connections(ours)
    after = time.monotonic()
    jobs += ours.submit(1)
    until(lambda: ours.witness_of(jobs[-1]) != "", "a job submitted after the last kill trains")
    first_step_after = time.monotonic() - after
    succeed_in_one_attempt(ours, jobs)
    found = ours.check()
    figures(
        {
            "rounds": len(killed),
            "connections_killed": sum(killed),
            "losses_told_by_workers": lost,
            "first_step_after_seconds": round(first_step_after, 2),
            "jobs": len(jobs),
            "overlaps": found.overlaps,
        }
    )
    assert sum(killed) > len(killed)
    assert lost > 0
    assert ours.processes().mains == mains


def test_an_emptied_and_killed_broker_loses_no_queued_job(
    ours: Fleet,
    own_servers: Servers,
    broker: redis.Redis,
    size: Callable[..., Any],
    figures: Callable[[dict[str, Any]], None],
) -> None:
    """FLUSHALL, kill -9, restart, while half of the jobs wait for training and half for preparation."""
    ours.keep_down("train-0")
    ours.keep_down("train-1")
    half = size(20, 250)
    jobs = ours.submit(half, step_ms=5, max_steps=5)
    until(lambda: set(states(ours, jobs)) == {"queued"}, "the first half is queued", seconds=600)
    ours.keep_down("prepare")
    jobs += ours.submit(half, step_ms=5, max_steps=5)
    assert set(states(ours, jobs)) == {"queued", "validating_files"}
    waiting = {str(queue): broker.llen(key) for queue, key in KEYS.items()}
    assert all(waiting.values()), f"a queue has no messages to lose: {waiting}"
    broker.flushall()
    assert broker.dbsize() == 0
    own_servers.kill("valkey")
    assert not local.valkey_answers(ours.redis_url)
    own_servers.start_again("valkey")
    began = time.monotonic()
    for name in LISTENERS:
        ours.bring_up(name)
    succeed_in_one_attempt(ours, jobs, seconds=900)
    figures(
        {
            "jobs": len(jobs),
            "messages_flushed": waiting,
            "all_succeeded_after_seconds": round(time.monotonic() - began, 1),
            "overlaps": ours.check().overlaps,
        }
    )


def test_submits_are_answered_while_the_broker_is_frozen(
    ours: Fleet, own_servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """SIGSTOP: connections stay, but nothing answers. Running jobs continue; new jobs are accepted and run later."""
    mains, seconds = ours.processes().mains, size(6, 60)
    running = ours.submit(3, step_ms=100, max_steps=10 * seconds)
    until(lambda: all(ours.witness_of(job) for job in running), "three jobs train")
    client, answers = ours.client.with_options(max_retries=0, timeout=LONGEST_ANSWER), list[float]()
    with frozen(own_servers):
        assert not local.valkey_answers(ours.redis_url)
        before = [len(ours.witness_of(job)) for job in running]
        over = time.monotonic() + seconds
        while (asked_at := time.monotonic()) < over:
            seed, trainer = 10_000_000 + 1000 * len(answers) + 5, {"max_steps": 5}
            job = client.fine_tuning.jobs.create(
                model=BASE, training_file=ours.dataset, seed=seed, extra_body={"trainer": trainer}
            )
            answers.append(time.monotonic() - asked_at)
            ours.accepted.append(job.id)
            time.sleep(size(0.25, 0.1))
        assert all(len(ours.witness_of(job)) > length for job, length in zip(running, before, strict=True))
    began = time.monotonic()
    succeed_in_one_attempt(ours, ours.accepted[-len(answers) - 3 :], seconds=900)
    figures(
        {
            "frozen_seconds": seconds,
            "answers": len(answers),
            "answer_seconds": {
                name: round(percentile(answers, share), 3) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1))
            },
            "all_succeeded_after_seconds": round(time.monotonic() - began, 1),
            "overlaps": ours.check().overlaps,
        }
    )
    assert ours.processes().mains == mains


def test_repeated_reordered_and_forged_messages_are_harmless(
    ours: Fleet, broker: redis.Redis, tmp_path: Path, figures: Callable[[dict[str, Any]], None]
) -> None:
    """Whatever is in the lists, no worker dies, no job runs because of it, and every submitted job runs."""
    mains, jobs = ours.processes().mains, ours.submit(2, step_ms=50, max_steps=60)
    real = captured(ours, broker, jobs)
    trap = tmp_path / "unpickled"
    pushed = [(queue, message) for queue in Queue for message in forgeries(queue, real, trap)]
    pushed += [(queue, real[queue]) for queue in Queue for _ in range(50)]
    random.Random(5).shuffle(pushed)
    for number, (queue, message) in enumerate(pushed):
        (broker.lpush if number % 2 else broker.rpush)(KEYS[queue], message)
    jobs += ours.submit(4)
    until(lambda: not any(map(broker.llen, KEYS.values())), "workers have emptied both lists")
    jobs += ours.submit(4)
    succeed_in_one_attempt(ours, jobs)
    figures(
        {
            "messages": len(pushed),
            "forged": len(pushed) - 50 * len(Queue),
            "jobs": len(jobs),
            "overlaps": ours.check().overlaps,
        }
    )
    assert not trap.exists()
    assert ours.processes().mains == mains
    assert claimed(ours, "prepare") == {Queue.PREPARE}
    assert claimed(ours, "train-0") | claimed(ours, "train-1") == {Queue.TRAIN}


def captured(ours: Fleet, broker: redis.Redis, jobs: list[str]) -> dict[Queue, bytes]:
    """A real message of each queue, copied while the Celery mains are stopped. Messages differ only in queue names."""
    mains = ours.processes().mains.values()
    for pid in mains:
        kill(pid, signal.SIGSTOP)
    try:
        jobs += ours.submit(6)
        until(lambda: broker.llen(KEYS[Queue.PREPARE]) > 0, "a message waits")
        [message] = broker.lrange(KEYS[Queue.PREPARE], 0, 0)
    finally:
        for pid in mains:
            kill(pid, signal.SIGCONT)
    assert isinstance(message, bytes)
    return {queue: message.replace(Queue.PREPARE.encode(), queue.encode()) for queue in Queue}


def forgeries(queue: Queue, real: dict[Queue, bytes], trap: Path) -> list[bytes]:
    """Messages that Milliner never sends. Unpickling one of them creates the file `trap`."""
    [other] = set(Queue) - {queue}
    true = json.loads(real[queue])
    arguments = json.dumps([[1, {"a": None}], {"job": "ftjob-forged"}, {}]).encode()
    bodies = [arguments, b"[]", b"3", b"{}", b"[[], {}]", b"[3, {}, {}]", b"\xff\xfe no JSON", b"[" * 100_000]
    headers: list[dict[str, Any]] = [
        {"task": "milliner.nothing"},
        {"task": "os.system"},
        {"task": []},
        {"task": "celery.chord_unlock"},
        {"id": None},
        {"id": {}},
        {"timelimit": 3},
        {"retries": "x"},
        {"compression": "none such"},
        {"eta": "no time", "expires": "never"},
        {"eta": "2999-01-01T00:00:00+00:00"},
    ]
    parts: list[dict[str, Any]] = [
        {"headers": {}},
        {"headers": None},
        {"body": 3},
        {"content-type": "application/x-unheard-of"},
        {"content-encoding": "none such"},
        {"properties": {}},
        {"properties": true["properties"] | {"delivery_tag": {}}},
        {"properties": true["properties"] | {"delivery_info": None}},
        {"properties": true["properties"] | {"body_encoding": "none such"}},
        pickled(Touch(trap)),
    ]
    parts += [{"body": base64.b64encode(body).decode()} for body in bodies]
    parts += [{"headers": true["headers"] | each} for each in headers]
    garbage = [b"", b"hello", b"\xde\xad", b"3", b"null", b"[]", b"{}", real[queue][:-40]]
    return [real[other], *garbage, *(json.dumps(true | each).encode() for each in parts)]


def pickled(value: object) -> dict[str, Any]:
    body = base64.b64encode(pickle.dumps(value)).decode()
    return {"body": body, "content-type": "application/x-python-serialize", "content-encoding": "binary"}


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@contextmanager
def frozen(servers: Servers) -> Iterator[None]:
    servers.freeze("valkey")
    try:
        yield
    finally:
        servers.thaw("valkey")


def succeed_in_one_attempt(ours: Fleet, jobs: list[str], *, seconds: float = 120) -> None:
    """Wait until all jobs have succeeded, each in its first attempt."""
    ours.settle(seconds)
    assert set(states(ours, jobs)) == {"succeeded"}
    assert ours.restarted(jobs) == []


def states(ours: Fleet, jobs: list[str]) -> list[str]:
    found = ours.states()
    return [found[job] for job in jobs]


def claimed(ours: Fleet, name: str) -> set[str]:
    """The queues from which a worker has claimed a job."""
    claims = (json.loads(line) for line in ours.crew.log(name).read_text().splitlines() if "job.claimed" in line)
    return {line["queue"] for line in claims}


def lost_connections(ours: Fleet) -> int:
    """How often workers have logged a lost connection to the broker."""
    return sum(ours.crew.log(name).read_text().lower().count("connection to broker lost") for name in LISTENERS)
