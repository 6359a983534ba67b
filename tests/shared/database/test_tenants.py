"""API keys: only a complete, live key authenticates a tenant, and the database stores no secret."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from shared.database.session import session_scope
from shared.database.tables import ApiKey, Tenant
from shared.database.tenants import authenticate, create_key, ensure_tenant, list_keys, revoke_key
from shared.errors import AuthenticationFailed, InvalidRequest, NotFound


def test_a_key_authenticates_its_tenant_until_revoked(database: Engine, tenant: Tenant) -> None:
    with session_scope(database) as session:
        key = create_key(session, tenant, name="laptop")
    key_id = key.split("_")[1]
    with session_scope(database) as session:
        assert authenticate(session, key).id == tenant.id
        assert (key_id, "laptop", tenant.name) in [(k.id, k.name, t.name) for k, t in list_keys(session)]
        revoke_key(session, key_id)
    with session_scope(database) as session, pytest.raises(AuthenticationFailed):
        authenticate(session, key)
    with session_scope(database) as session, pytest.raises(NotFound, match="no live key"):
        revoke_key(session, key_id)


def test_only_a_hash_is_stored(database: Engine, tenant: Tenant) -> None:
    with session_scope(database) as session:
        key = create_key(session, tenant, name="x")
    secret = key.split("_", 2)[2]
    with session_scope(database) as session:
        row = session.get_one(ApiKey, key.split("_")[1])
        stored = " ".join(str(getattr(row, column.key)) for column in ApiKey.__table__.columns)
    assert secret not in stored
    assert len(row.sha256) == 32


def test_almost_correct_keys_are_refused_without_saying_why(database: Engine, tenant: Tenant) -> None:
    with session_scope(database) as session:
        key = create_key(session, tenant, name="x")
    last = "A" if key[-1] != "A" else "B"
    for wrong in (None, "", "mln_", key[:-1], key + "x", key[:-1] + last, key.upper(), f" {key}", "sk-" + key):
        with session_scope(database) as session, pytest.raises(AuthenticationFailed) as refused:
            authenticate(session, wrong)
        assert key[8:] not in refused.value.message


@pytest.mark.parametrize("name", ["", "A", "a b", "a:b", "ä", "-a", "a" * 41])
def test_a_tenant_name_must_fit_a_model_id(database: Engine, name: str) -> None:
    with session_scope(database) as session, pytest.raises(InvalidRequest, match="allowed are"):
        ensure_tenant(session, name)
