"""Alembic's entry point: run the migrations on the database of the settings, in one transaction with a lock timeout.

An advisory lock lets only one process migrate at a time. A migration may take long. But if it cannot get a table's lock
within 5 s it fails, because every other statement on that table would queue behind it. With `--sql` the statements are
printed instead, and no database is needed.
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
