"""The migrations create the tables of shared/database/tables.py, and the downgrade removes everything."""

from __future__ import annotations

import psycopg

from tests.checks.migrating import alembic


def test_migrations_and_models_agree(postgres: str) -> None:
    alembic(postgres, "upgrade", "head")
    assert "No new upgrade operations" in alembic(postgres, "check")
    alembic(postgres, "downgrade", "base")
    with psycopg.connect(postgres) as connection:
        left = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i', 'S')"
            " UNION SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        ).fetchall()
    assert {name for (name,) in left} <= {"alembic_version", "alembic_version_pkc"}
    alembic(postgres, "upgrade", "head")
