"""Database migrations (Alembic, Postgres only)."""
