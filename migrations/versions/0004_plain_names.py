"""Rename two columns of jobs to what they mean: `rung_at` (was `published_at`), `fallback_level` (`memory_halvings`).

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.alter_column("jobs", "published_at", new_column_name="rung_at")
    op.alter_column("jobs", "memory_halvings", new_column_name="fallback_level")


def downgrade() -> None:
    op.alter_column("jobs", "fallback_level", new_column_name="memory_halvings")
    op.alter_column("jobs", "rung_at", new_column_name="published_at")
