"""Which objects of the bucket a row keeps.

Each function reads rows in an order that makes its verdict final: nothing can overturn it between reading and deleting.
Must not touch the bucket."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.database.files import live_file
from shared.database.tables import Adapter, Checkpoint, File, Job, Tenant
from shared.schemas.requests import TERMINAL, Phase


class Pile(NamedTuple):
    """The objects that stand and fall together: under one prefix, or a single file under its key."""

    prefix: str
    tenant: str
    owner: str
    epoch: int
    keys: list[str]
    bytes: int
    age: float  # of the newest


def known_tenants(session: Session, tenants: Collection[str]) -> set[str]:
    """Those of the tenants that are this database's."""
    return set(session.scalars(select(Tenant.id).where(Tenant.id.in_(tenants))))


def kept_checkpoints(session: Session, piles: Sequence[Pile], orphan_seconds: float) -> set[str]:
    """Leases are read before checkpoints: what a holder has committed before it let go is then seen.

    An epoch that its job has yet to reach tells of a database that was set back; it may be reached again.
    """
    owners = {pile.owner for pile in piles}
    leases = {
        job_id: (epoch, holder is not None)
        for job_id, epoch, holder in session.execute(
            select(Job.id, Job.lease_epoch, Job.lease_owner).where(Job.id.in_(owners))
        )
    }
    live = select(Checkpoint.prefix).where(Checkpoint.job_id.in_(owners), Checkpoint.deleted_at.is_(None))
    kept = set(session.scalars(live))
    for pile in piles:
        if pile.owner not in leases:
            unsure = pile.age < orphan_seconds
        else:
            epoch, held = leases[pile.owner]
            unsure = pile.epoch > epoch or (pile.epoch == epoch and held)
        if unsure:
            kept.add(pile.prefix)
    return kept


def kept_adapters(session: Session, piles: Sequence[Pile], orphan_seconds: float) -> set[str]:
    """States are read before adapters: the row of a job that has ended is then seen, if it has one."""
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
    """Who publishes is read first: the row of a result file is then seen, if its job has ended.

    A submit holds a lock on its file from the moment it saw that it is live: what is locked is kept for this round, and
    what we lock in the statement before we look for jobs can be wanted by none that we do not see.
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
    gone = update(File).where(File.id.in_(dead), File.deleted_at.is_(None)).values(deleted_at=func.clock_timestamp())
    session.execute(gone.execution_options(synchronize_session=False))
    known, kept = set(rows.values()), {key for file_id, key in rows.items() if file_id not in dead}
    for pile in piles:
        if pile.prefix not in known and (pile.age < orphan_seconds or pile.tenant in publishing):
            kept.add(pile.prefix)
    return kept
