"""The Celery application: two tasks without arguments, and what a worker process does when it starts and stops.

A ring wakes a slot; the slot claims jobs from Postgres until there are none, and where it prepares, it answers previews
first. SIGTERM sets one byte of shared memory that every slot looks at: a running job checkpoints, goes back to the
queue, and the slot ends. The first slot of a worker also collects the bucket's garbage and asks whether this machine
will be taken away. Every slot that trains says what device it trains on.
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
LONGEST_SETBACK = 120.0
_drain = mmap.mmap(-1, 1)  # anonymous and shared: written by the main process, read by the slots it forked
_owner = ""


@app.task(name=f"milliner.{Queue.PREPARE}")
def prepare() -> None:
    """There may be datasets to validate."""
    _work(Queue.PREPARE)


@app.task(name=f"milliner.{Queue.TRAIN}")
def train() -> None:
    """There may be jobs to train."""
    _work(Queue.TRAIN)


def draining() -> bool:
    """Has this worker been asked to stop?"""
    return _drain[0] != 0


def _work(queue: Queue) -> None:
    """Job after job until none waits.

    A slot that cannot work keeps its ring and waits, or it would take the ring of one that can; and after one crash
    upon another it waits ever longer, so that one bad machine does not spoil every job of the queue.
    """
    setbacks, answered = 0, False
    while not draining():
        if queue is Queue.PREPARE:
            answered = preview_requests.answer_next(
                draining
            )  # first: somebody sits and waits; but jobs have their turn
        outcome = run_next(queue, owner=_owner, slot=_slot(), draining=draining)
        if outcome is Outcome.IDLE:
            if answered:
                continue
            return
        setbacks = 0 if outcome is Outcome.DONE else setbacks + 1
        until = time.monotonic() + setback_seconds(setbacks)
        while not draining() and time.monotonic() < until:
            time.sleep(0.2)


def setback_seconds(setbacks: int) -> float:
    """How long a slot waits after so many in a row: not after the first, then 1 s, 2 s, … two minutes."""
    return 0.0 if setbacks < 2 else min(2.0 ** (setbacks - 2), LONGEST_SETBACK)


def _slot() -> int:
    return getattr(billiard.current_process(), "index", 0)


@setup_logging.connect
def _logging(**_: Any) -> None:
    configure("worker")


@worker_init.connect
def _before_the_slots(**_: Any) -> None:
    storage.client()  # a second of reading boto's models, which every slot then inherits; no connection yet
    if (path := get_settings().signing_key_file) is not None:
        try:
            private_key(path)
        except InvalidRequest as error:  # now, and not when the first job is trained; Celery lets nothing else through
            sys.exit(f"MILLINER_SIGNING_KEY_FILE: {error.message}")
    for kind in sorted(get_settings().integrations):
        if (lack := supervisor.missing(kind)) is not None:  # no reason to stand still: a job loses its curves, no more
            log.error("tracker.unusable", tracker=kind, lack=lack)


@worker_process_init.connect
def _slot_started(**_: Any) -> None:
    global _owner  # noqa: PLW0603 (one name per process, known only after the fork)
    _owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    configure("worker")
    bind(worker=_owner)
    sweeper.start(Event())
    Thread(target=cache.sweep, name="sweep-cache", daemon=True).start()  # Celery gives a slot four seconds to be up
    if Queue.TRAIN in app.amqp.queues.consume_from and get_settings().trainer_command is None:  # another's may differ
        device_report.announce(_slot())
    if _slot() == 0:
        garbage.start(Event(), head_start=random())
        preemption.start(Event(), _drain_worker)


@worker_shutting_down.connect
def _drain_slots(**_: Any) -> None:
    _drain[0] = 1


def _drain_worker() -> None:
    """From a slot: as if the worker had been sent SIGTERM."""
    _drain_slots()
    os.kill(os.getppid(), signal.SIGTERM)
