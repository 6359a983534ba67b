"""Uploaded datasets and result files: look-ups, locks and deletion of their rows.

Owns: which files are live. Must not touch S3.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from shared.database.paging import Order, Rows, keyset_rows
from shared.database.tables import File, Job
from shared.datasets import formats
from shared.errors import Conflict, InvalidRequest, NotFound
from shared.schemas.requests import TERMINAL, MethodName
from shared.schemas.results import FileReport

#: A row lock until the transaction ends: `share` blocks changes and deletion, `update` blocks other locks too.
Lock = Literal["share", "update"]


def get_file(
    session: Session, tenant_id: str, file_id: str, *, param: str = "file_id", lock: Lock | None = None
) -> File:
    """Return the tenant's file. Raises NotFound if it is deleted, expired or another tenant's."""
    query = select(File).where(File.id == file_id, File.tenant_id == tenant_id, live_file())
    if lock is not None:
        query = query.with_for_update(read=lock == "share")
    file = session.scalar(query)
    if file is None:
        raise NotFound(
            f"no file {file_id!r}; list yours with GET /v1/files, or upload one with POST /v1/files",
            param=param,
            code="file_not_found",
        )
    return file


def get_usable_file(session: Session, tenant_id: str, file_id: str, method: MethodName | None, param: str) -> File:
    """Return the tenant's dataset, locked against deletion until the transaction ends.

    Raises NotFound, or InvalidRequest if its purpose is not `fine-tune` or its row format does not fit `method`.
    """
    file = get_file(session, tenant_id, file_id, param=param, lock="share")
    if file.purpose != "fine-tune":
        raise InvalidRequest(f"file {file_id} has purpose {file.purpose!r}; allowed: 'fine-tune'", param=param)
    report = FileReport.model_validate(file.report) if file.report else None
    if method is not None and report is not None and (misfit := formats.misfit(method, report.format)):
        raise InvalidRequest(f"file {file_id}: {misfit}", param=param, code=f"invalid_{param}")
    return file


def list_files(
    session: Session, tenant_id: str, *, purpose: str | None, after: str | None, limit: int, order: Order
) -> Rows[File]:
    """Return a page of the tenant's files, without deleted and expired ones."""
    query = select(File).where(File.tenant_id == tenant_id, live_file())
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    return keyset_rows(session, query, File.id, after=after, limit=limit, order=order)


def delete_file(session: Session, tenant_id: str, file_id: str) -> File:
    """Mark a file as deleted. The caller deletes its object. Raises Conflict while an unfinished job needs the file."""
    file = get_file(session, tenant_id, file_id, lock="update")
    needs = or_(Job.training_file == file_id, Job.validation_file == file_id)
    user = session.scalar(select(Job.id).where(Job.tenant_id == tenant_id, needs, Job.state.not_in(TERMINAL)).limit(1))
    if user is not None:
        raise Conflict(f"job {user} still needs file {file_id}; cancel it or wait until it ends", code="file_in_use")
    file.deleted_at = func.clock_timestamp()
    session.flush()
    return file


def live_file() -> ColumnElement[bool]:
    """The condition that a file is neither deleted nor expired."""
    fresh = File.expires_at.is_(None) | (File.expires_at > func.clock_timestamp())
    return File.deleted_at.is_(None) & fresh
