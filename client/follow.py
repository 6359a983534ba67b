"""Watch a job until it ends: one live line on a terminal, plain lines elsewhere.

Owns: polling. Watching does not affect the job. An API that does not answer is retried for some minutes. Ctrl-C raises
KeyboardInterrupt through here and stops only the watching.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import openai
from openai import OpenAI
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from client import show
from client.connect import job_of
from shared.schemas.requests import TERMINAL
from shared.schemas.responses import Event, Job

INTERVAL = 1.0
_OUTAGE_POLLS = 60


class Snapshot(NamedTuple):
    """A job, and its events since the last snapshot, oldest first."""

    job: Job
    events: list[Event]


def watch(
    client: OpenAI, job_id: str, *, whole: bool = True, pause: Callable[[float], None] = time.sleep
) -> Iterator[Snapshot]:
    """Yield the job about once per second until it has ended; the last snapshot has the last events.

    The first snapshot has all events so far, or without `whole` the newest page of them.

    Raises openai.APIError: there is no such job, or the API has not answered for some minutes.
    """
    misses, seen = 0, None
    while True:
        try:
            # The job first: if it has ended, the events that are fetched after it are complete.
            job = job_of(client.fine_tuning.jobs.retrieve(job_id))
            events = events_since(client, job_id, seen) if seen or whole else _newest(client, job_id)
        except (openai.APIConnectionError, openai.InternalServerError):
            misses += 1
            if misses > _OUTAGE_POLLS:
                raise
        else:
            misses = 0
            seen = events[-1].id if events else seen
            yield Snapshot(job, events)
            if job.status in TERMINAL:
                return
        pause(INTERVAL)


def events_since(client: OpenAI, job_id: str, seen: str | None = None) -> list[Event]:
    """The job's events after the one with id `seen`, or all of them, oldest first."""
    fresh: list[Event] = []
    # Few are newer than `seen`, so a small page is enough; the client fetches further pages while we iterate.
    for event in client.fine_tuning.jobs.list_events(job_id, limit=20 if seen else 100):
        if event.id == seen:
            break
        fresh.append(Event.model_validate(event.to_dict()))
    return fresh[::-1]


def _newest(client: OpenAI, job_id: str) -> list[Event]:
    page = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [Event.model_validate(event.to_dict()) for event in reversed(page.data)]


def follow(client: OpenAI, job_id: str, console: Console, *, pause: Callable[[float], None] = time.sleep) -> Job:
    """Show the job's progress until it ends, and return the ended job."""
    snapshots = watch(client, job_id, whole=False, pause=pause)
    return _live(snapshots, console) if console.is_terminal else _plain(snapshots, console)


def line(job: Job, loss: float | None) -> Text:
    """`running, training  step 12/70  loss 2.310  598 tokens/s  ETA 1:32`"""
    facts = show.progress(job, loss) if job.status not in TERMINAL else ""
    return Text.assemble(show.status(job), "  " if facts else "", facts)


def last_loss(events: list[Event], before: float | None) -> float | None:
    """The newest training loss among the events, or `before` if there is none."""
    for event in reversed(events):
        if event.data and event.data.get("train_loss") is not None:
            return float(event.data["train_loss"])
    return before


def _live(snapshots: Iterator[Snapshot], console: Console) -> Job:
    loss: float | None = None
    with Live(console=console, auto_refresh=False) as live:
        for job, events in snapshots:
            loss = last_loss(events, loss)
            for event in _notices(job, events):
                live.console.print(show.event(event))
            live.update(_bar(job, line(job, loss)), refresh=True)
    return job


def _bar(job: Job, text: Text) -> Table:
    percent = 100.0 if job.status == "succeeded" else job.progress.percent if job.progress else 0.0
    grid = Table.grid(padding=(0, 1))
    text.no_wrap, text.overflow = True, "ellipsis"
    grid.add_row(ProgressBar(total=100, completed=percent, width=24), text)
    return grid


def _plain(snapshots: Iterator[Snapshot], console: Console) -> Job:
    """Print a line when state, phase, queue position or whole percent changes: a log of about a hundred lines."""
    loss: float | None = None
    drawn: tuple[object, ...] = ()
    for job, events in snapshots:
        loss = last_loss(events, loss)
        for event in _notices(job, events):
            console.print(show.event(event))
        now = (job.status, job.phase, job.queue_position, int(job.progress.percent) if job.progress else None)
        if now != drawn:
            console.print(line(job, loss))
            drawn = now
    return job


def _notices(job: Job, events: list[Event]) -> list[Event]:
    """Warnings and errors, except the plan's warnings, which were shown with the plan."""
    known = job.plan.warnings if job.plan else []
    return [event for event in events if event.level != "info" and event.message not in known]
