"""What an endpoint may ask for: the caller's tenant, a database session, the bell.

`SessionDep` commits before the response is sent (`scope="function"`): a failing commit is an error, never a 200. The
tenant is looked up in a short transaction of its own, so that an upload holds no connection while bytes flow.
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

_bearer = HTTPBearer(auto_error=False, description="An API key: `milliner keys add TENANT` makes one.")


def get_session() -> Iterator[Session]:
    """One transaction for the length of the endpoint function."""
    with session_scope() as session:
        yield session


def get_tenant(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Tenant:
    """Who is calling; `AuthenticationFailed` otherwise."""
    with session_scope() as session:
        return authenticate(session, credentials.credentials if credentials else None)


def get_bell(request: Request) -> Bell:
    """The process's doorbell."""
    bell: Bell = request.app.state.bell
    return bell


SessionDep = Annotated[Session, Depends(get_session, scope="function")]
TenantDep = Annotated[Tenant, Depends(get_tenant)]
BellDep = Annotated[Bell, Depends(get_bell)]
