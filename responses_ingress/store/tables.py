"""The schema, in SQLAlchemy Core.

What must stay true: every row carries its tenant; payloads are orjson bytes; only what is queried has a
column; nothing is stored twice (a turn's items once, on its branch; what repeats from turn to turn once,
as a preamble). Positions are absolute: an item's position counts from the beginning of the thread's
history, also on a branch that begins in the middle of another.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    and_,
    bindparam,
    literal_column,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Only threads that a client names have a row. A chain of responses that began without a name has its
# branches, whose ids begin with the thread's partition, and needs no more.
threads = Table(
    "threads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("key", Text, nullable=False),  # what the client calls it: a session header's value
    Column("active_branch", Text, nullable=False),
    Column("running", Text),  # the response that has the thread's one turn
    Column("lease_until", Float, nullable=False),
    Column("lineage", LargeBinary),
    Column("memory", LargeBinary),  # of the last turn's backend
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    UniqueConstraint("tenant", "key"),
)
Index("ix_threads_updated_at", threads.c.updated_at)

branches = Table(
    "branches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("parent_branch", Text),
    Column("parent_position", Integer, nullable=False),
    Column("head", Integer, nullable=False),  # the position the next item gets
)
Index("ix_branches_thread_id", branches.c.thread_id)


def _partial(name: str, *columns: ColumnElement[Any], where: ColumnElement[bool]) -> None:
    """An index over the few rows that matter."""
    Index(name, *columns, sqlite_where=where, postgresql_where=where)


_partial("ix_branches_parent_branch", branches.c.parent_branch, where=branches.c.parent_branch.is_not(None))

items = Table(
    "items",
    metadata,
    Column("branch_id", Text, primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("tenant", Text, nullable=False),
    Column("item_id", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)
# An id can have as many copies as its tenant likes, and in other tenants too: the last one is found at once.
Index("ix_items_tenant_item_id", items.c.tenant, items.c.item_id, items.c.position)

responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("base", Text),  # the branch it continues, up to `own`; null while it has not begun
    Column("branch_id", Text),  # set when its items are on a branch
    Column("first", Integer, nullable=False),  # position of its first input item,
    Column("own", Integer, nullable=False),  # of the first item it added,
    Column("output_at", Integer),  # of its first output item,
    Column("stop", Integer),  # and behind its last
    Column("previous_response_id", Text),
    Column("status", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("backend", Text, nullable=False),
    Column("background", Boolean, nullable=False),
    Column("store", Boolean, nullable=False),
    Column("request", LargeBinary),  # while another process may have to run it: what was asked, and by whom
    Column("envelope", LargeBinary, nullable=False),  # as it was created
    Column("echo", LargeBinary),  # what of that its end changed
    Column("preamble", LargeBinary),
    Column("input", LargeBinary),  # its new input and, at the end, its output, where they are on no branch
    Column("output", LargeBinary),
    Column("error", LargeBinary),
    Column("usage", LargeBinary),
    Column("incomplete", Text),
    Column("memory", LargeBinary),  # of its backend, for what goes on from it
    Column("owner", Text),
    Column("lease_until", Float),  # from then on it is anybody's: to begin, to go on with, or to close
    Column("epoch", Integer, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),  # how often its process died
    Column("asked", Text),  # what is asked of its owner: `cancel`, or to make way (`yield`) if nobody follows
    Column("followed_until", Float),  # who follows it in another process says so; null: nobody ever did
    Column("retry_key", LargeBinary),  # by what a repeated request is known, and the digest of its body
    Column("retry_body", LargeBinary),
    Column("created_at", BigInteger, nullable=False),
    Column("completed_at", BigInteger),
    Column("journal_until", Float),  # how long after its end its journal is kept, and a repeat attaches to it
    Column("expires_at", Float),  # when it is deleted; null while it runs, and where it is kept for ever
)

# Literals: a planner cannot know that a parameter's value is one that a partial index covers.
is_running = responses.c.status.in_([literal_column("'queued'"), literal_column("'in_progress'")])
_partial("ix_responses_running", responses.c.lease_until, where=is_running)
_partial("ix_responses_base", responses.c.base, where=is_running)
_partial("ix_responses_thread_id", responses.c.thread_id, where=is_running)
_partial("ix_responses_previous_response_id", responses.c.previous_response_id, where=is_running)
_partial(
    "ix_responses_preamble",
    responses.c.tenant,
    responses.c.preamble,
    where=responses.c.preamble.is_not(None),
)
_partial("ix_responses_branch_id", responses.c.branch_id, responses.c.stop, where=responses.c.branch_id.is_not(None))
_partial(
    "ix_responses_retry_key",
    responses.c.retry_key,
    responses.c.created_at,
    where=responses.c.retry_key.is_not(None),
)
_partial("ix_responses_journal_until", responses.c.journal_until, where=responses.c.journal_until.is_not(None))
_partial("ix_responses_expires_at", responses.c.expires_at, where=responses.c.expires_at.is_not(None))

preambles = Table(
    "preambles",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("digest", LargeBinary, primary_key=True),
    Column("payload", LargeBinary, nullable=False),
)


def are_preambles() -> ColumnElement[bool]:
    """Those of these `:digests` that these `:tenants` have: all that are meant are among them, and SQLite would not
    look for pairs by the key."""
    return and_(
        preambles.c.tenant.in_(bindparam("tenants", expanding=True)),
        preambles.c.digest.in_(bindparam("digests", expanding=True)),
    )


# An ordinary rowid table: WITHOUT ROWID doubles the size of rows of 2 kB (overflow pages).
journal = Table(
    "journal",
    metadata,
    Column("response_id", Text, primary_key=True),
    Column("first", Integer, primary_key=True, autoincrement=False),  # number of the first event it makes
    Column("tenant", Text, nullable=False),
    Column("count", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)
