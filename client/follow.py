"""Watching a job until it ends: one live line on a terminal, plain lines elsewhere.

Owns: polling. The job does not notice: an API that is away for a while is waited for, and whoever stops watching
(Ctrl-C raises KeyboardInterrupt through here) stops nothing but that.
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


class Sight(NamedTuple):
    """A job as it is, and the events since the last sight of it, oldest first."""

    job: Job
    events: list[Event]


def watch(
    client: OpenAI, job_id: str, *, whole: bool = True, pause: Callable[[float], None] = time.sleep
) -> Iterator[Sight]:
    """Yield the job about once a second until it has ended; the last sight holds the last events.

    The first sight holds all events so far, or, without `whole`, the newest page of them.

    Raises openai.APIError: the job is not there, or the API has been away for some minutes.
    """
    misses, seen = 0, None
    while True:
        try:
            # The job first: whatever an ended job has to tell is then in the events that follow.
            job = job_of(client.fine_tuning.jobs.retrieve(job_id))
            events = events_since(client, job_id, seen) if seen or whole else _newest(client, job_id)
        except (openai.APIConnectionError, openai.InternalServerError):
            misses += 1
            if misses > _OUTAGE_POLLS:
                raise
        else:
            misses = 0
            seen = events[-1].id if events else seen
            yield Sight(job, events)
            if job.status in TERMINAL:
                return
        pause(INTERVAL)


def events_since(client: OpenAI, job_id: str, seen: str | None = None) -> list[Event]:
    """The job's events after the one with id `seen` (all without it), oldest first."""
    fresh: list[Event] = []
    # With a `seen` few are new, so a small page will do; the client asks for more pages as long as we read on.
    for event in client.fine_tuning.jobs.list_events(job_id, limit=20 if seen else 100):
        if event.id == seen:
            break
        fresh.append(Event.model_validate(event.to_dict()))
    return fresh[::-1]


def _newest(client: OpenAI, job_id: str) -> list[Event]:
    page = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [Event.model_validate(event.to_dict()) for event in reversed(page.data)]


def follow(client: OpenAI, job_id: str, console: Console, *, pause: Callable[[float], None] = time.sleep) -> Job:
    """Draw the job's way to its end and return it as it ended."""
    sights = watch(client, job_id, whole=False, pause=pause)
    return _live(sights, console) if console.is_terminal else _plain(sights, console)


def line(job: Job, loss: float | None) -> Text:
    """`running, training  step 12/70  loss 2.310  598 tokens/s  ETA 1:32`"""
    facts = show.progress(job, loss) if job.status not in TERMINAL else ""
    return Text.assemble(show.status(job), "  " if facts else "", facts)


def last_loss(events: list[Event], before: float | None) -> float | None:
    """The newest training loss among the events, or the one that was known before."""
    for event in reversed(events):
        if event.data and event.data.get("train_loss") is not None:
            return float(event.data["train_loss"])
    return before


def _live(sights: Iterator[Sight], console: Console) -> Job:
    loss: float | None = None
    with Live(console=console, auto_refresh=False) as live:
        for job, events in sights:
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


def _plain(sights: Iterator[Sight], console: Console) -> Job:
    """A line whenever the state, the phase or the whole percents have changed: a log of a hundred lines at most."""
    loss: float | None = None
    drawn: tuple[object, ...] = ()
    for job, events in sights:
        loss = last_loss(events, loss)
        for event in _notices(job, events):
            console.print(show.event(event))
        now = (job.status, job.phase, job.queue_position, int(job.progress.percent) if job.progress else None)
        if now != drawn:
            console.print(line(job, loss))
            drawn = now
    return job


def _notices(job: Job, events: list[Event]) -> list[Event]:
    """What deserves a line of its own. The plan's warnings were shown with the plan."""
    known = job.plan.warnings if job.plan else []
    return [event for event in events if event.level != "info" and event.message not in known]
