"""What a worker claims, asks and finds asked, for tests of the queue and of leases."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.store.queue import (
    asked_of,
    is_any_due,
)
from responses_ingress.store.responses import StoredResponse
from responses_ingress.store.retention import MOST, delete_chosen, find_beyond
from responses_ingress.store.tables import responses
from responses_ingress.store.turns import begin_claimed
from responses_ingress.store.values import Ending, Entry, Keep
from tests.store.desk import Desk

CANCELLED = Ending("cancelled", [], [], journal=Entry(0, 3, b'["cancelled"]'), keep=Keep(60, 900))


async def is_due(desk: Desk) -> bool:
    async with desk.database.reading() as connection:
        return await is_any_due(connection, desk.clock())


async def claimed(desk: Desk, most: int = 10) -> list[str]:
    return [row.id for row in await desk.claim(most)]


async def left(desk: Desk) -> list[str]:
    return [row.id for row in await desk.claim_left()]


async def asked(desk: Desk) -> dict[str, str]:
    async with desk.database.reading() as connection:
        return dict(await asked_of(connection, desk.owner.name))


async def lease_of(desk: Desk, response_id: str) -> float | None:
    async with desk.database.reading() as connection:
        query = select(responses.c.lease_until).where(responses.c.id == response_id)
        found: float | None = (await connection.execute(query)).scalar_one()
        return found


async def begin_waiting(desk: Desk, row: StoredResponse, key: str | None = None) -> None:
    """Let what was claimed begin, in the session `key` or alone."""
    place = await desk.session(key, row.tenant) if key else desk.chain(row.tenant)
    await desk.database.submit(begin_claimed(row, None, place, desk.as_owner(row), b"[]"))


async def delete_beyond(connection: AsyncConnection, most: int) -> int:
    """Choose what is beyond a tenant's `most`, and delete as much of it as goes into one transaction."""
    return await delete_chosen(connection, (await find_beyond(connection, most))[:MOST])
