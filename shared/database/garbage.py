"""Decide which objects in the bucket are kept; the garbage collector deletes the rest.

Each function reads rows in an order that makes its answer final: no row that is committed later can need an object that
the function did not keep. Must not touch the bucket.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.database.files import live_file
from shared.database.tables import Adapter, Checkpoint, File, Job, Tenant
from shared.schemas.requests import TERMINAL, Phase


class Pile(NamedTuple):
    """Objects that are kept or deleted together: those under one prefix, or a single file under its key.

    `owner` is the id of a job or a file, `epoch` the lease epoch in a checkpoint's key, `age` that of the newest object
    in seconds.
    """

    prefix: str
    tenant: str
    owner: str
    epoch: int
    keys: list[str]
    bytes: int
    age: float


def known_tenants(session: Session, tenants: Collection[str]) -> set[str]:
    """Return those of the tenants that this database has."""
    return set(session.scalars(select(Tenant.id).where(Tenant.id.in_(tenants))))


def kept_checkpoints(session: Session, piles: Sequence[Pile], orphan_seconds: float) -> set[str]:
    """Return the prefixes of checkpoints to keep.

    Kept are live checkpoints, those of a lease that is still active, and those of an unknown job until they are
    `orphan_seconds` old. Leases are read before checkpoints, so that a checkpoint that a worker committed before it
    released the job is seen. An epoch higher than its job's means that the database was restored from a backup: the job
    may reach that epoch again, so the checkpoint is kept.
    """
    owners = {pile.owner for pile in piles}
    leases = {
        job_id: (epoch, owner is not None)
        for job_id, epoch, owner in session.execute(
            select(Job.id, Job.lease_epoch, Job.lease_owner).where(Job.id.in_(owners))
        )
    }
    live = select(Checkpoint.prefix).where(Checkpoint.job_id.in_(owners), Checkpoint.deleted_at.is_(None))
    kept = set(session.scalars(live))
    for pile in piles:
        if pile.owner not in leases:
            unsure = pile.age < orphan_seconds
        else:
            epoch, leased = leases[pile.owner]
            unsure = pile.epoch > epoch or (pile.epoch == epoch and leased)
        if unsure:
            kept.add(pile.prefix)
    return kept


def kept_adapters(session: Session, piles: Sequence[Pile], orphan_seconds: float) -> set[str]:
    """Return the prefixes of adapters to keep.

    Kept are live adapters, those of jobs that have not ended, and those of an unknown job until they are
    `orphan_seconds` old. States are read before adapters, so that the adapter of a job that has ended is seen.
    """
    owners = {pile.owner for pile in piles}
    states = dict(session.execute(select(Job.id, Job.state).where(Job.id.in_(owners))).all())
    live = select(Adapter.prefix).where(Adapter.job_id.in_(owners), Adapter.deleted_at.is_(None))
    kept = set(session.scalars(live))
    for pile in piles:
        unsure = states[pile.owner] not in TERMINAL if pile.owner in states else pile.age < orphan_seconds
        if unsure:
            kept.add(pile.prefix)
    return kept


def kept_files(session: Session, piles: Sequence[Pile], orphan_seconds: float) -> set[str]:
    """Return the keys of files to keep, and mark the others' rows as deleted.

    Kept are live files, those that an unfinished job needs, and those without a row until they are `orphan_seconds` old
    and no job of the tenant publishes. Publishing jobs are read first, so that the row of a result file is seen if its
    job has ended.

    `jobs.submit` locks a file's row from the moment it finds the file live. So a locked row is kept for this round. The
    rows that this function locks are locked before it looks for jobs, so no job that it does not see can need them.
    """
    publishing = set(
        session.scalars(select(Job.tenant_id).where(Job.lease_owner.is_not(None), Job.phase == Phase.PUBLISHING))
    )
    named = File.key.in_([pile.prefix for pile in piles]) & File.id.in_([pile.owner for pile in piles])
    dead = set(session.scalars(select(File.id).where(named, ~live_file()).with_for_update(skip_locked=True)))
    rows = dict(session.execute(select(File.id, File.key).where(named)).all())
    needing = Job.tenant_id.in_({pile.tenant for pile in piles if pile.owner in dead}) & Job.state.not_in(TERMINAL)
    needed = set[str | None]()
    for use in (Job.training_file, Job.validation_file):
        needed |= set(session.scalars(select(use).where(needing, use.in_(dead))))
    dead -= needed
    deletion = (
        update(File).where(File.id.in_(dead), File.deleted_at.is_(None)).values(deleted_at=func.clock_timestamp())
    )
    session.execute(deletion.execution_options(synchronize_session=False))
    known, kept = set(rows.values()), {key for file_id, key in rows.items() if file_id not in dead}
    for pile in piles:
        if pile.prefix not in known and (pile.age < orphan_seconds or pile.tenant in publishing):
            kept.add(pile.prefix)
    return kept
