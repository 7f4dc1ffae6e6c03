"""The initial schema: threads, branches, items, responses, preambles, journal.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "threads",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("active_branch", sa.Text(), nullable=False),
        sa.Column("running", sa.Text()),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.Column("lineage", sa.LargeBinary()),
        sa.Column("memory", sa.LargeBinary()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_threads"),
        sa.UniqueConstraint("tenant", "key", name="uq_threads_tenant_key"),
    )
    op.create_table(
        "branches",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("parent_branch", sa.Text()),
        sa.Column("parent_position", sa.Integer(), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_branches"),
    )
    forked = sa.text("parent_branch IS NOT NULL")
    op.create_index(
        "ix_branches_parent_branch", "branches", ["parent_branch"], sqlite_where=forked, postgresql_where=forked
    )
    op.create_table(
        "items",
        sa.Column("branch_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("branch_id", "position", name="pk_items"),
    )
    op.create_index("ix_items_item_id", "items", ["item_id"])
    op.create_table(
        "responses",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("branch_id", sa.Text()),
        sa.Column("first", sa.Integer(), nullable=False),
        sa.Column("own", sa.Integer(), nullable=False),
        sa.Column("output_at", sa.Integer()),
        sa.Column("stop", sa.Integer()),
        sa.Column("previous_response_id", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("background", sa.Boolean(), nullable=False),
        sa.Column("store", sa.Boolean(), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("preamble", sa.LargeBinary()),
        sa.Column("input", sa.LargeBinary()),
        sa.Column("output", sa.LargeBinary()),
        sa.Column("error", sa.LargeBinary()),
        sa.Column("usage", sa.LargeBinary()),
        sa.Column("incomplete", sa.Text()),
        sa.Column("owner", sa.Text()),
        sa.Column("lease_until", sa.Float()),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("completed_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_responses"),
    )
    told = sa.text("preamble IS NOT NULL")
    op.create_index(
        "ix_responses_preamble", "responses", ["tenant", "preamble"], sqlite_where=told, postgresql_where=told
    )
    running = sa.text("status IN ('queued', 'in_progress')")
    op.create_index(
        "ix_responses_running", "responses", ["lease_until"], sqlite_where=running, postgresql_where=running
    )
    op.create_table(
        "preambles",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "digest", name="pk_preambles"),
    )
    op.create_table(
        "journal",
        sa.Column("response_id", sa.Text(), nullable=False),
        sa.Column("first", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("response_id", "first", name="pk_journal"),
    )
    if op.get_bind().dialect.name == "postgresql":
        # Payloads are compact already; compressing them costs more than the bytes it saves.
        for table, column in (("items", "payload"), ("journal", "payload"), ("preambles", "payload")):
            op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STORAGE EXTERNAL")


def downgrade() -> None:
    for table in ("journal", "preambles", "responses", "items", "branches", "threads"):
        op.drop_table(table)
