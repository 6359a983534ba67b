"""Add the epoch of each event, a count of memory failures, and triggers (append-only events, rising epochs).

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job_events", sa.Column("lease_epoch", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("jobs", sa.Column("memory_halvings", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.execute("""
        CREATE FUNCTION job_events_are_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'event % of job % is written; events are append-only', OLD.seq, OLD.job_id
                USING ERRCODE = 'integrity_constraint_violation';
        END $$
    """)
    op.execute("""
        CREATE TRIGGER job_events_are_append_only BEFORE UPDATE OR DELETE ON job_events FOR EACH ROW
        EXECUTE FUNCTION job_events_are_append_only()
    """)
    op.execute("""
        CREATE FUNCTION jobs_epochs_only_rise() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'job % is at epoch %; an epoch never goes back (asked: %)', OLD.id, OLD.lease_epoch,
                NEW.lease_epoch USING ERRCODE = 'integrity_constraint_violation';
        END $$
    """)
    op.execute("""
        CREATE TRIGGER jobs_epochs_only_rise BEFORE UPDATE OF lease_epoch ON jobs FOR EACH ROW
        WHEN (NEW.lease_epoch < OLD.lease_epoch) EXECUTE FUNCTION jobs_epochs_only_rise()
    """)


def downgrade() -> None:
    op.execute("DROP TRIGGER jobs_epochs_only_rise ON jobs")
    op.execute("DROP FUNCTION jobs_epochs_only_rise()")
    op.execute("DROP TRIGGER job_events_are_append_only ON job_events")
    op.execute("DROP FUNCTION job_events_are_append_only()")
    op.drop_column("jobs", "memory_halvings")
    op.drop_column("job_events", "lease_epoch")
