"""Reading and deleting responses; which of them are unfinished.

What must stay true: a response is found by its tenant or not at all; one that is not stored
(`store: false`) is never found. A deleted response is gone at once; the items it added go with it
unless something else has built on them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Row, bindparam, delete, exists, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.core.deltas import Item
from responses_ingress.core.envelope import Envelope, restore
from responses_ingress.errors import InvalidRequest
from responses_ingress.store.history import read_payloads
from responses_ingress.store.tables import branches, items, journal, preambles, responses
from responses_ingress.store.writer import RUNNING


class StoredResponse(NamedTuple):
    """A response's row, with its preamble's payload."""

    id: str
    tenant: str
    thread_id: str
    branch_id: str | None
    first: int
    own: int
    output_at: int | None
    stop: int | None
    status: str
    model: str
    envelope: bytes
    preamble: bytes | None
    preamble_digest: bytes | None
    input: bytes | None
    output: bytes | None
    error: bytes | None
    usage: bytes | None
    incomplete: str | None
    previous_response_id: str | None
    background: bool
    store: bool
    epoch: int
    created_at: int
    completed_at: int | None

    @property
    def running(self) -> bool:
        return self.status in RUNNING


_RENAMED = {
    "preamble": preambles.c.payload.label("preamble"),
    "preamble_digest": responses.c.preamble.label("preamble_digest"),
}
_COLUMNS = [_RENAMED[name] if name in _RENAMED else responses.c[name] for name in StoredResponse._fields]
_WITH_PREAMBLE = responses.outerjoin(
    preambles, (preambles.c.tenant == responses.c.tenant) & (preambles.c.digest == responses.c.preamble)
)
_RESPONSE = (
    select(*_COLUMNS)
    .select_from(_WITH_PREAMBLE)
    .where(
        responses.c.id == bindparam("response"), responses.c.tenant == bindparam("tenant"), responses.c.store == true()
    )
)
_EXPIRED = (
    select(*_COLUMNS)
    .select_from(_WITH_PREAMBLE)
    .where(responses.c.status.in_(RUNNING), responses.c.lease_until < bindparam("now"))
    .limit(100)
)


async def find_response(connection: AsyncConnection, tenant: str, response_id: str) -> StoredResponse | None:
    if "\0" in response_id:  # PostgreSQL takes no such text
        return None
    row = (await connection.execute(_RESPONSE, {"response": response_id, "tenant": tenant})).one_or_none()
    return StoredResponse(*row) if row is not None else None


async def find_expired(connection: AsyncConnection, now: float) -> list[StoredResponse]:
    """Unfinished responses whose owner has let the lease run out."""
    return [StoredResponse(*row) for row in (await connection.execute(_EXPIRED, {"now": now})).all()]


def envelope_of(row: StoredResponse) -> Envelope:
    """The response object without its output."""
    envelope = restore(orjson.loads(row.envelope))
    if row.preamble is not None:
        envelope |= orjson.loads(row.preamble)
    return envelope | {
        "id": row.id,
        "created_at": row.created_at,
        "status": row.status,
        "model": row.model,
        "background": row.background,
        "store": row.store,
        "previous_response_id": row.previous_response_id,
        "completed_at": row.completed_at,
        "error": orjson.loads(row.error) if row.error else None,
        "usage": orjson.loads(row.usage) if row.usage else None,
        "incomplete_details": {"reason": row.incomplete} if row.incomplete else None,
    }


async def read_output(connection: AsyncConnection, row: StoredResponse) -> list[Item]:
    if row.branch_id is None or row.output_at is None or row.stop is None:
        return orjson.loads(row.output) if row.output else []
    return _joined(await read_payloads(connection, row.branch_id, row.output_at, row.stop))


async def read_input(connection: AsyncConnection, row: StoredResponse) -> list[Item]:
    """The request's own input items, oldest first."""
    if row.branch_id is None or row.output_at is None:
        return orjson.loads(row.input) if row.input else []
    return _joined(await read_payloads(connection, row.branch_id, row.first, row.output_at))


def _joined(payloads: Sequence[bytes]) -> list[Item]:
    items: list[Item] = orjson.loads(b"[" + b",".join(payloads) + b"]")
    return items


_JOURNAL = select(journal.c.payload).where(journal.c.response_id == bindparam("response")).order_by(journal.c.first)


async def read_journal(connection: AsyncConnection, response_id: str) -> list[bytes]:
    return [row[0] for row in (await connection.execute(_JOURNAL, {"response": response_id})).all()]


_UNUSED_PREAMBLES = delete(preambles).where(
    preambles.c.tenant == bindparam("of_tenant"),
    preambles.c.digest == bindparam("of_digest"),
    ~exists().where(responses.c.tenant == preambles.c.tenant, responses.c.preamble == preambles.c.digest),
)


async def delete_response(connection: AsyncConnection, tenant: str, response_id: str) -> bool:
    """Delete an ended response, in the caller's transaction. False where there is none.

    Raises `InvalidRequest` while it runs.
    """
    row = await find_response(connection, tenant, response_id)
    if row is None:
        return False
    if row.running:
        raise InvalidRequest("Cannot delete an in-flight response.")
    if row.branch_id is not None:  # no turn may end here while this is decided
        await connection.execute(select(branches.c.id).where(branches.c.id == row.branch_id).with_for_update())
    gone = await connection.execute(delete(responses).where(responses.c.id == row.id).returning(responses.c.id))
    if gone.first() is None:
        return False
    await connection.execute(delete(journal).where(journal.c.response_id == row.id))
    await connection.execute(_UNUSED_PREAMBLES, {"of_tenant": tenant, "of_digest": row.preamble_digest})
    if row.branch_id is not None and not await _built_upon(connection, row):
        await _cut_off(connection, row)
    return True


async def _built_upon(connection: AsyncConnection, row: StoredResponse) -> bool:
    """Whether anything relies on the items this response added: later items, a fork, a running response."""
    later_items = exists().where(branches.c.id == row.branch_id, branches.c.head > row.stop)
    forks = exists().where(branches.c.parent_branch == row.branch_id, branches.c.parent_position > row.own)
    running = exists().where(
        responses.c.status.in_(RUNNING),
        or_(responses.c.thread_id == row.thread_id, responses.c.previous_response_id == row.id),
    )
    found: Row[Any] = (await connection.execute(select(or_(later_items, forks, running)))).one()
    return bool(found[0])


async def _cut_off(connection: AsyncConnection, row: StoredResponse) -> None:
    """Delete the items the response added, which are the last ones of its branch."""
    await connection.execute(delete(items).where(items.c.branch_id == row.branch_id, items.c.position >= row.own))
    await connection.execute(update(branches).where(branches.c.id == row.branch_id).values(head=row.own))
