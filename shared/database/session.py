"""The database engine, transactions, and effects that run after a commit.

Owns: the only `commit()` of the code base, in `session_scope`. An effect that must happen only if the transaction is
committed (ringing a queue) is passed to `after_commit`. A scope must not contain network or GPU work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.exc import DataError as DataError  # noqa: PLC0414 (re-exported: SQL stands in this package alone)
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import Session as Session  # noqa: PLC0414 (re-exported for annotations)

from shared.errors import Unavailable
from shared.settings import get_settings
from shared.telemetry import log


def engine(url: str | None = None) -> Engine:
    """Return this process's engine for a libpq URL; None means the URL in the settings."""
    return _engine(url or get_settings().database_url.get_secret_value())


@lru_cache(maxsize=4)
def _engine(url: str) -> Engine:
    """Create an engine with short timeouts for everything, so that a server that is down is an error and not a hang.

    One case still hangs: the server's machine answers, but its process is stopped. libpq has no timeout for that.
    """
    return create_engine(
        re.sub("^postgres(ql)?://", "postgresql+psycopg://", url),
        pool_size=8,
        max_overflow=24,
        pool_timeout=5,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 3,
            "options": "-c statement_timeout=15000 -c lock_timeout=5000 -c idle_in_transaction_session_timeout=10000",
            "tcp_user_timeout": 10_000,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
        },
    )


@contextmanager
def session_scope(bind: Engine | None = None) -> Iterator[Session]:
    """Run one transaction: commit at the end, or roll back on any exception.

    After a commit the effects given to `after_commit` run. Raises Unavailable if the server is down or too slow for the
    engine's timeouts: the caller may try again.
    """
    with Session(bind or engine(), expire_on_commit=False) as session:
        try:
            yield session
            session.commit()
        except (DBAPIError, TimeoutError) as error:
            if isinstance(error, DBAPIError) and not _is_transient(error):
                raise
            reason = (str(getattr(error, "orig", error)) or type(error).__name__).splitlines()[0]
            raise Unavailable(f"Postgres: {reason}; try again, or run `milliner doctor`") from error
    for effect in session.info.pop(_EFFECTS, []):
        try:
            effect()
        except Unavailable as error:
            log.warning("after_commit.failed", error=error.message)


def after_commit(session: Session, effect: Callable[[], object]) -> None:
    """Run `effect` after this session's transaction has committed; never if it rolls back.

    The commit stands whatever the effect does: if the effect raises Unavailable, that is logged and the caller
    succeeds.
    """
    session.info.setdefault(_EFFECTS, []).append(effect)


def ping(session: Session) -> None:
    """Make the server answer a trivial query. If it does not, `session_scope` raises Unavailable."""
    session.execute(select(1))


def try_lock(session: Session, name: str) -> bool:
    """Take the advisory lock of that name until the transaction ends; False if another transaction has it."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0)))))


def wait_for_lock(session: Session, name: str) -> None:
    """Wait for the advisory lock of that name, and take it until the transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


_EFFECTS = "after_commit"


def _is_transient(error: DBAPIError) -> bool:
    """Whether the server is at fault, not our SQL: connections, resources, shutdowns, read-only standbys, timeouts.

    Decided by class of SQLSTATE: https://www.postgresql.org/docs/18/errcodes-appendix.html
    """
    state = getattr(error.orig, "sqlstate", None) or ""
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError) or state[:2] == "25"
