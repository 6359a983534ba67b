"""Draw docs/images/report.svg, the picture in the README, from the newest job of a running stack that has a report.

`make picture` runs it on the stack of `make demo`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from client import report
from client.connect import connect, job_of
from shared.schemas.responses import Job

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "report.svg"
WIDTH = 112


def main() -> None:
    """Draw the job as `milliner report` shows it, under the command that submitted it."""
    jobs = (job_of(job) for job in connect().fine_tuning.jobs.list(limit=20))
    job = next((job for job in jobs if job.report), None)
    if job is None or job.report is None:
        sys.exit("no job with a report; run make demo first")
    console = Console(record=True, width=WIDTH, force_terminal=True, file=io.StringIO())
    console.print(drawing(job))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(TARGET), title="milliner report")
    print(TARGET)


def drawing(job: Job) -> Group:
    """The commands, and the report with two samples."""
    assert job.report is not None
    few = job.report.model_copy(update={"samples": job.report.samples[:2]})
    return Group(
        Text(f"$ milliner submit quotes.jsonl --model {job.model} --follow", style="bold green"),
        Text(f"{job.id} {job.status}\n"),
        Text(f"$ milliner report {job.id}", style="bold green"),
        report.document(few),
    )


if __name__ == "__main__":
    main()
