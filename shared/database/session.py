"""The engine, the session scope, and what runs after a commit.

The only `commit()` of the code base is in `session_scope`. Effects that must not happen unless the transaction did
(ringing a queue) are handed to `after_commit`. No network or GPU work inside a scope.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.exc import DataError as DataError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import Session as Session

from shared.errors import Unavailable
from shared.settings import get_settings
from shared.telemetry import log


def engine(url: str | None = None) -> Engine:
    """The process's engine for a libpq URL; `None` means the one in the settings."""
    return _engine(url or get_settings().database_url.get_secret_value())


@lru_cache(maxsize=4)
def _engine(url: str) -> Engine:
    """Timeouts are short and every statement is bounded, so that a server that is gone is an error and not a hang.

    One whose machine answers while its process stands still is waited for: libpq has no timeout for that.
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
    """One transaction: commits at the end, rolls back on any exception, then runs what `after_commit` was given.

    A server that is down, or too slow for the timeouts above, is `Unavailable`: the caller may try again.
    """
    with Session(bind or engine(), expire_on_commit=False) as session:
        try:
            yield session
            session.commit()
        except (DBAPIError, TimeoutError) as error:
            if isinstance(error, DBAPIError) and not _passing(error):
                raise
            reason = (str(getattr(error, "orig", error)) or type(error).__name__).splitlines()[0]
            raise Unavailable(f"Postgres: {reason}; try again, or run `milliner doctor`") from error
    for effect in session.info.pop(_EFFECTS, []):
        try:
            effect()
        except Unavailable as error:
            log.warning("effect.failed", error=error.message)


def after_commit(session: Session, effect: Callable[[], object]) -> None:
    """Run `effect` once this session's transaction is durable; never, if it rolls back.

    What is durable stays so: an effect that finds its server down is logged, and the caller still succeeds.
    """
    session.info.setdefault(_EFFECTS, []).append(effect)


def ping(session: Session) -> None:
    """Ask the server for an answer. Raises Unavailable, on leaving the scope, if there is none."""
    session.execute(select(1))


def try_lock(session: Session, name: str) -> bool:
    """Take the advisory lock of that name until the transaction ends; False if somebody else holds it."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0)))))


def wait_for_lock(session: Session, name: str) -> None:
    """Take the advisory lock of that name until the transaction ends, once whoever holds it is done."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


_EFFECTS = "after_commit"


def _passing(error: DBAPIError) -> bool:
    """The server's trouble rather than ours: connections, resources, shutdowns, read-only standbys, time-outs.

    By class of SQLSTATE: https://www.postgresql.org/docs/18/errcodes-appendix.html
    """
    state = getattr(error.orig, "sqlstate", None) or ""
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError) or state[:2] == "25"
