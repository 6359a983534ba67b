"""The Celery application: two tasks without arguments, and the start and stop of a worker process.

A Celery message (a "ring") wakes a slot, which claims jobs from Postgres until there are none. A slot of the `prepare`
queue answers previews before each job. SIGTERM sets one byte of shared memory that every slot polls: a running job
saves a checkpoint and goes back to the queue, and the slot ends. The first slot of a worker also collects the bucket's
garbage and watches for the notice that this machine will be taken away. Every training slot reports its device.
"""

from __future__ import annotations

import mmap
import os
import secrets
import signal
import socket
import sys
import time
from random import random
from threading import Event, Thread
from typing import Any

import billiard
from celery.signals import setup_logging, worker_init, worker_process_init, worker_shutting_down

from shared import storage
from shared.broker.doorbell import celery_app
from shared.broker.queues import Queue
from shared.errors import InvalidRequest
from shared.settings import get_settings
from shared.signing import private_key
from shared.telemetry import bind, configure, log
from worker import cache, preview_requests
from worker.attempt.leased_job import Outcome
from worker.attempt.runner import run_next
from worker.background import device_report, garbage, preemption, sweeper
from worker.trackers import supervisor

app = celery_app()
LONGEST_PAUSE = 120.0
_drain = mmap.mmap(-1, 1)  # anonymous and shared: written by the main process, read by the slots it forked
_owner = ""


@app.task(name=f"milliner.{Queue.PREPARE}")
def prepare() -> None:
    """Work on datasets that wait for validation."""
    _work(Queue.PREPARE)


@app.task(name=f"milliner.{Queue.TRAIN}")
def train() -> None:
    """Work on jobs that wait for training."""
    _work(Queue.TRAIN)


def draining() -> bool:
    """Return whether this worker was asked to stop."""
    return _drain[0] != 0


def _work(queue: Queue) -> None:
    """Run jobs until none waits.

    A slot that cannot work waits and keeps its ring; if it returned, it would take the next ring from a slot that can
    work. After each crash in a row it waits longer, so that one bad machine does not crash every job of the queue.
    """
    failures, answered = 0, False
    while not draining():
        if queue is Queue.PREPARE:
            # Previews first: a user is waiting. But only one at a time, so that jobs get their turn.
            answered = preview_requests.answer_next(draining)
        outcome = run_next(queue, owner=_owner, slot=_slot(), draining=draining)
        if outcome is Outcome.IDLE:
            if answered:
                continue
            return
        failures = 0 if outcome is Outcome.DONE else failures + 1
        until = time.monotonic() + pause_seconds(failures)
        while not draining() and time.monotonic() < until:
            time.sleep(0.2)


def pause_seconds(failures: int) -> float:
    """Return how long a slot waits after this many failures in a row: 0 s after the first, then 1 s, 2 s, … 120 s."""
    return 0.0 if failures < 2 else min(2.0 ** (failures - 2), LONGEST_PAUSE)


def _slot() -> int:
    return getattr(billiard.current_process(), "index", 0)


@setup_logging.connect
def _logging(**_: Any) -> None:
    configure("worker")


@worker_init.connect
def _before_slots_fork(**_: Any) -> None:
    storage.client()  # loads boto's models (1 s) once, for every forked slot; opens no connection
    if (path := get_settings().signing_key_file) is not None:
        try:
            private_key(path)
        except InvalidRequest as error:  # fail at start, not at the first job; Celery passes on SystemExit only
            sys.exit(f"MILLINER_SIGNING_KEY_FILE: {error.message}")
    for kind in sorted(get_settings().integrations):
        if (missing := supervisor.missing(kind)) is not None:  # not fatal: jobs run, without this tracker
            log.error("tracker.misconfigured", tracker=kind, missing=missing)


@worker_process_init.connect
def _slot_started(**_: Any) -> None:
    global _owner  # noqa: PLW0603 (one name per process, known only after the fork)
    _owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    configure("worker")
    bind(worker=_owner)
    sweeper.start(Event())
    Thread(target=cache.sweep, name="sweep-cache", daemon=True).start()  # Celery gives a slot 4 s to start
    if (
        Queue.TRAIN in app.amqp.queues.consume_from and get_settings().trainer_command is None
    ):  # another trainer may see another device
        device_report.start(_slot())
    if _slot() == 0:
        garbage.start(Event(), head_start=random())
        preemption.start(Event(), _drain_worker)


@worker_shutting_down.connect
def _drain_slots(**_: Any) -> None:
    _drain[0] = 1


def _drain_worker() -> None:
    """Drain the whole worker from within a slot, as SIGTERM to the worker would."""
    _drain_slots()
    os.kill(os.getppid(), signal.SIGTERM)
