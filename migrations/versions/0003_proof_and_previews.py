"""Add proofs, exports and signatures of adapters; previews; the start of a job; devices and peak memory.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

STARTS = ("start_name", "start_prefix", "start_sha256")


def upgrade() -> None:
    op.add_column("adapters", sa.Column("proof", postgresql.JSONB(none_as_null=True), nullable=True))
    op.add_column(
        "adapters",
        sa.Column("exports", postgresql.JSONB(none_as_null=True), server_default=sa.text("'[]'"), nullable=False),
    )
    op.add_column("adapters", sa.Column("signed_by", sa.Text(), nullable=True))
    op.create_table(
        "previews",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("training_file", sa.Text(), nullable=False),
        sa.Column("request", postgresql.JSONB(none_as_null=True), nullable=False),
        sa.Column("result", postgresql.JSONB(none_as_null=True), nullable=True),
        sa.Column("error", postgresql.JSONB(none_as_null=True), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("takes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_previews_tenant_id_tenants"),
        sa.ForeignKeyConstraint(["base_model"], ["base_models.name"], name="fk_previews_base_model_base_models"),
        sa.ForeignKeyConstraint(["training_file"], ["files.id"], name="fk_previews_training_file_files"),
        sa.PrimaryKeyConstraint("id", name="pk_previews"),
    )
    op.create_index("ix_previews_waiting", "previews", ["created_at"], postgresql_where=sa.text("finished_at IS NULL"))
    op.create_table(
        "devices",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", "memory_bytes", name="pk_devices"),
    )
    op.create_table(
        "memory_weighings",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("quantization", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("computed_bytes", sa.BigInteger(), nullable=False),
        sa.Column("measured_bytes", sa.BigInteger(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_memory_weighings_job_id_jobs"),
        sa.PrimaryKeyConstraint("job_id", name="pk_memory_weighings"),
    )
    op.create_index("ix_memory_weighings_base", "memory_weighings", ["digest", "quantization", "kind", "created_at"])
    for column in STARTS:
        op.add_column("jobs", sa.Column(column, sa.Text(), nullable=True))
    op.create_check_constraint(op.f("ck_jobs_start_whole"), "jobs", f"num_nulls({', '.join(STARTS)}) IN (0, 3)")
    op.create_index("ix_jobs_starting", "jobs", ["start_prefix"], postgresql_where=sa.text("start_prefix IS NOT NULL"))


def downgrade() -> None:
    for column in reversed(STARTS):
        op.drop_column("jobs", column)
    op.drop_table("memory_weighings")
    op.drop_table("devices")
    op.drop_table("previews")
    op.drop_column("adapters", "signed_by")
    op.drop_column("adapters", "exports")
    op.drop_column("adapters", "proof")
