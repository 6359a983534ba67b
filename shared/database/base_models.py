"""The catalog of base models: look-ups and additions.

Owns: the rows of base models. Must not touch S3.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.database.session import wait_for_lock
from shared.database.tables import BaseModelRow
from shared.errors import NotFound


def find_base_model(session: Session, name: str) -> BaseModelRow | None:
    """Return the base model of that name, or None."""
    return session.get(BaseModelRow, name)


def get_base_model(session: Session, name: str) -> BaseModelRow:
    """Return the base model of that name. Raises NotFound, which lists the names that exist."""
    base = find_base_model(session, name)
    if base is None:
        names = ", ".join(base.name for base in list_base_models(session)) or "none (the catalog is empty)"
        raise NotFound(f"base model {name!r} not found; allowed: {names}", param="model", code="model_not_found")
    return base


def list_base_models(session: Session) -> Sequence[BaseModelRow]:
    """List all base models, oldest first."""
    return session.scalars(select(BaseModelRow).order_by(BaseModelRow.created_at, BaseModelRow.name)).all()


def add_base_model(session: Session, base: BaseModelRow) -> None:
    """Add a base model to the catalog, unless it already has one of that name."""
    wait_for_lock(session, f"milliner.models.{base.name}")
    if find_base_model(session, base.name) is None:
        session.add(base)
        session.flush()
