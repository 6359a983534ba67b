"""The live line: what it says of a job, on a terminal and in a log."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console

from client import follow
from client.follow import Sight, last_loss, line
from shared.schemas import Event, Job


def metrics(step: int, **data: float) -> Event:
    return Event(id=f"e{step}", created_at=0, level="info", message="", type="metrics", data={"step": step} | data)


def warning(message: str) -> Event:
    return Event(id="w", created_at=0, level="warn", message=message, type="message", data=None)


def run(*sights: Sight, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=terminal, markup=False, highlight=False)
    watched: Iterator[Sight] = iter(sights)
    draw = follow._live if terminal else follow._plain
    assert draw(watched, console) == sights[-1].job
    return out.getvalue()


def test_a_running_job_in_one_line(running: Job) -> None:
    assert line(running, 2.31).plain == "running, training  step 12/70  loss 2.310  598 tokens/s  ETA 1:32"


def test_a_waiting_job_says_its_place(queued: Job) -> None:
    assert line(queued, None).plain == "queued  position 3"


def test_an_ended_job_says_so_and_no_more(succeeded: Job) -> None:
    assert line(succeeded, 2.31).plain == "succeeded"


def test_the_loss_is_the_newest_training_loss() -> None:
    events = [metrics(1, train_loss=3.0), metrics(2, train_loss=2.0), metrics(2, valid_loss=9.0)]
    assert last_loss(events, None) == 2.0
    assert last_loss([metrics(3, valid_loss=9.0)], 2.0) == 2.0
    assert last_loss([], None) is None


def test_a_log_has_a_line_for_each_change_and_none_for_none(queued: Job, running: Job, succeeded: Job) -> None:
    seen = [Sight(queued, []), Sight(queued, []), Sight(running, [metrics(12, train_loss=2.31)]), Sight(running, [])]
    lines = run(*seen, Sight(succeeded, []), terminal=False).splitlines()
    assert lines == ["queued  position 3", line(running, 2.31).plain, "succeeded"]


def test_warnings_get_a_line_unless_the_plan_has_told_them(running: Job) -> None:
    told = warning("only 70 optimizer steps")
    text = run(Sight(running, [told, warning("the lease was lost; going on")]), terminal=False)
    assert "the lease was lost" in text
    assert "only 70" not in text


def test_a_terminal_has_one_line_drawn_over(queued: Job, running: Job, succeeded: Job) -> None:
    text = run(Sight(queued, []), Sight(running, []), Sight(succeeded, []), terminal=True)
    assert text.count("\n") == 1
    assert "\x1b[2K" in text
    assert "━" in text
