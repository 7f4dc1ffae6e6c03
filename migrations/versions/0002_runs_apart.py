"""Runs apart from connections: queueing, asking the owner, following elsewhere, retries, retention.

Revision ID: 0002
"""

import json
import time

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COLUMNS = (
    ("base", sa.Text),
    ("request", sa.LargeBinary),
    ("echo", sa.LargeBinary),
    ("memory", sa.LargeBinary),
    ("asked", sa.Text),
    ("followed_until", sa.Float),
    ("retry_key", sa.LargeBinary),
    ("retry_body", sa.LargeBinary),
    ("journal_until", sa.Float),
    ("expires_at", sa.Float),
)
_INDEXES = (
    ("ix_responses_base", ["base"], "status IN ('queued', 'in_progress')"),
    ("ix_responses_thread_id", ["thread_id"], "status IN ('queued', 'in_progress')"),
    ("ix_responses_previous_response_id", ["previous_response_id"], "status IN ('queued', 'in_progress')"),
    ("ix_responses_branch_id", ["branch_id", "stop"], "branch_id IS NOT NULL"),
    ("ix_responses_retry_key", ["retry_key", "created_at"], "retry_key IS NOT NULL"),
    ("ix_responses_journal_until", ["journal_until"], "journal_until IS NOT NULL"),
    ("ix_responses_expires_at", ["expires_at"], "expires_at IS NOT NULL"),
)
_MONTH = 30 * 24 * 3600


def upgrade() -> None:
    for name, type in _COLUMNS:
        op.add_column("responses", sa.Column(name, type()))
    op.add_column("responses", sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"))
    # What is there already was kept for ever. Nobody is to lose it at once: it counts as used today.
    until = int(time.time()) + _MONTH
    op.execute(f"UPDATE responses SET expires_at = {until} WHERE status NOT IN ('queued', 'in_progress')")
    for name, columns, where in _INDEXES:
        op.create_index(name, "responses", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
    op.create_index("ix_branches_thread_id", "branches", ["thread_id"])
    op.create_index("ix_threads_updated_at", "threads", ["updated_at"])
    op.drop_index("ix_items_item_id", "items")
    op.create_index("ix_items_tenant_item_id", "items", ["tenant", "item_id", "position"])


def downgrade() -> None:
    op.drop_index("ix_items_tenant_item_id", "items")
    op.create_index("ix_items_item_id", "items", ["item_id"])
    op.drop_index("ix_threads_updated_at", "threads")
    op.drop_index("ix_branches_thread_id", "branches")
    for name, _, _ in _INDEXES:
        op.drop_index(name, "responses")
    # Before this revision no response waited for a process, a journal and what is not stored went with the end,
    # and an envelope held what that had changed.
    _merge_echoes()
    op.execute("DELETE FROM journal WHERE response_id IN (SELECT id FROM responses WHERE journal_until IS NOT NULL)")
    op.execute("DELETE FROM responses WHERE base IS NULL AND status = 'queued'")
    op.execute("DELETE FROM responses WHERE NOT store AND status NOT IN ('queued', 'in_progress')")
    for name, _ in (*_COLUMNS, ("attempts", sa.Integer)):
        op.drop_column("responses", name)


def _merge_echoes() -> None:
    responses = sa.table("responses", *(sa.column(name) for name in ("id", "envelope", "echo")))
    changed = sa.select(responses).where(responses.c.echo.is_not(None))
    for id, envelope, echo in op.get_bind().execute(changed).all():
        merged = json.dumps({**json.loads(envelope), **json.loads(echo)}).encode()
        op.execute(responses.update().where(responses.c.id == id).values(envelope=merged))
