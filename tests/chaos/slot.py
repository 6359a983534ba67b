"""Run one slot's work once, in its own process, without Celery.

The process is forked from a server that has imported everything. It starts in milliseconds, so that each crash point
can have its own process to kill.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from shared.broker.queues import Queue
from shared.settings import get_settings
from shared.telemetry import configure
from worker.attempt import runner
from worker.background import sweeper

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


def start(acts: Sequence[str], env: Mapping[str, str], log: Path, *, drain_after: float = 1e9) -> ForkServerProcess:
    """Start a process that performs `acts` in order. An act is "sweep" or a queue to take one job from.

    After `drain_after` seconds the worker is asked to drain.
    """
    process = _forks.Process(target=_work, args=(list(acts), dict(env), str(log), drain_after))
    process.start()
    return process


def _work(acts: list[str], env: dict[str, str], log: str, drain_after: float) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(env)
    configure("worker")
    asked_at = time.monotonic() + drain_after
    for act in acts:
        if act == "sweep":
            sweeper.sweep(get_settings(), watched=float("inf"))
        else:
            runner.run_next(Queue(act), owner="slot", slot=0, draining=lambda: time.monotonic() > asked_at)
