"""The history of the tables: Alembic, Postgres only."""
