"""How a worker gets a job: claims, expired leases, and which waiting jobs to notify workers of.

Owns: which job is claimed next. Times come from Postgres's clock. Must not ring (shared/broker/doorbell.py does).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, func, select, text, update
from sqlalchemy.orm import Session

from shared.broker.queues import Queue
from shared.database.state_machine import MOVES, WAITING, Reason, transition
from shared.database.tables import Job
from shared.schemas.requests import Desired, Phase, State


def claim(session: Session, queue: Queue, *, owner: str, lease_seconds: float) -> Job | None:
    """Claim the next job of a queue under a new lease; None if there is none.

    Order: highest priority, then the tenant with the fewest running jobs, then the oldest.
    """
    running = (
        select(Job.tenant_id, func.count().label("n"))
        .where(Job.lease_owner.is_not(None), Job.state == State.RUNNING)  # ix_jobs_leased needs the first condition
        .group_by(Job.tenant_id)
        .cte()
    )
    job = session.scalar(
        select(Job)
        .outerjoin(running, running.c.tenant_id == Job.tenant_id)
        .where(*claimable(queue), Job.not_before <= func.clock_timestamp())
        .order_by(Job.priority.desc(), func.coalesce(running.c.n, 0), Job.created_at, Job.id)
        .limit(1)
        .with_for_update(of=Job, skip_locked=True)
    )
    if job is None:
        return None
    lease: dict[str, Any] = {
        "lease_epoch": Job.lease_epoch + 1,
        "lease_owner": owner,
        "lease_expires_at": func.clock_timestamp() + timedelta(seconds=lease_seconds),
        "started_at": func.coalesce(Job.started_at, func.clock_timestamp()),
    }
    if queue is Queue.PREPARE:
        session.execute(update(Job).where(Job.id == job.id).values(**lease, phase=Phase.TOKENIZING))
    else:
        attempt = job.attempt + 1
        message = None if attempt == 1 else f"{MOVES[Reason.CLAIMED].message} (attempt {attempt})"
        # Readers show no remaining time until the new attempt has measured its pace.
        reset_pace = Job.progress.op("||")(func.jsonb_build_object("seconds_per_step", None))
        values = lease | {"attempt": attempt, "phase": Phase.STAGING, "progress": reset_pace}
        transition(session, job.id, Reason.CLAIMED, epoch=None, message=message, values=values)
    session.refresh(job)
    return job


def disown(session: Session, owner: str) -> None:
    """Release jobs that `owner` has claimed without knowing it, because the reply to its claim was lost."""
    for job in session.scalars(select(Job).where(Job.lease_owner == owner).with_for_update()).all():
        transition(session, job.id, Reason.PREEMPTED, epoch=job.lease_epoch)


def claimable(queue: Queue) -> list[ColumnElement[bool]]:
    """Conditions for a job that a worker of this queue may claim, except for its back-off (`not_before`).

    A job that is to be paused is still validated, and pauses afterwards.
    """
    wanted = Job.desired_state == Desired.RUN if queue is Queue.TRAIN else Job.desired_state != Desired.CANCEL
    return [Job.state == WAITING[queue], Job.lease_owner.is_(None), wanted]


def expired() -> ColumnElement[bool]:
    """The condition that the lease has expired by Postgres's clock."""
    return Job.lease_owner.is_not(None) & (Job.lease_expires_at < func.clock_timestamp())


class Expired(NamedTuple):
    """An expired lease."""

    job_id: str
    epoch: int
    owner: str


def lock_expired(session: Session, *, limit: int) -> list[Expired]:
    """Lock jobs whose lease has expired. Rows that another transaction has locked are left for the next round."""
    rows = select(Job.id, Job.lease_epoch, Job.lease_owner).where(expired()).limit(limit)
    return [
        Expired(job_id, epoch, str(owner))
        for job_id, epoch, owner in session.execute(rows.with_for_update(skip_locked=True))
    ]


def to_ring_for(session: Session, queue: Queue, *, backoff: float, limit: int) -> Sequence[str]:
    """Return the ids of claimable jobs to ring for: those never rung for, and those whose last ring is too long ago.

    Too long is `backoff` seconds, doubled with each ring, at most 32 times as long. The jobs are marked as rung before
    anyone rings: a worker that wakes up must not find their rows locked.
    """
    waited = func.clock_timestamp() - Job.rung_at
    doublings = func.least(func.greatest(Job.ring_count - 1, 0), 5)
    allowed = func.power(2, doublings) * text(f"interval '{backoff:f}s'")
    due = (
        select(Job.id)
        .where(
            *claimable(queue),
            Job.not_before <= func.clock_timestamp(),
            Job.rung_at.is_(None) | (waited > allowed),
        )
        .order_by(Job.priority.desc(), Job.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rung = update(Job).where(Job.id.in_(due.scalar_subquery()))
    marked = rung.values(rung_at=func.clock_timestamp(), ring_count=Job.ring_count + 1).returning(Job.id)
    return session.scalars(marked.execution_options(synchronize_session=False)).all()


def not_rung(session: Session, job_ids: Sequence[str]) -> None:
    """Mark jobs as not rung for, because the broker did not take the ring."""
    waiting = update(Job).where(Job.id.in_(job_ids), Job.lease_owner.is_(None))
    session.execute(waiting.values(rung_at=None))
