"""The rows of checkpoints: listing live ones and deleting old ones.

Owns: which of a job's checkpoints are live. Must not touch S3.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.database import adapters
from shared.database.attempts import lock_leased_job
from shared.database.paging import Rows, keyset_rows
from shared.database.tables import Checkpoint


def list_checkpoints(session: Session, job_id: str, *, after: str | None, limit: int) -> Rows[Checkpoint]:
    """Return a page of the job's live checkpoints, newest first."""
    live = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    return keyset_rows(session, live, Checkpoint.id, after=after, limit=limit)


def latest_checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    """List all live checkpoints of the job, newest first."""
    live = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    return session.scalars(live.order_by(Checkpoint.step.desc())).all()


def drop_checkpoints(session: Session, job_id: str, epoch: int, *, keep: int) -> list[str]:
    """Mark all but the newest `keep` checkpoints as deleted, and return the prefixes whose objects may be deleted.

    A checkpoint that an unfinished job starts from is not among them: its objects stay until that job has ended, and
    the garbage collector deletes them then. Returns nothing if this epoch does not have the lease.
    """
    if lock_leased_job(session, job_id, epoch) is None:
        return []
    old = [checkpoint.id for checkpoint in latest_checkpoints(session, job_id)[keep:]]
    dropped = update(Checkpoint).where(Checkpoint.id.in_(old)).values(deleted_at=func.clock_timestamp())
    prefixes = session.scalars(dropped.returning(Checkpoint.prefix)).all()
    needed = adapters.prefixes_in_use(session, prefixes)
    return [prefix for prefix in prefixes if prefix not in needed]
