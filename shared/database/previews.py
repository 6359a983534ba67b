"""The rows of previews: created by an API request that waits, answered by a worker of the `prepare` queue.

Owns: when a preview is waiting, taken, answered or too old. There is no lease and no epoch: the answer depends only on
the file, the base model and the request, so two workers on one preview waste time and do no harm. A worker reports
every few seconds that it works on a preview; when the reports stop, another worker takes it. Times come from Postgres's
clock. Must not touch S3. Must not ring (shared/broker/doorbell.py does).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Update, delete, func, select, update
from sqlalchemy.orm import Session

from shared.database import base_models, files
from shared.database.tables import Preview
from shared.errors import TooMany
from shared.ids import new_id
from shared.schemas.preview import PreviewCreate, PreviewError, PreviewOut

#: A preview older than this is not worked on: no client waits for it any more.
WANTED_SECONDS = 120.0
#: A preview whose worker has not reported for this long may be taken by another worker.
SILENT_SECONDS = 10.0
#: After this many workers have died while working on a preview, it is refused: it probably causes the crash.
MAX_TAKES = 2
#: How many previews of one tenant may wait at once.
MAX_WAITING = 4
#: Previews older than this are deleted.
KEPT_SECONDS = 3600.0


def create(session: Session, tenant_id: str, request: PreviewCreate) -> str:
    """Create a preview and return its id, or the id of the same tenant's identical preview of the last WANTED_SECONDS.

    So a client that asks again after a timeout gets the answer that was computed meanwhile. A preview that failed is
    not reused. Raises NotFound, InvalidRequest, and TooMany if MAX_WAITING previews of the tenant are waiting.
    """
    base = base_models.get_base_model(session, request.model)
    files.get_usable_file(session, tenant_id, request.training_file, None, "training_file")
    body = request.model_dump(mode="json")
    same = Preview.tenant_id == tenant_id, Preview.request == body, Preview.error.is_(None), _wanted()
    earlier = session.scalar(select(Preview.id).where(*same).order_by(Preview.created_at.desc()).limit(1))
    if earlier is not None:
        return earlier
    waiting = select(func.count()).where(Preview.tenant_id == tenant_id, Preview.finished_at.is_(None), _wanted())
    if (session.scalar(waiting) or 0) >= MAX_WAITING:
        raise TooMany(f"{MAX_WAITING} previews of yours are waiting; allowed: {MAX_WAITING}; retry when one is done")
    preview = Preview(
        id=new_id("preview-"),
        tenant_id=tenant_id,
        base_model=base.name,
        training_file=request.training_file,
        request=body,
    )
    session.add(preview)
    session.flush()
    return preview.id


def find(session: Session, preview_id: str) -> tuple[Preview, bool]:
    """Return the preview, and whether a worker is working on it."""
    taken = func.coalesce(Preview.taken_at > _ago(SILENT_SECONDS), False)
    preview, is_taken = session.execute(select(Preview, taken).where(Preview.id == preview_id)).one()
    return preview, is_taken


# ---------------------------------------------------------------- what a worker does


def take(session: Session) -> Preview | None:
    """Take the oldest preview that no worker is working on. Refuse those that have killed MAX_TAKES workers."""
    free = Preview.taken_at.is_(None) | (Preview.taken_at < _ago(SILENT_SECONDS))
    waiting = (Preview.finished_at.is_(None), _wanted(), free)
    message = f"{MAX_TAKES} workers ended while working on this preview; it is not tried again"
    error = PreviewError(code="trainer_crashed", message=message, retryable=False)
    session.execute(
        update(Preview)
        .where(*waiting, Preview.takes >= MAX_TAKES)
        .values(error=error.model_dump(mode="json"), finished_at=func.clock_timestamp())
    )
    oldest = select(Preview).where(*waiting).order_by(Preview.created_at).limit(1)
    preview = session.scalar(oldest.with_for_update(skip_locked=True))
    if preview is not None:
        session.execute(_unfinished(preview.id).values(taken_at=func.clock_timestamp(), takes=Preview.takes + 1))
    return preview


def keep(session: Session, preview_id: str) -> bool:
    """Report that a worker is still working on it. Returns False if it can stop: answered already, or too old."""
    waiting = update(Preview).where(Preview.id == preview_id, Preview.finished_at.is_(None), _wanted())
    return session.scalar(waiting.values(taken_at=func.clock_timestamp()).returning(Preview.id)) is not None


def give_back(session: Session, preview_id: str) -> None:
    """Release the preview, so that another worker can take it at once. This take is not counted."""
    session.execute(_unfinished(preview_id).values(taken_at=None, takes=Preview.takes - 1))


def answer(session: Session, preview_id: str, result: PreviewOut) -> None:
    """Store the answer, unless the preview already has one or was refused."""
    session.execute(
        _unfinished(preview_id).values(result=result.model_dump(mode="json"), finished_at=func.clock_timestamp())
    )


def refuse(session: Session, preview_id: str, error: PreviewError) -> None:
    """Store why the preview cannot be answered, unless it already has an answer or was refused."""
    session.execute(
        _unfinished(preview_id).values(error=error.model_dump(mode="json"), finished_at=func.clock_timestamp())
    )


# ---------------------------------------------------------------- what the sweeper does


def drop_old(session: Session) -> None:
    """Delete previews older than KEPT_SECONDS: they contain rows of users' datasets, which must not be kept."""
    session.execute(delete(Preview).where(Preview.created_at < _ago(KEPT_SECONDS)))


def _wanted() -> ColumnElement[bool]:
    return Preview.created_at > _ago(WANTED_SECONDS)


def _unfinished(preview_id: str) -> Update:
    return update(Preview).where(Preview.id == preview_id, Preview.finished_at.is_(None))


def _ago(seconds: float) -> ColumnElement[datetime]:
    return func.clock_timestamp() - timedelta(seconds=seconds)
