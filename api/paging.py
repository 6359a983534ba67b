"""Convert a page of database rows to a list object of the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from shared.database.paging import Rows
from shared.schemas.requests import Wire
from shared.schemas.responses import Page

Row = TypeVar("Row")
Item = TypeVar("Item", bound=Wire)


def page(found: Rows[Row], present: Callable[[Row], Item]) -> Page[Item]:
    """Apply `present` to each row; `first_id` and `last_id` are the ids of the first and the last item."""
    items = [present(row) for row in found.rows]
    ids = [str(getattr(item, "id", "")) for item in items]
    return Page(data=items, has_more=found.has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
