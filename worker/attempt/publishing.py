"""Publish a trained adapter to the bucket: check its uploaded files, then add signature and manifest.

Owns: what is uploaded where, and the order: the signature after all files, the manifest after the signature. Every
upload under the adapter's prefix is fenced by the lease epoch. Must not write a row, nor decide how the job ends
(`runner.py`).
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
from worker.attempt.exporting import PublishedExports
from worker.attempt.waiting import Retry
from worker.trainer.protocol import Verified

COLUMNS = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


class Damaged(Exception):
    """A file is damaged for good: in the bucket after two uploads, or on the disk as well."""


class Result(NamedTuple):
    """A result file in the bucket, not yet in the database."""

    id: str
    key: str
    bytes: int
    sha256: str


def fetch_back(prefix: str, files: list[Entry], source: Path, folder: Path, *, epoch: int, retry: Retry) -> None:
    """Download into `folder` what was uploaded from `source`, and check every hash. Raises `Damaged`.

    A file with the wrong hash is uploaded once more, if the copy on the disk is still right, and downloaded again.
    """
    for file in files:
        key, path = prefix + file["path"], file["path"]
        fetch = partial(storage.fetch, key, folder / path, file["sha256"], tick=retry.tick)
        try:
            retry.call(fetch)
        except storage.Corrupt as damaged:
            log.warning("upload.damaged", key=key, error=str(damaged))
            if storage.sha256_of(source / path) != file["sha256"]:
                raise Damaged(f"{path} has changed on the disk since it was uploaded") from damaged
            retry.call(partial(storage.put_file, key, source / path, file["sha256"], epoch=epoch))
            try:
                retry.call(fetch)
            except storage.Corrupt as again:
                raise Damaged(str(again)) from again


def seal(
    prefix: str,
    files: list[Entry],
    job: Job,
    *,
    name: str,
    verified: Verified,
    exported: PublishedExports,
    epoch: int,
    retry: Retry,
) -> tuple[list[Entry], str | None]:
    """Upload signature and manifest for the files and the exports.

    Returns the entries of all files, and the name of the key that signed them (None without a key).
    """
    files = [*files, *exported.files]
    path = get_settings().signing_key_file
    key = signing.private_key(path) if path is not None else None
    signed_by = signing.name_of(key.public_key()) if key is not None else None
    text = retry.call(lambda: _manifest(job, files, name, verified, exported, signed_by=signed_by)).text()
    put = partial(storage.put_named, prefix, epoch=epoch)
    sealed = list(files)
    if key is not None:
        signature = key.sign(text)
        sealed.append(retry.call(lambda: put(SIGNATURE, signature, content_type="application/octet-stream")))
    sealed.append(retry.call(lambda: put(MANIFEST, text, content_type="application/json")))
    return sealed, signed_by


def put_result(job: Job, *, retry: Retry) -> Result:
    """Upload the result file, in OpenAI's format with one line per step."""
    table = retry.call(lambda: _result_csv(job.id))
    file_id = new_id("file-")
    key = f"files/{job.tenant_id}/{file_id}"
    retry.call(lambda: storage.put_bytes(key, table, content_type="text/csv"))
    return Result(file_id, key, len(table), storage.sha256_of_bytes(table))


def delete_strays(prefix: str, files: list[Entry], *, retry: Retry) -> None:
    """Delete files of earlier attempts that the manifest does not list, such as an export that failed this time.

    Call it only once the job has ended: before, another attempt may be uploading files that its manifest will list.
    """
    listed = {prefix + file["path"] for file in files}
    retry.call(lambda: storage.delete_many([at.key for at in storage.listing(prefix) if at.key not in listed]))


def result_row(job: Job, result: Result) -> File:
    """Return the row for an uploaded result file; each try to commit needs a new one."""
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
    job: Job, files: list[Entry], name: str, verified: Verified, exported: PublishedExports, *, signed_by: str | None
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
