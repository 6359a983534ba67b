"""`/v1/files`: upload, list, retrieve, content, delete."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, BinaryIO, Literal

import fastapi
from fastapi import APIRouter, Depends, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from api.deps import SessionDep, TenantDep
from api.paging import page
from api.present import file_out
from shared import storage
from shared.database import files
from shared.database.paging import Order
from shared.database.session import after_commit, session_scope
from shared.database.tables import File
from shared.datasets.formats import check_file, describe
from shared.errors import InvalidRequest, TooLarge
from shared.failpoints import Failpoint, failpoint
from shared.ids import new_id
from shared.schemas.requests import Request, Text
from shared.schemas.responses import Deleted, Page
from shared.schemas.responses import File as FileOut
from shared.settings import get_settings

FIELD_BYTES = 64 * 1024
FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["fine-tune"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}

router = APIRouter(prefix="/v1/files", tags=["files"])


class UploadForm(Request):
    """The form fields of an upload, named as in the OpenAI API."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    file: UploadFile
    purpose: Text
    expires_anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]")
    expires_seconds: int | None = Field(None, alias="expires_after[seconds]", ge=3600, le=2592000)


async def upload_form(request: fastapi.Request, tenant: TenantDep) -> AsyncIterator[UploadForm]:
    """Parse the form after authentication.

    With FastAPI's own form parameters, the whole body would be written to disk before the API key is checked.
    """
    async with request.form(max_files=1, max_fields=8, max_part_size=FIELD_BYTES) as form:
        try:
            yield UploadForm.model_validate(dict(form))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error


@router.post("", openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": FORM_SCHEMA}}}})
def upload_file(form: Annotated[UploadForm, Depends(upload_form)], tenant: TenantDep, session: SessionDep) -> FileOut:
    """Store a dataset and validate every row.

    The file is kept even if some rows are invalid; its `status` is then `error`, and `status_details` and `report` name
    the rows by line.
    """
    # The body is on disk by now. It is read three times in constant memory (hash, rows, upload to the bucket); the
    # first query, and so the transaction, comes after that.
    if form.purpose != "fine-tune":
        raise InvalidRequest(f"found purpose {form.purpose!r}; allowed for uploads: 'fine-tune'", param="purpose")
    settings, stream = get_settings(), form.file.file
    size, digest = _measure(stream)
    if size > settings.max_file_bytes:
        raise TooLarge(f"the file has {size:,} bytes; at most {settings.max_file_bytes:,} are allowed", param="file")
    stream.seek(0)
    report = check_file(stream, max_row_bytes=settings.max_row_bytes)
    stream.seek(0)
    file_id = new_id("file-")
    key = f"files/{tenant.id}/{file_id}"
    storage.put_stream(key, stream)
    failpoint(Failpoint.AFTER_FILE_PUT)
    expires = None
    if form.expires_seconds and form.expires_anchor:
        expires = datetime.now(UTC) + timedelta(seconds=form.expires_seconds)
    row = File(
        id=file_id,
        tenant_id=tenant.id,
        filename=form.file.filename or "file.jsonl",
        purpose=form.purpose,
        status="error" if report.bad_rows else "processed",
        status_details=describe(report) if report.bad_rows else None,
        bytes=size,
        sha256=digest,
        key=key,
        report=report.model_dump(mode="json"),
        expires_at=expires,
    )
    session.add(row)
    session.flush()
    return file_out(row)


@router.get("")
def list_files(
    tenant: TenantDep,
    session: SessionDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    purpose: str | None = None,
) -> Page[FileOut]:
    """List your files, newest first."""
    found = files.list_files(session, tenant.id, purpose=purpose, after=after, limit=limit, order=order)
    return page(found, file_out)


@router.get("/{file_id}")
def retrieve_file(file_id: str, tenant: TenantDep, session: SessionDep) -> FileOut:
    """Return one file with the validation report of its rows."""
    return file_out(files.get_file(session, tenant.id, file_id))


@router.get("/{file_id}/content")
def file_content(file_id: str, tenant: TenantDep) -> StreamingResponse:
    """Download the content of an uploaded dataset or of a result file (CSV), byte for byte."""
    # Own short transaction: no database connection is held while the content is sent.
    with session_scope() as session:
        file = files.get_file(session, tenant.id, file_id)
    media = "text/csv" if file.purpose == "fine-tune-results" else "application/octet-stream"
    return StreamingResponse(
        storage.read(file.key),
        media_type=media,
        headers={"content-length": str(file.bytes), "etag": f'"{file.sha256}"'},
    )


@router.delete("/{file_id}")
def delete_file(file_id: str, tenant: TenantDep, session: SessionDep) -> Deleted:
    """Delete a file. A 409 if an unfinished job uses it."""
    file = files.delete_file(session, tenant.id, file_id)
    after_commit(session, lambda: storage.delete(file.key))
    return Deleted(id=file_id, object="file")


def _measure(stream: BinaryIO) -> tuple[int, str]:
    digest = hashlib.sha256()
    while chunk := stream.read(storage.CHUNK):
        digest.update(chunk)
    return stream.tell(), digest.hexdigest()
