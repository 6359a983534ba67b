"""Rows of checkpoints.

Owns: which of a job's checkpoints are live, and retiring old ones. Must not touch S3.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.database import adapters
from shared.database.attempts import lock_held_job
from shared.database.paging import Rows, keyset_rows
from shared.database.tables import Checkpoint


def list_checkpoints(session: Session, job_id: str, *, after: str | None, limit: int) -> Rows[Checkpoint]:
    """A page of the job's live checkpoints, newest first."""
    live = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    return keyset_rows(session, live, Checkpoint.id, after=after, limit=limit)


def latest_checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    """The job's live checkpoints, newest first."""
    live = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    return session.scalars(live.order_by(Checkpoint.step.desc())).all()


def drop_checkpoints(session: Session, job_id: str, epoch: int, *, keep: int) -> list[str]:
    """Retire all but the newest `keep` checkpoints; returns the prefixes whose objects may go.

    The objects of one that another job starts from stay until that has ended; the garbage collector sees to it.
    """
    if lock_held_job(session, job_id, epoch) is None:
        return []
    old = [checkpoint.id for checkpoint in latest_checkpoints(session, job_id)[keep:]]
    dropped = update(Checkpoint).where(Checkpoint.id.in_(old)).values(deleted_at=func.clock_timestamp())
    prefixes = session.scalars(dropped.returning(Checkpoint.prefix)).all()
    needed = adapters.prefixes_in_use(session, prefixes)
    return [prefix for prefix in prefixes if prefix not in needed]
