"""From a file on disk to a job: upload, rehearse with a dry run, ask, send.

Owns: the request's body, and that nothing is left behind on the server when it goes no further. Must not print.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import openai
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from pydantic import ValidationError

from client.connect import file_of, job_of
from shared.errors import InvalidRequest
from shared.schemas.requests import TERMINAL, JobCreate, MethodName, State
from shared.schemas.responses import File
from shared.schemas.results import JobError

Body = dict[str, Any]
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


def model_of(model: str | None, start: str | None) -> str:
    """What the request's `model` is: an adapter to start from brings its base along. Raises InvalidRequest: neither."""
    named = model if model is not None else start
    if named is None:
        raise InvalidRequest("neither --model nor --from is given; name a base model, or an adapter to go on from")
    return named


def body_of(
    *,
    model: str,
    hyperparameters: Mapping[str, Any],
    lora: Mapping[str, Any],
    trainer: Mapping[str, Any],
    method: MethodName = "supervised",
    **rest: Any,
) -> Body:
    """The request's body from what was said on the command line; what was not said is left to the server.

    Raises InvalidRequest: a value that the server would refuse, found before anything is uploaded.
    """
    said = {"lora": _given(lora), "trainer": _given(trainer), **_given(rest)}
    knobs = _given(hyperparameters)
    if knobs or method != "supervised":
        said["method"] = {"type": method, method: {"hyperparameters": knobs}}
    body = {"model": model} | {key: value for key, value in said.items() if value != {}}
    try:
        JobCreate.model_validate({"training_file": "not-yet"} | body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{param}: {first['msg']} (found {first['input']!r})", param=param) from None
    return body


def submit(
    client: OpenAI,
    body: Body,
    training: Path,
    validation: Path | None,
    *,
    accept: Callable[[FineTuningJob], bool],
    pause: Callable[[float], None] = time.sleep,
) -> FineTuningJob | None:
    """Upload and rehearse; if `accept` says yes to the rehearsal (its plan is there), send the job and return it.

    Otherwise, or if anything fails or is interrupted, the uploads are deleted again. Raises BadRows or Refused.
    """
    if not _names_checkpoint(body["model"]):
        client.models.retrieve(body["model"])  # A wrong name is told before gigabytes are sent.
    with ExitStack() as undo:
        skip = body.get("trainer", {}).get("skip_bad_rows", 0)
        body = body | {"training_file": _upload(client, training, undo, skip)}
        if validation is not None:
            body["validation_file"] = _upload(client, validation, undo, skip)
        if not accept(_rehearse(client, body, undo, pause)):
            return None
        job = _create(client, body)
        undo.pop_all()
    return job


def _names_checkpoint(model: str) -> bool:
    """These are in no list of models: the rehearsal tells whether there is one."""
    return model.startswith("ftckpt_") or ":ckpt-step-" in model


def _given(options: Mapping[str, Any]) -> Body:
    return {key: value for key, value in options.items() if value is not None}


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
