"""Keyset pages: `after` names the last row seen, `has_more` is known from one row more than was asked for.

Ids sort by creation, so a page is a range of the primary key whatever the size of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.schemas.requests import Wire
from shared.schemas.responses import Page

Order = Literal["asc", "desc"]
Row = TypeVar("Row")
Item = TypeVar("Item", bound=Wire)


def keyset_page(
    session: Session,
    query: Select[Row],
    column: InstrumentedAttribute[Any],
    present: Callable[[Row], Item],
    *,
    after: Any | None,
    limit: int,
    order: Order = "desc",
) -> Page[Item]:
    """Up to `limit` rows of `query` beyond `after` in the order of `column`, newest first unless asked otherwise."""
    if after is not None:
        query = query.where(column < after if order == "desc" else column > after)
    rows = session.scalars(query.order_by(column.desc() if order == "desc" else column.asc()).limit(limit + 1)).all()
    items = [present(row) for row in rows[:limit]]
    ids = [str(getattr(item, "id", "")) for item in items]
    return Page(
        data=items, has_more=len(rows) > limit, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None
    )
