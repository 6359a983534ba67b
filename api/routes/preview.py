"""`/v1/fine_tuning/preview`: rows as tokens, with the spans that are trained. A worker tokenizes them.

The request polls the preview's row in Postgres until the worker has written its result. While it waits it holds neither
a thread nor a database connection: each poll is a short query in the thread pool.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from api.deps import BellDep, TenantDep
from shared.broker.queues import Queue
from shared.database import previews
from shared.database.session import session_scope
from shared.errors import InvalidRequest, MillinerError, Unavailable
from shared.schemas.preview import PreviewCreate, PreviewError, PreviewOut
from shared.settings import get_settings

router = APIRouter(prefix="/v1/fine_tuning/preview", tags=["fine-tuning"])

#: Seconds between two polls.
POLL_SECONDS = 0.1
#: Seconds between two rings while no worker has taken the preview: the broker may lose one.
RING_SECONDS = 2.0
#: Seconds, in the `Retry-After` header.
RETRY_AFTER = 5


@router.post("")
async def create_preview(body: PreviewCreate, tenant: TenantDep, bell: BellDep) -> PreviewOut:
    """Show rows of a file as tokens of this base model, with the tokens that are trained marked.

    A worker computes this with the code that training uses. A 503 with `Retry-After` if it does not respond in time; a
    retry within two minutes gets the same preview.
    """
    preview_id = await run_in_threadpool(_create, tenant.id, body)
    started, last_ring = time.monotonic(), -RING_SECONDS
    while True:
        result, is_taken = await run_in_threadpool(_poll, preview_id)
        if result is not None:
            return result
        waited = time.monotonic() - started
        if waited > get_settings().preview_seconds:
            raise _timed_out(waited, is_taken=is_taken)
        if not is_taken and waited - last_ring >= RING_SECONDS:
            bell.ring(Queue.PREPARE)
            last_ring = waited
        await asyncio.sleep(POLL_SECONDS)


def _create(tenant_id: str, body: PreviewCreate) -> str:
    with session_scope() as session:
        return previews.create(session, tenant_id, body)


def _poll(preview_id: str) -> tuple[PreviewOut | None, bool]:
    """Return the result, if it is there, and whether a worker has taken the preview. Raises the worker's error."""
    with session_scope() as session:
        preview, is_taken = previews.find(session, preview_id)
    if preview.error is not None:
        raise _error(PreviewError.model_validate(preview.error))
    return PreviewOut.model_validate(preview.result) if preview.result is not None else None, is_taken


def _error(found: PreviewError) -> MillinerError:
    kind = Unavailable if found.retryable else InvalidRequest
    return kind("; ".join(filter(None, (found.message, found.hint))), param=found.param, code=found.code)


def _timed_out(waited: float, *, is_taken: bool) -> Unavailable:
    if is_taken:
        message = f"the preview is not ready after {waited:.0f} s: the file is large or the worker busy; send it again"
        return Unavailable(message, code="preview_unfinished", retry_after=RETRY_AFTER)
    message = f"no prepare worker took the preview within {waited:.0f} s; check that one is running and not busy"
    return Unavailable(message, code="no_prepare_worker", retry_after=RETRY_AFTER)
