"""A trained adapter into the bucket: its files up and back again, then what seals them.

Owns: what is put where, and in which order: the signature after all files, the manifest after the signature. Every put
is fenced by the lease epoch. Must not write a row, nor decide what becomes of the job (`runner.py`).
"""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shared import signing, storage
from shared.database import jobs
from shared.database.session import session_scope
from shared.database.tables import File, Job
from shared.ids import new_id
from shared.schemas import manifest
from shared.schemas.manifest import SIGNATURE, HashedFile, Manifest
from shared.schemas.results import Plan
from shared.settings import get_settings
from shared.storage import MANIFEST, Entry
from shared.telemetry import log
from worker.attempt.exporting import Published
from worker.attempt.waiting import Patience
from worker.trainer.protocol import Verified

COLUMNS = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


class Damaged(Exception):
    """A file cannot be had again as it was made: from the bucket, although put there twice, nor from the disk."""


class Result(NamedTuple):
    """A result file that lies in the bucket."""

    id: str
    key: str
    bytes: int
    sha256: str


def fetch_back(prefix: str, files: list[Entry], source: Path, folder: Path, *, epoch: int, patience: Patience) -> None:
    """Download into `folder` what was uploaded from `source`, every hash checked. Raises `Damaged`.

    A file that comes back wrong is uploaded once more, if it is still right here, and must then come back right.
    """
    for file in files:
        key, path = prefix + file["path"], file["path"]
        fetch = partial(storage.fetch, key, folder / path, file["sha256"], tick=patience.tick)
        try:
            patience.do(fetch)
        except storage.Corrupt as damaged:
            log.warning("published.damaged", key=key, error=str(damaged))
            if storage.sha256_of(source / path) != file["sha256"]:
                raise Damaged(f"{path} has changed on the disk since it was uploaded") from damaged
            patience.do(partial(storage.put_file, key, source / path, file["sha256"], epoch=epoch))
            try:
                patience.do(fetch)
            except storage.Corrupt as again:
                raise Damaged(str(again)) from again


def seal(
    prefix: str,
    files: list[Entry],
    job: Job,
    *,
    name: str,
    verified: Verified,
    exported: Published,
    epoch: int,
    patience: Patience,
) -> tuple[list[Entry], str | None]:
    """Put signature and manifest beside the files and the exports; returns the entries of all, and who signed (None:
    nobody).
    """
    files = [*files, *exported.files]
    path = get_settings().signing_key_file
    key = signing.private_key(path) if path is not None else None
    signed_by = signing.name_of(key.public_key()) if key is not None else None
    text = patience.do(lambda: _manifest(job, files, name, verified, exported, signed_by=signed_by)).text()
    put = partial(storage.put_named, prefix, epoch=epoch)
    sealed = list(files)
    if key is not None:
        signature = key.sign(text)
        sealed.append(patience.do(lambda: put(SIGNATURE, signature, content_type="application/octet-stream")))
    sealed.append(patience.do(lambda: put(MANIFEST, text, content_type="application/json")))
    return sealed, signed_by


def put_result(job: Job, *, patience: Patience) -> Result:
    """OpenAI's result file, one line a step, into the bucket."""
    table = patience.do(lambda: _result_csv(job.id))
    file_id = new_id("file-")
    key = f"files/{job.tenant_id}/{file_id}"
    patience.do(lambda: storage.put_bytes(key, table, content_type="text/csv"))
    return Result(file_id, key, len(table), storage.sha256_of_bytes(table))


def drop_strays(prefix: str, files: list[Entry], *, patience: Patience) -> None:
    """What earlier attempts have put beside the manifest's files, such as an export that could not be made again.

    Only of a job that has ended: nobody else can have put there what will be named.
    """
    named = {prefix + file["path"] for file in files}
    patience.do(lambda: storage.delete_many([at.key for at in storage.listing(prefix) if at.key not in named]))


def result_row(job: Job, result: Result) -> File:
    """What makes it real; a new one for each try to commit it."""
    return File(
        id=result.id,
        tenant_id=job.tenant_id,
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        status="processed",
        bytes=result.bytes,
        sha256=result.sha256,
        key=result.key,
    )


def _manifest(
    job: Job, files: list[Entry], name: str, verified: Verified, exported: Published, *, signed_by: str | None
) -> Manifest:
    with session_scope() as session:
        base, training, validation = jobs.inputs_of(session, job)
    start = (
        manifest.Start(name=job.start_name, sha256=job.start_sha256) if job.start_name and job.start_sha256 else None
    )
    return Manifest(
        job=job.id,
        model=name,
        base=manifest.Base(
            name=base.name,
            public_id=base.public_id,
            revision=base.revision,
            digest=base.digest,
            license=base.license,
        ),
        training_file=manifest.Dataset(id=training.id, sha256=training.sha256),
        validation_file=manifest.Dataset(id=validation.id, sha256=validation.sha256) if validation else None,
        from_checkpoint=start,
        recipe=Plan.model_validate(job.plan).recipe,
        proof=verified.proof,
        exports=exported.exports,
        versions=verified.versions,
        signed_by=signed_by,
        files=[HashedFile.model_validate(file) for file in files],
    )


def _result_csv(job_id: str) -> bytes:
    with session_scope() as session:
        values = [row.model_dump(exclude_none=True) for row in jobs.metrics_of(session, job_id)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    writer.writerows([row["step"], *(row.get(name, "") for name in COLUMNS)] for row in values)
    return out.getvalue().encode()
