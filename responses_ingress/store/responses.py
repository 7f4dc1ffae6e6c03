"""Reading responses.

What must stay true: a response is found by its tenant or not at all; one that is not stored
(`store: false`) is never found, unless it ran in the background and is there for a few minutes more.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import orjson
from sqlalchemy import bindparam, exists, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.core.builder import Builder
from responses_ingress.core.deltas import Item
from responses_ingress.core.envelope import Envelope, restore
from responses_ingress.core.replay import folding
from responses_ingress.errors import NotFound
from responses_ingress.store.history import find_positions, read_payloads
from responses_ingress.store.tables import journal, preambles, responses
from responses_ingress.store.values import Entry
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
    backend: str
    base: str | None
    request: bytes | None
    envelope: bytes
    echo: bytes | None
    preamble: bytes | None
    input: bytes | None
    output: bytes | None
    error: bytes | None
    usage: bytes | None
    incomplete: str | None
    memory: bytes | None
    previous_response_id: str | None
    background: bool
    store: bool
    owner: str | None
    epoch: int
    attempts: int
    asked: str | None
    followed_until: float | None
    created_at: int
    completed_at: int | None
    expires_at: float | None

    @property
    def running(self) -> bool:
        return self.status in RUNNING


_COLUMNS = [
    preambles.c.payload.label(name) if name == "preamble" else responses.c[name] for name in StoredResponse._fields
]
_WITH_PREAMBLE = responses.outerjoin(
    preambles, (preambles.c.tenant == responses.c.tenant) & (preambles.c.digest == responses.c.preamble)
)
_ROWS = select(*_COLUMNS).select_from(_WITH_PREAMBLE)
_RESPONSE = _ROWS.where(
    responses.c.id == bindparam("response"),
    responses.c.tenant == bindparam("tenant"),
    or_(responses.c.store, responses.c.background),
    or_(responses.c.expires_at.is_(None), responses.c.expires_at > bindparam("now")),
)
_NAMED = _ROWS.where(responses.c.id.in_(bindparam("ids", expanding=True)))


async def find_response(
    connection: AsyncConnection, tenant: str, response_id: str, now: float
) -> StoredResponse | None:
    """The tenant's response, unless its time is over by `now`: it may not have been swept away yet."""
    if "\0" in response_id:  # PostgreSQL takes no such text
        return None
    row = (await connection.execute(_RESPONSE, {"response": response_id, "tenant": tenant, "now": now})).one_or_none()
    return StoredResponse(*row) if row is not None else None


async def load(connection: AsyncConnection, ids: Sequence[str]) -> list[StoredResponse]:
    """These responses, whoever's and whether stored or not: for the program itself."""
    return [StoredResponse(*row) for row in (await connection.execute(_NAMED, {"ids": list(ids)})).all()]


def envelope_of(row: StoredResponse) -> Envelope:
    """The response object without its output, as it is now."""
    return envelope_at_creation(row) | {
        **(orjson.loads(row.echo) if row.echo else {}),
        "status": row.status,
        "completed_at": row.completed_at,
        "error": orjson.loads(row.error) if row.error else None,
        "usage": orjson.loads(row.usage) if row.usage else None,
        "incomplete_details": {"reason": row.incomplete} if row.incomplete else None,
    }


def envelope_at_creation(row: StoredResponse) -> Envelope:
    """The response object as it was created: what its journal goes on from."""
    envelope = restore(orjson.loads(row.envelope))
    if row.preamble is not None:
        envelope |= orjson.loads(row.preamble)
    return envelope | {
        "id": row.id,
        "created_at": row.created_at,
        "status": "queued" if row.background else "in_progress",
        "model": row.model,
        "background": row.background,
        "store": row.store,
        "previous_response_id": row.previous_response_id,
    }


async def read_output(connection: AsyncConnection, row: StoredResponse) -> list[Item]:
    if row.branch_id is None or row.output_at is None or row.stop is None:
        return orjson.loads(row.output) if row.output else []
    return _joined(await read_payloads(connection, row.branch_id, row.output_at, row.stop))


async def read_input(
    connection: AsyncConnection,
    row: StoredResponse,
    *,
    after: str | None = None,
    most: int | None = None,
    newest_first: bool = False,
) -> list[Item]:
    """The request's own input items, or some of them: `most`, behind the one with the id `after`; where several
    have it, the last of these in the order asked for. Raises `NotFound` where none has."""
    given: list[Item] = []
    branch, first, stop = row.branch_id, row.first, row.output_at
    if branch is None or stop is None:
        given = orjson.loads(row.input) if row.input else []
        branch, first, stop = None, 0, len(given)
    if after is not None:
        if branch is None:
            found = [place for place, item in enumerate(given) if item["id"] == after]
        else:
            found = await find_positions(connection, branch, first, stop, after)
        if not found:
            raise NotFound(f"Item with id '{after[:100]}' not found.", param="after")
        first, stop = (first, found[0]) if newest_first else (found[-1] + 1, stop)
    if most is not None:
        first, stop = (max(first, stop - most), stop) if newest_first else (first, min(stop, first + most))
    items = given[first:stop] if branch is None else _joined(await read_payloads(connection, branch, first, stop))
    return items[::-1] if newest_first else items


def _joined(payloads: Sequence[bytes]) -> list[Item]:
    items: list[Item] = orjson.loads(b"[" + b",".join(payloads) + b"]")
    return items


_JOURNAL = (
    select(journal.c.first, journal.c.count, journal.c.payload)
    .where(journal.c.response_id == bindparam("response"), journal.c.first >= bindparam("first"))
    .order_by(journal.c.first)
)


async def read_journal(connection: AsyncConnection, response_id: str, first: int = 0) -> list[Entry]:
    """What is journaled of a run from an event on, in order. `first` must be where a row begins."""
    rows = await connection.execute(_JOURNAL, {"response": response_id, "first": first})
    return [Entry(*row) for row in rows]


async def fold_journal(row: StoredResponse, entries: Sequence[Entry]) -> Builder:
    """The response as all its `entries` tell it, without events. A long journal does not hold up everybody else."""
    builder = Builder(envelope_at_creation(row), silent=True)
    for _ in folding(builder, (entry.payload for entry in entries)):
        await asyncio.sleep(0)
    return builder


_HAS_JOURNAL = select(exists().where(journal.c.response_id == bindparam("response")))


async def has_journal(connection: AsyncConnection, response_id: str) -> bool:
    return bool((await connection.execute(_HAS_JOURNAL, {"response": response_id})).scalar_one())
