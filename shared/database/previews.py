"""The table of previews: asked for by a request that waits, taken and answered by a worker of the `prepare` queue.

No lease and no epoch: an answer is a pure function of a file, a base and a request, so two workers at one preview waste
time and nothing else. Who works on one says so every few seconds; where it falls silent, another takes over. Postgres's
clock only. Must not touch S3, nor ring.
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

#: Asked for longer ago than this, nobody waits for it any more.
WANTED_SECONDS = 120.0
#: Taken, and not heard of for so long: its worker is gone.
SILENT_SECONDS = 10.0
#: Workers that may die at one preview before it is thought to be the reason.
MOST_TAKES = 2
#: Previews of a tenant that may wait at once.
MOST_WAITING = 4
KEPT_SECONDS = 3600.0


def create(session: Session, tenant_id: str, request: PreviewCreate) -> str:
    """The id of a preview to wait for. The same question within minutes is the same preview, unless that one failed.

    So a client that was told to come back finds what was done meanwhile.
    """
    base = base_models.get_base_model(session, request.model)
    files.get_usable_file(session, tenant_id, request.training_file, None, "training_file")
    body = request.model_dump(mode="json")
    same = Preview.tenant_id == tenant_id, Preview.request == body, Preview.error.is_(None), _wanted()
    earlier = session.scalar(select(Preview.id).where(*same).order_by(Preview.created_at.desc()).limit(1))
    if earlier is not None:
        return earlier
    waiting = select(func.count()).where(Preview.tenant_id == tenant_id, Preview.finished_at.is_(None), _wanted())
    if (session.scalar(waiting) or 0) >= MOST_WAITING:
        raise TooMany(f"{MOST_WAITING} previews of yours are waiting, and no more may; ask again once they are done")
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
    """The preview, and whether a worker is at it."""
    taken = func.coalesce(Preview.taken_at > _ago(SILENT_SECONDS), False)
    preview, is_taken = session.execute(select(Preview, taken).where(Preview.id == preview_id)).one()
    return preview, is_taken


# ---------------------------------------------------------------- what a worker does


def take(session: Session) -> Preview | None:
    """The preview that has waited longest, and that nobody is at. One that workers have died of is refused instead."""
    free = Preview.taken_at.is_(None) | (Preview.taken_at < _ago(SILENT_SECONDS))
    waiting = (Preview.finished_at.is_(None), _wanted(), free)
    message = f"{MOST_TAKES} workers ended while they were at this preview"
    deadly = PreviewError(code="trainer_crashed", message=message, retryable=False)
    session.execute(
        update(Preview)
        .where(*waiting, Preview.takes >= MOST_TAKES)
        .values(error=deadly.model_dump(mode="json"), finished_at=func.clock_timestamp())
    )
    oldest = select(Preview).where(*waiting).order_by(Preview.created_at).limit(1)
    preview = session.scalar(oldest.with_for_update(skip_locked=True))
    if preview is not None:
        session.execute(_unfinished(preview.id).values(taken_at=func.clock_timestamp(), takes=Preview.takes + 1))
    return preview


def keep(session: Session, preview_id: str) -> bool:
    """Say that a worker is still at it; False if that is for nothing: it is answered, or nobody waits any more."""
    waiting = update(Preview).where(Preview.id == preview_id, Preview.finished_at.is_(None), _wanted())
    return session.scalar(waiting.values(taken_at=func.clock_timestamp()).returning(Preview.id)) is not None


def give_back(session: Session, preview_id: str) -> None:
    """Leave it to another worker, at once."""
    session.execute(_unfinished(preview_id).values(taken_at=None, takes=Preview.takes - 1))


def answer(session: Session, preview_id: str, result: PreviewOut) -> None:
    """The first answer counts."""
    session.execute(
        _unfinished(preview_id).values(result=result.model_dump(mode="json"), finished_at=func.clock_timestamp())
    )


def refuse(session: Session, preview_id: str, error: PreviewError) -> None:
    """Say why there is none."""
    session.execute(
        _unfinished(preview_id).values(error=error.model_dump(mode="json"), finished_at=func.clock_timestamp())
    )


# ---------------------------------------------------------------- what the sweeper does


def drop_old(session: Session) -> None:
    """They hold rows of datasets, which are not ours to keep."""
    session.execute(delete(Preview).where(Preview.created_at < _ago(KEPT_SECONDS)))


def _wanted() -> ColumnElement[bool]:
    return Preview.created_at > _ago(WANTED_SECONDS)


def _unfinished(preview_id: str) -> Update:
    return update(Preview).where(Preview.id == preview_id, Preview.finished_at.is_(None))


def _ago(seconds: float) -> ColumnElement[datetime]:
    return func.clock_timestamp() - timedelta(seconds=seconds)
