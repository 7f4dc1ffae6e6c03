"""A process's database: reading, writing in groups, and transactions of one's own.

What must stay true: everything on a hot path goes through the group-commit writer; `transaction` is for
the rare rest. An open `Database` belongs to the loop that opened it.
"""

import logging
from asyncio import Future
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import bindparam, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.errors import StoreUnavailable
from responses_ingress.ids import Clock
from responses_ingress.store.engine import read_engine, write_engine
from responses_ingress.store.tables import responses, threads
from responses_ingress.store.writer import T, Unit, Writer, kind

logger = logging.getLogger(__name__)


@contextmanager
def _translated() -> Iterator[None]:
    """The database's own failures, as the error a client can act on."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        logger.error("the database failed: %s", kind(error))
        raise StoreUnavailable("The database cannot be reached now.", retry_after=2) from error


class Database:
    """Open it inside the running loop; close it there."""

    def __init__(self, url: str, clock: Clock, synchronous: str = "normal") -> None:
        self._read = read_engine(url, synchronous)
        self._write = write_engine(url, synchronous)
        self._writer = Writer(self._write, clock)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        with _translated():
            async with self._read.connect() as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        with _translated():
            async with self._write.begin() as connection:
                yield connection

    def submit(self, unit: Unit[T]) -> Future[T]:
        """Commit a unit of work together with what else is pending. The future raises what the unit
        raised, or `StoreUnavailable`."""
        return self._writer.submit(unit)

    async def check(self) -> None:
        """Raise `StoreUnavailable` where the database does not answer or nothing writes to it any more."""
        async with self.reading() as connection:
            await connection.exec_driver_sql("SELECT 1")
        if not self._writer.working:
            raise StoreUnavailable("Nothing writes to the database any more.")

    async def close(self) -> None:
        await self._writer.close()
        await self._read.dispose()
        await self._write.dispose()


_RENEW_RESPONSES = (
    update(responses)
    .where(responses.c.id.in_(bindparam("ids", expanding=True)), responses.c.owner == bindparam("who"))
    .values(lease_until=bindparam("until"))
)
_RENEW_THREADS = (
    update(threads)
    .where(threads.c.running.in_(bindparam("ids", expanding=True)))
    .values(lease_until=bindparam("until"))
)


async def renew_leases(connection: AsyncConnection, owner: str, ids: list[str], until: float) -> None:
    """Keep the leases of the responses `owner` is running."""
    await connection.execute(_RENEW_RESPONSES, {"ids": ids, "who": owner, "until": until})
    await connection.execute(_RENEW_THREADS, {"ids": ids, "until": until})
