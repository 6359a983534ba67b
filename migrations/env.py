"""How Alembic reaches the database: the settings' URL, one transaction, and a lock timeout.

One migrates at a time. A migration may take long, but if it cannot get a table's lock within seconds it gives up rather
than queue every other statement behind itself.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from shared.database.session import engine
from shared.database.tables import Table

with engine().connect() as connection:
    context.configure(connection=connection, target_metadata=Table.metadata, compare_server_default=False)
    with context.begin_transaction():
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('milliner.migrations', 0))"))
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        context.run_migrations()
