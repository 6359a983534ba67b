"""A tenant and a dataset for tests that call the database code directly, in a database that no worker uses."""

from __future__ import annotations

import secrets

import pytest
from sqlalchemy import Engine

from shared.database.session import session_scope
from shared.database.tables import BaseModelRow, File, Tenant
from shared.database.tenants import ensure_tenant


@pytest.fixture
def tenant(database: Engine) -> Tenant:
    with session_scope(database) as session:
        return ensure_tenant(session, f"t-{secrets.token_hex(4)}")


@pytest.fixture
def dataset(database: Engine, tenant: Tenant) -> str:
    """The id of a file row. A base model `tiny` is added too. There are no bytes: no test reads them."""
    file_id = f"file-{secrets.token_hex(15)}"
    with session_scope(database) as session:
        session.add(
            File(
                id=file_id,
                tenant_id=tenant.id,
                filename="a.jsonl",
                purpose="fine-tune",
                status="processed",
                bytes=1,
                sha256="0" * 64,
                key=f"files/{tenant.id}/{file_id}",
            )
        )
        if session.get(BaseModelRow, "tiny") is None:
            session.add(
                BaseModelRow(
                    name="tiny",
                    public_id="org/tiny",
                    revision="1",
                    digest="d",
                    prefix="models/d/",
                    files=[],
                    config={},
                    parameters=1,
                    bytes=1,
                )
            )
    return file_id
