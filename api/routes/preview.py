"""`/v1/fine_tuning/preview`: rows as tokens with their trained spans. A worker tokenizes; the request waits for it.

Waiting holds neither a thread nor a database connection: each look at the row is a short query in the thread pool.
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

LOOK_EVERY = 0.1
#: As long as nobody has taken it: a ring may be lost.
RING_EVERY = 2.0
RETRY_AFTER = 5


@router.post("")
async def create_preview(body: PreviewCreate, tenant: TenantDep, bell: BellDep) -> PreviewOut:
    """Rows of the caller's file as this base's tokenizer sees them, by the code that training uses."""
    preview_id = await run_in_threadpool(_ask, tenant.id, body)
    asked_at, rung_at = time.monotonic(), -RING_EVERY
    while True:
        result, is_taken = await run_in_threadpool(_look, preview_id)
        if result is not None:
            return result
        waited = time.monotonic() - asked_at
        if waited > get_settings().preview_seconds:
            raise _too_late(waited, is_taken=is_taken)
        if not is_taken and waited - rung_at >= RING_EVERY:
            bell.ring(Queue.PREPARE)
            rung_at = waited
        await asyncio.sleep(LOOK_EVERY)


def _ask(tenant_id: str, body: PreviewCreate) -> str:
    with session_scope() as session:
        return previews.create(session, tenant_id, body)


def _look(preview_id: str) -> tuple[PreviewOut | None, bool]:
    """The answer, if there is one, and whether a worker is at it. Raises what the worker found wrong."""
    with session_scope() as session:
        preview, is_taken = previews.find(session, preview_id)
    if preview.error is not None:
        raise _error(PreviewError.model_validate(preview.error))
    return PreviewOut.model_validate(preview.result) if preview.result is not None else None, is_taken


def _error(found: PreviewError) -> MillinerError:
    kind = Unavailable if found.retryable else InvalidRequest
    return kind("; ".join(filter(None, (found.message, found.hint))), param=found.param, code=found.code)


def _too_late(waited: float, *, is_taken: bool) -> Unavailable:
    if is_taken:
        message = f"the preview is not ready after {waited:.0f} s: the file is large, or the worker busy; ask again"
        return Unavailable(message, code="preview_unfinished", retry_after=RETRY_AFTER)
    message = f"no prepare worker answered within {waited:.0f} s: is one running, and not busy with a large file?"
    return Unavailable(message, code="no_prepare_worker", retry_after=RETRY_AFTER)
