"""Reading threads: which branch is active, what lies on it.

What must stay true: a history of any length and any number of forks is one query, a range scan per
branch; payloads come back as the bytes they were stored as. Every function names the tenant.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import JSON, Executable, Integer, Row, Select, Text, and_, bindparam, case, column, func, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import ColumnElement

from responses_ingress.core.context import Stored
from responses_ingress.store.tables import branches, items, threads


class ThreadHead(NamedTuple):
    """A thread's row with its active branch's head."""

    id: str
    active_branch: str
    head: int
    running: str | None
    lease_until: float
    memory: bytes | None


class StoredItem(NamedTuple):
    item_id: str
    type: str
    payload: bytes


_THREAD = (
    select(
        threads.c.id,
        threads.c.active_branch,
        branches.c.head,
        threads.c.running,
        threads.c.lease_until,
        threads.c.memory,
    )
    .join(branches, branches.c.id == threads.c.active_branch)
    .where(threads.c.id == bindparam("thread"), threads.c.tenant == bindparam("tenant"))
)


async def find_thread(connection: AsyncConnection, tenant: str, thread_id: str) -> ThreadHead | None:
    row = (await connection.execute(_THREAD, {"thread": thread_id, "tenant": tenant})).one_or_none()
    return ThreadHead(*row) if row is not None else None


def _on_branch(*columns: ColumnElement[Any]) -> Select[Any]:
    """`columns` of the items on `:branch` from position `:first` up to `:stop`, in order.

    A branch begins at `parent_position`; what lies below is on its parent. The recursion walks up the
    parents, each cut off where its child begins, or where that one was cut off if that is lower: a fork
    may begin below the place where its parent did.
    """
    leaf = (
        select(
            branches.c.id,
            branches.c.parent_branch,
            branches.c.parent_position,
            bindparam("stop", type_=Integer).label("stop"),
        )
        .where(branches.c.id == bindparam("branch"))
        .cte("line", recursive=True)
    )
    cut = case((leaf.c.parent_position < leaf.c.stop, leaf.c.parent_position), else_=leaf.c.stop)
    parent = select(branches.c.id, branches.c.parent_branch, branches.c.parent_position, cut).where(
        and_(branches.c.id == leaf.c.parent_branch, leaf.c.parent_position > bindparam("first"))
    )
    line = leaf.union_all(parent)
    return (
        select(*columns)
        .select_from(line)
        .join(
            items,
            and_(
                items.c.branch_id == line.c.id,
                items.c.position >= line.c.parent_position,
                items.c.position >= bindparam("first"),
                items.c.position < line.c.stop,
            ),
        )
        .order_by(items.c.position)
    )


_PAYLOADS = _on_branch(items.c.payload)
_DIGESTS = _on_branch(items.c.type, items.c.digest)
_ITEMS = _on_branch(items.c.item_id, items.c.type, items.c.payload)
_POSITIONS = _on_branch(items.c.position).where(items.c.item_id == bindparam("item"))
_HOLDERS = _on_branch(items.c.branch_id)


async def read_payloads(connection: AsyncConnection, branch: str, first: int, stop: int) -> list[bytes]:
    """The items at positions `first` to `stop` of a branch, as stored."""
    return [row.payload for row in await _read(connection, _PAYLOADS, branch, first, stop)]


async def read_digests(connection: AsyncConnection, branch: str, stop: int) -> list[Stored]:
    """What alignment needs of the items on a branch below `stop`."""
    return [Stored(row.type, row.digest) for row in await _read(connection, _DIGESTS, branch, 0, stop)]


async def read_items(connection: AsyncConnection, branch: str, first: int, stop: int) -> list[StoredItem]:
    return [
        StoredItem(row.item_id, row.type, row.payload) for row in await _read(connection, _ITEMS, branch, first, stop)
    ]


async def find_holder(connection: AsyncConnection, branch: str, position: int) -> str | None:
    """Which branch of its line holds what comes right before `position` on a branch; None at the beginning."""
    rows = await _read(connection, _HOLDERS, branch, position - 1, position)
    return rows[0].branch_id if rows else None


async def _read(
    connection: AsyncConnection, query: Executable, branch: str, first: int, stop: int
) -> Sequence[Row[Any]]:
    return (await connection.execute(query, {"branch": branch, "first": first, "stop": stop})).all()


async def find_positions(connection: AsyncConnection, branch: str, first: int, stop: int, item_id: str) -> list[int]:
    """Where between `first` and `stop` of a branch items have this id, in order."""
    if "\0" in item_id:  # PostgreSQL takes no such text
        return []
    asked = {"branch": branch, "first": first, "stop": stop, "item": item_id}
    return list((await connection.execute(_POSITIONS, asked)).scalars())


def _last_copies(listed: str) -> Executable:
    """Of each of these `:ids` the tenant's copy at the highest position, the only row of it that is read.

    listed: the function that makes rows of a JSON array. A list of parameters would be compiled anew for each length.
    """
    asked = getattr(func, listed)(bindparam("ids", type_=JSON)).table_valued(column("value", Text), name="asked")
    last = (
        select(items.c.payload)
        .where(items.c.tenant == bindparam("tenant"), items.c.item_id == asked.c.value)
        .order_by(items.c.position.desc())
        .limit(1)
        .scalar_subquery()
    )
    return select(asked.c.value.label("item_id"), last.label("payload"))


_REFERENCED = {"sqlite": _last_copies("json_each"), "postgresql": _last_copies("json_array_elements_text")}


async def find_items(connection: AsyncConnection, tenant: str, ids: Sequence[str]) -> dict[str, bytes]:
    """The tenant's stored items with these ids."""
    found = await connection.execute(_REFERENCED[connection.dialect.name], {"tenant": tenant, "ids": list(set(ids))})
    return {row.item_id: row.payload for row in found if row.payload is not None}
