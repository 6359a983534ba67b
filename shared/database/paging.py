"""Keyset pages: `after` names the last row seen, and one row more than asked for shows whether there are more.

Ids sort by creation, so a page is a range of the primary key whatever the size of the table.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, NamedTuple, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

Order = Literal["asc", "desc"]
Row = TypeVar("Row")


class Rows(NamedTuple, Generic[Row]):
    """One page of rows, and whether more follow it."""

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
    """Up to `limit` rows of `query` beyond `after` in the order of `column`, newest first by default."""
    if after is not None:
        query = query.where(column < after if order == "desc" else column > after)
    rows = session.scalars(query.order_by(column.desc() if order == "desc" else column.asc()).limit(limit + 1)).all()
    return Rows(list(rows[:limit]), has_more=len(rows) > limit)
