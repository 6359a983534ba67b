"""From a file on disk to a job: upload, rehearse with a dry run, ask, send.

Owns: that nothing is left behind on the server when it goes no further. Must not print.
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
from shared.responses import File
from shared.schemas import TERMINAL, State
from shared.training import JobError

POLL = 0.3


class BadRows(Exception):
    """The server has read the file and found rows that cannot be trained on."""

    def __init__(self, file: File) -> None:
        super().__init__(file.filename)
        self.file = file


class Refused(Exception):
    """The dry run failed: the job would, too."""

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
    """Upload and rehearse; if `accept` says yes to the rehearsal (its plan is there), send the job and return it.

    Without a path, the file is the one that the body names. If `accept` says no, or anything fails or is interrupted,
    the uploads are deleted again. Raises BadRows or Refused.
    """
    if not _names_checkpoint(body["model"]):
        client.models.retrieve(body["model"])  # A wrong name is told before gigabytes are sent.
    with ExitStack() as undo:
        skip = body.get("trainer", {}).get("skip_bad_rows", 0)
        for key, path in (("training_file", training), ("validation_file", validation)):
            if path is not None:
                body = body | {key: _upload(client, path, undo, skip)}
        if not accept(_rehearse(client, body, undo, pause)):
            return None
        job = _create(client, body)
        undo.pop_all()
    return job


def _names_checkpoint(model: str) -> bool:
    """These are in no list of models: the rehearsal tells whether there is one."""
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


def _rehearse(client: OpenAI, body: Body, undo: ExitStack, pause: Callable[[float], None]) -> FineTuningJob:
    """A dry run to its end: the dataset is tokenized and counted, the recipe resolved, nothing trained."""
    wire = _create(client, body | {"dry_run": True})
    job = job_of(wire)
    undo.callback(_quietly, lambda: job.status in TERMINAL or client.fine_tuning.jobs.cancel(job.id))
    while job.status not in TERMINAL:
        pause(POLL)
        wire = client.fine_tuning.jobs.retrieve(job.id)
        job = job_of(wire)
    if job.status == State.FAILED or job.plan is None:
        raise Refused(job.error or JobError(code="cancelled", message="the dry run was cancelled before its plan"))
    return wire


def _create(client: OpenAI, body: Body) -> FineTuningJob:
    """All goes by `extra_body`: our keys and OpenAI's are one request there."""
    return client.fine_tuning.jobs.create(model=body["model"], training_file=body["training_file"], extra_body=body)


def _quietly(action: Callable[[], object]) -> None:
    """Tidying up after an error must not hide it."""
    with suppress(openai.APIError):
        action()
