"""Dependencies of the endpoints: the caller's tenant, a database session, the doorbell that wakes workers.

`SessionDep` commits before the response is sent (`scope="function"`), so a failed commit is an error and never a 200.
The tenant is looked up in its own short transaction, so an upload holds no connection while its body is received.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from shared.broker.doorbell import Bell
from shared.database.session import session_scope
from shared.database.tables import Tenant
from shared.database.tenants import authenticate

_bearer = HTTPBearer(auto_error=False, description="An API key; create one with `milliner keys add TENANT`.")


def get_session() -> Iterator[Session]:
    """Yield a session whose transaction lasts as long as the endpoint function."""
    with session_scope() as session:
        yield session


def get_tenant(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Tenant:
    """Return the tenant of the API key. Raises AuthenticationFailed."""
    with session_scope() as session:
        return authenticate(session, credentials.credentials if credentials else None)


def get_bell(request: Request) -> Bell:
    """Return the doorbell of this process."""
    bell: Bell = request.app.state.bell
    return bell


SessionDep = Annotated[Session, Depends(get_session, scope="function")]
TenantDep = Annotated[Tenant, Depends(get_tenant)]
BellDep = Annotated[Bell, Depends(get_bell)]
