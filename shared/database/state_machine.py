"""The states of a job, and every move between them.

Owns every change of state: `transition` is the only writer of `state`. It makes one guarded UPDATE and writes one event
row in the same transaction. Postgres's clock only."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import case, func, update
from sqlalchemy.orm import Session

from shared.broker.queues import Queue
from shared.database.tables import Job, JobEvent
from shared.schemas.requests import TERMINAL, State

WAITING = {Queue.PREPARE: State.VALIDATING, Queue.TRAIN: State.QUEUED}


LIVE = frozenset(State) - TERMINAL


LEASABLE = frozenset({State.VALIDATING, State.RUNNING})


class Reason(StrEnum):
    """Why a job is in its state. Stored; the state follows from it (see MOVES)."""

    PLANNED = "planned"
    CLAIMED = "claimed"
    COMPLETED = "completed"
    DRY_RUN = "dry_run"
    INVALID = "invalid"
    POISON = "poison"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    RESUMED = "resumed"
    PREEMPTED = "preempted"
    CRASHED = "crashed"
    OUT_OF_MEMORY = "out_of_memory"
    LEASE_EXPIRED = "lease_expired"


class Move(NamedTuple):
    """From which states, to which; None is back to wait: `running → queued`, `validating_files` stays."""

    source: frozenset[State]
    target: State | None
    level: str
    message: str


MOVES = {
    Reason.PLANNED: Move(frozenset({State.VALIDATING}), State.QUEUED, "info", "Files validated, job queued"),
    Reason.DRY_RUN: Move(frozenset({State.VALIDATING}), State.CANCELLED, "info", "Dry run: planned, not trained"),
    Reason.CLAIMED: Move(frozenset({State.QUEUED}), State.RUNNING, "info", "Fine-tuning job started"),
    Reason.COMPLETED: Move(frozenset({State.RUNNING}), State.SUCCEEDED, "info", "The job has successfully completed"),
    Reason.INVALID: Move(LEASABLE, State.FAILED, "error", "The job failed"),
    Reason.POISON: Move(LEASABLE, State.FAILED, "error", "The job failed: it crashed too often"),
    Reason.CANCELLED: Move(LIVE, State.CANCELLED, "warn", "The job was cancelled"),
    Reason.PAUSED: Move(LIVE, State.PAUSED, "info", "The job was paused"),
    Reason.RESUMED: Move(frozenset({State.PAUSED}), State.QUEUED, "info", "The job was resumed"),
    Reason.PREEMPTED: Move(LEASABLE, None, "info", "The attempt was given back; the job waits for the next"),
    Reason.CRASHED: Move(LEASABLE, None, "warn", "The attempt crashed; the job will be tried again"),
    Reason.OUT_OF_MEMORY: Move(LEASABLE, None, "warn", "The attempt was killed for its memory; the next takes less"),
    Reason.LEASE_EXPIRED: Move(LEASABLE, None, "warn", "The worker fell silent; the job will be tried again"),
}


def transition(
    session: Session,
    job_id: str,
    reason: Reason,
    *,
    epoch: int | None,
    message: str | None = None,
    values: dict[str, Any] | None = None,
) -> bool:
    """Move a job as MOVES says and write the event; False if it was not in a state, or at an epoch, that allows it.

    Every move but a claim gives up the lease. `epoch=None` is for moves that no worker makes; `values` are columns to
    set beside the state.
    """
    move, values = MOVES[reason], dict(values or {})
    target: Any = move.target
    if target is None:
        target = case((Job.state == State.RUNNING, State.QUEUED), else_=Job.state)
    if move.target in TERMINAL:
        values["finished_at"] = func.clock_timestamp()
    if reason is not Reason.CLAIMED:
        values |= {"lease_owner": None, "lease_expires_at": None, "phase": None, "rung_at": None, "ring_count": 0}
    guard = [Job.id == job_id, Job.state.in_(move.source)]
    if epoch is not None:
        guard += [Job.lease_epoch == epoch, Job.lease_owner.is_not(None)]
    moved = update(Job).where(*guard).values(state=target, reason=reason, event_seq=Job.event_seq + 1, **values)
    returning = moved.returning(Job.event_seq, Job.lease_epoch).execution_options(synchronize_session=False)
    now = session.execute(returning).one_or_none()
    if now is None:
        return False
    session.add(
        JobEvent(
            job_id=job_id,
            seq=now.event_seq,
            lease_epoch=now.lease_epoch,
            level=move.level,
            type="message",
            message=message or move.message,
        )
    )
    session.flush()
    return True
