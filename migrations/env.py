"""How Alembic reaches the database: the settings' URL, one transaction, and a lock timeout.

One migrates at a time. A migration may take long, but if it cannot get a table's lock within seconds it gives up rather
than queue every other statement behind itself. With `--sql` the same statements are printed, and no database is needed.
"""

from __future__ import annotations

from alembic import context

from shared.database.session import engine
from shared.database.tables import Table


def run() -> None:
    with context.begin_transaction():
        context.execute("SET LOCAL statement_timeout = 0")
        context.execute("SET LOCAL lock_timeout = 0")
        context.execute("SELECT pg_advisory_xact_lock(hashtextextended('milliner.migrations', 0))")
        context.execute("SET LOCAL lock_timeout = '5s'")
        context.run_migrations()


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", target_metadata=Table.metadata)
    run()
else:
    with engine().connect() as connection:
        context.configure(connection=connection, target_metadata=Table.metadata, compare_server_default=False)
        run()
