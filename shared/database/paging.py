"""Keyset pagination: `after` is the id of the last row of the page before.

A query reads one row more than the page has, to know whether there are more. Ids sort by creation time
(shared/ids.py), so a page is a range of the primary key, and fast however large the table is.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, NamedTuple, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

Order = Literal["asc", "desc"]
Row = TypeVar("Row")


class Rows(NamedTuple, Generic[Row]):
    """One page of rows, and whether there are more."""

    rows: list[Row]
    has_more: bool


def keyset_rows(
    session: Session,
    query: Select[Row],
    column: InstrumentedAttribute[Any],
    *,
    after: Any | None,
    limit: int,
    order: Order = "desc",
) -> Rows[Row]:
    """Return up to `limit` rows of `query` that follow `after` in the order of `column`, descending by default."""
    if after is not None:
        query = query.where(column < after if order == "desc" else column > after)
    rows = session.scalars(query.order_by(column.desc() if order == "desc" else column.asc()).limit(limit + 1)).all()
    return Rows(list(rows[:limit]), has_more=len(rows) > limit)
