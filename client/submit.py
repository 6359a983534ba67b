"""Submit a job: upload its files, do a dry run, ask, and send it.

Owns: deleting the uploads if the job is not sent. Must not print.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import openai
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from client.connect import file_of, job_of
from client.request import Body
from shared.schemas.requests import TERMINAL, State
from shared.schemas.responses import File
from shared.schemas.results import JobError

POLL = 0.3


class BadRows(Exception):
    """The server found rows in the file that cannot be trained on."""

    def __init__(self, file: File) -> None:
        super().__init__(file.filename)
        self.file = file


class Refused(Exception):
    """The dry run failed, so the job would fail too."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


def submit(
    client: OpenAI,
    body: Body,
    training: Path | None,
    validation: Path | None,
    *,
    accept: Callable[[FineTuningJob], bool],
    pause: Callable[[float], None] = time.sleep,
) -> FineTuningJob | None:
    """Upload the files and do a dry run; if `accept` returns true for it (it has the plan), send the job and return it.

    Without a path, the file is the one that the body names. If `accept` returns false, or anything fails or is
    interrupted, the uploads are deleted. Raises BadRows or Refused.
    """
    if not _names_checkpoint(body["model"]):
        client.models.retrieve(body["model"])  # A wrong name is reported before gigabytes are uploaded.
    with ExitStack() as undo:
        skip = body.get("trainer", {}).get("skip_bad_rows", 0)
        for key, path in (("training_file", training), ("validation_file", validation)):
            if path is not None:
                body = body | {key: _upload(client, path, undo, skip)}
        if not accept(_dry_run(client, body, undo, pause)):
            return None
        job = _create(client, body)
        undo.pop_all()
    return job


def _names_checkpoint(model: str) -> bool:
    """Checkpoints are not listed as models; the dry run finds out whether there is one."""
    return model.startswith("ftckpt_") or ":ckpt-step-" in model


def _upload(client: OpenAI, path: Path, undo: ExitStack, skip_bad_rows: int) -> str:
    """Send a file; the server reads every row of it before it answers."""
    with path.open("rb") as stream:
        file = file_of(client.files.create(file=stream, purpose="fine-tune"))
    undo.callback(_quietly, lambda: client.files.delete(file.id))
    bad = file.report.bad_rows if file.report else 0
    if bad > skip_bad_rows or (file.status == "error" and not bad):
        raise BadRows(file)
    return file.id


def _dry_run(client: OpenAI, body: Body, undo: ExitStack, pause: Callable[[float], None]) -> FineTuningJob:
    """Do a dry run to its end: the dataset is tokenized and the recipe resolved, nothing is trained."""
    wire = _create(client, body | {"dry_run": True})
    job = job_of(wire)
    undo.callback(_quietly, lambda: job.status in TERMINAL or client.fine_tuning.jobs.cancel(job.id))
    while job.status not in TERMINAL:
        pause(POLL)
        wire = client.fine_tuning.jobs.retrieve(job.id)
        job = job_of(wire)
    if job.status == State.FAILED or job.plan is None:
        raise Refused(job.error or JobError(code="cancelled", message="the dry run was cancelled before it had a plan"))
    return wire


def _create(client: OpenAI, body: Body) -> FineTuningJob:
    """Send the whole body as `extra_body`, which takes OpenAI's keys and ours."""
    return client.fine_tuning.jobs.create(model=body["model"], training_file=body["training_file"], extra_body=body)


def _quietly(action: Callable[[], object]) -> None:
    """Clean up without hiding the error that led here."""
    with suppress(openai.APIError):
        action()
