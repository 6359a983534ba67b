"""Tenants and their API keys.

Owns: the format of keys and how they are checked. A key is `mln_<16 hex digits: id>_<43 characters: secret>`. The id
finds the row; the secret has 256 bits. Only the SHA-256 of the whole key is stored (a fast hash is enough for a secret
that cannot be guessed), and it is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.database.tables import ApiKey, Tenant
from shared.errors import AuthenticationFailed, InvalidRequest, NotFound
from shared.ids import new_id

_KEY = re.compile(r"mln_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def ensure_tenant(session: Session, name: str) -> Tenant:
    """Return the tenant of that name; create it if it does not exist. Raises InvalidRequest if the name is not allowed.

    Names appear in model ids (`ft:base:name:…`).
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"tenant name {name!r} is not allowed; allowed are a-z, 0-9 and '-', 1 to 40 characters", param="name"
        )
    tenant = session.scalar(select(Tenant).where(Tenant.name == name))
    if tenant is None:
        tenant = Tenant(id=new_id("org-"), name=name)
        session.add(tenant)
        session.flush()
    return tenant


def create_key(session: Session, tenant: Tenant, *, name: str) -> str:
    """Create a key for the tenant and return it. It cannot be read again later."""
    key_id = secrets.token_hex(8)
    key = f"mln_{key_id}_{secrets.token_urlsafe(32)}"
    session.add(ApiKey(id=key_id, tenant_id=tenant.id, name=name, sha256=_digest(key)))
    return key


def list_keys(session: Session) -> list[tuple[ApiKey, Tenant]]:
    """List all keys with their tenants, oldest first."""
    rows = session.execute(select(ApiKey, Tenant).join(Tenant).order_by(ApiKey.created_at)).all()
    return [(key, tenant) for key, tenant in rows]


def revoke_key(session: Session, key_id: str) -> None:
    """Revoke a key. Raises NotFound if there is none, or if it is revoked already."""
    revoked = session.execute(
        update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=func.clock_timestamp())
    )
    if revoked.rowcount == 0:  # type: ignore[attr-defined]  # an UPDATE yields a CursorResult
        raise NotFound(f"no live key with id {key_id!r}; list keys with `milliner keys ls`")


def authenticate(session: Session, key: str | None) -> Tenant:
    """Return the tenant of a Bearer key. Raises AuthenticationFailed with the same message for every invalid key."""
    match = _KEY.fullmatch(key or "")
    row = session.get(ApiKey, match.group(1)) if match else None
    if key is None or row is None or row.revoked_at is not None or not hmac.compare_digest(row.sha256, _digest(key)):
        shown = "no API key" if not key else f"an API key beginning with {key[:8]!r} that this server does not accept"
        raise AuthenticationFailed(
            f"found {shown}; send `Authorization: Bearer mln_…` (`milliner keys add` creates one)"
        )
    return session.get_one(Tenant, row.tenant_id)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
