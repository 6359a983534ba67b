"""The live line of a job, on a terminal and in a log."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from openai import OpenAI
from rich.console import Console

from client import follow
from client.follow import Snapshot, last_loss, line
from shared.schemas.responses import Event, Job


def metrics(step: int, **data: float) -> Event:
    return Event(id=f"e{step}", created_at=0, level="info", message="", type="metrics", data={"step": step} | data)


def warning(message: str) -> Event:
    return Event(id="w", created_at=0, level="warn", message=message, type="message", data=None)


def run(*snapshots: Snapshot, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=terminal, markup=False, highlight=False)
    watched: Iterator[Snapshot] = iter(snapshots)
    draw = follow._live if terminal else follow._plain
    assert draw(watched, console) == snapshots[-1].job
    return out.getvalue()


def test_a_running_job_in_one_line(running: Job) -> None:
    assert line(running, 2.31).plain == "running, training  step 12/70  loss 2.310  598 tokens/s  ETA 1:32"


def test_a_waiting_job_shows_its_position(queued: Job) -> None:
    assert line(queued, None).plain == "queued  position 3"


def test_an_ended_job_shows_only_its_state(succeeded: Job) -> None:
    assert line(succeeded, 2.31).plain == "succeeded"


def test_the_loss_is_the_newest_training_loss() -> None:
    events = [metrics(1, train_loss=3.0), metrics(2, train_loss=2.0), metrics(2, valid_loss=9.0)]
    assert last_loss(events, None) == 2.0
    assert last_loss([metrics(3, valid_loss=9.0)], 2.0) == 2.0
    assert last_loss([], None) is None


def test_a_log_has_one_line_for_each_change(queued: Job, running: Job, succeeded: Job) -> None:
    seen = [
        Snapshot(queued, []),
        Snapshot(queued, []),
        Snapshot(running, [metrics(12, train_loss=2.31)]),
        Snapshot(running, []),
    ]
    lines = run(*seen, Snapshot(succeeded, []), terminal=False).splitlines()
    assert lines == ["queued  position 3", line(running, 2.31).plain, "succeeded"]


def test_warnings_get_a_line_unless_they_are_in_the_plan(running: Job) -> None:
    known = warning("only 70 optimizer steps")
    text = run(Snapshot(running, [known, warning("the lease was lost")]), terminal=False)
    assert "the lease was lost" in text
    assert "only 70" not in text


def test_a_terminal_has_one_line_that_is_redrawn(queued: Job, running: Job, succeeded: Job) -> None:
    text = run(Snapshot(queued, []), Snapshot(running, []), Snapshot(succeeded, []), terminal=True)
    assert text.count("\n") == 1
    assert "\x1b[2K" in text
    assert "━" in text


@pytest.fixture
def server(succeeded: Job) -> Iterator[tuple[OpenAI, list[str]]]:
    """A server with an ended job of 250 events, and the pages that were requested."""
    asked: list[str] = []
    events = [metrics(step, train_loss=1.0).model_dump(mode="json") for step in range(250, 0, -1)]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            body: dict[str, Any] = succeeded.model_dump(mode="json")
            if url.path.endswith("/events"):
                asked.append(url.query)
                query = parse_qs(url.query)
                after = query.get("after", ["e251"])[0]
                start = 251 - int(after[1:])
                page = events[start : start + int(query["limit"][0])]
                body = {"object": "list", "data": page, "has_more": start + len(page) < len(events)}
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with OpenAI(base_url=f"http://127.0.0.1:{http.server_port}/v1", api_key="x") as client:
            yield client, asked
        http.shutdown()


def test_following_starts_with_the_newest_page_and_logs_with_all(server: tuple[OpenAI, list[str]]) -> None:
    client, asked = server
    follow.follow(client, "ftjob-1", Console(file=io.StringIO()))
    assert asked == ["limit=100"]
    (snapshot,) = follow.watch(client, "ftjob-1")
    assert [event.id for event in snapshot.events] == [f"e{step}" for step in range(1, 251)]
