"""The states of a job, and every move between them.

Owns: every change of `Job.state`. `transition` is the only function that changes it: one UPDATE with a WHERE clause
that checks state and lease, and one event row, in the same transaction. Times come from Postgres's clock.
Must not decide which move to make: `jobs`, `claims` and `attempts` do.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import case, func, update
from sqlalchemy.orm import Session

from shared.broker.queues import Queue
from shared.database.tables import Job, JobEvent
from shared.schemas.requests import TERMINAL, State

#: The state of the jobs that wait in each queue.
WAITING = {Queue.PREPARE: State.VALIDATING, Queue.TRAIN: State.QUEUED}
#: The states that are not final.
LIVE = frozenset(State) - TERMINAL
#: The states in which a worker can have the lease.
LEASABLE = frozenset({State.VALIDATING, State.RUNNING})


class Reason(StrEnum):
    """Why a job made its last move. Stored in `Job.reason`; MOVES says which state follows."""

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
    """One move: the states it may start from, the state it leads to, and the event that it writes.

    A target of None means back to waiting: a `running` job becomes `queued`, any other job keeps its state.
    """

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
    Reason.PREEMPTED: Move(LEASABLE, None, "info", "The worker released the job; it will be tried again"),
    Reason.CRASHED: Move(LEASABLE, None, "warn", "The attempt crashed; the job will be tried again"),
    Reason.OUT_OF_MEMORY: Move(
        LEASABLE, None, "warn", "The attempt was killed because memory ran out; the next one uses less"
    ),
    Reason.LEASE_EXPIRED: Move(LEASABLE, None, "warn", "The lease expired; the job will be tried again"),
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
    """Make the move for `reason` and write its event. Returns False if the job's state or lease epoch forbids it.

    `epoch` is the lease epoch of the worker that asks. None means that the move needs no lease: claims, and what users
    do to a job that no worker has. Every move except a claim ends the lease. `message` replaces the move's own event
    message. `values` are further columns to set.
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


def mermaid() -> str:
    """Render MOVES as a Mermaid `stateDiagram-v2`: one arrow for each pair of states, labelled with its reasons."""
    arrows: dict[tuple[State, State], list[Reason]] = {}
    for reason, move in MOVES.items():
        for source in sorted(move.source, key=list(State).index):
            arrows.setdefault((source, _target(move, source)), []).append(reason)
    return "\n".join(
        [
            "stateDiagram-v2",
            f"    [*] --> {State.VALIDATING}",
            *(f"    {source} --> {target}: {', '.join(reasons)}" for (source, target), reasons in arrows.items()),
            *(f"    {state} --> [*]" for state in State if state in TERMINAL),
        ]
    )


def _target(move: Move, source: State) -> State:
    """The state that `move` leads to from `source`; the same rule as the CASE in `transition`."""
    if move.target is not None:
        return move.target
    return State.QUEUED if source is State.RUNNING else source
