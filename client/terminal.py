"""What several commands do on the terminal: print a result, watch a job to its end, show a download.

Owns: arguments that several commands share, what goes to stdout and what to stderr, and the exit code of a command that
does not end well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from openai import OpenAI
from pydantic import BaseModel
from rich.console import RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from client import download, show
from client.connect import job_of
from client.follow import follow
from shared.schemas.requests import State
from shared.schemas.responses import Artifact

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; created if missing.", file_okay=False)]
Limit = Annotated[int, typer.Option(min=1, max=100, help="How many to list.")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="K=V", help="Metadata of the job; may be repeated.")]
Dataset = Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True)]


def follow_job(client: OpenAI, job_id: str, as_json: bool) -> None:
    """Watch a job until it ends and show its result; with --json the live line goes to stderr."""
    try:
        follow(client, job_id, show.console(stderr=as_json))
    except KeyboardInterrupt:
        detached(job_id, "milliner show {} --follow")
    wire = client.fine_tuning.jobs.retrieve(job_id)
    job = job_of(wire)
    if as_json:
        show.print_json(wire)
    else:
        show.console().print(show.outcome(job))
    if job.status != State.SUCCEEDED:
        raise typer.Exit(1)


def detached(job_id: str, again: str) -> NoReturn:
    """Exit with 130, as shells expect after Ctrl-C, so that a following `&&` does not run."""
    show.console(stderr=True).print(f"\ndetached; {job_id} continues. Watch it again with: {again.format(job_id)}")
    raise typer.Exit(130)


def pull_files(artifacts: list[Artifact], folder: Path) -> None:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = show.console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(artifact.bytes for artifact in artifacts))
        download.pull(artifacts, folder, on_bytes=lambda count: bar.advance(task, count))


def pairs(items: list[str] | None) -> dict[str, str] | None:
    if not items:
        return None
    for item in items:
        if "=" not in item:
            raise typer.BadParameter(f"found {item!r}; allowed: key=value", param_hint="--metadata")
    return dict(item.split("=", 1) for item in items)


def print_result(wire: BaseModel, text: RenderableType, as_json: bool) -> None:
    if as_json:
        show.print_json(wire)
    else:
        show.console().print(text, soft_wrap=isinstance(text, str))  # a line that is copied must stay one
