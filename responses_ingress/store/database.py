"""A process's database: reading, writing in groups, and transactions of one's own.

What must stay true: everything on a hot path goes through the group-commit writer; `transaction` is for
the rare rest, and the writer waits for one of these at the most. An open `Database` belongs to the loop that
opened it.
"""

import asyncio
import logging
import time
from asyncio import Future
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.errors import StoreUnavailable
from responses_ingress.ids import Clock
from responses_ingress.store.engine import PATIENCE, is_sqlite, listen_engine, read_engine, write_engine
from responses_ingress.store.wake import Bell, hear
from responses_ingress.store.writer import ALL_AT_ONCE, T, Unit, Writer, kind

logger = logging.getLogger(__name__)

_BOOTTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)


@contextmanager
def _translated() -> Iterator[None]:
    """The database's own failures, as the error a client can act on."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        logger.error("the database failed: %s", kind(error))
        raise StoreUnavailable("The database cannot be reached now.", retry_after=2) from error


def _steady() -> float:
    """Seconds that never go back and, where the system can tell, go on while the host sleeps."""
    return time.clock_gettime(_BOOTTIME) if _BOOTTIME is not None else time.monotonic()


class DatabaseClock:
    """The database's time, which decides where hosts' clocks differ: as it was when `Database.keep_time` last
    asked, and what has passed since."""

    def __init__(self) -> None:
        self._ahead = time.time() - _steady()

    def __call__(self) -> float:
        return _steady() + self._ahead

    def set(self, now: float) -> None:
        self._ahead = now - _steady()


class Database:
    """Open it inside the running loop; close it there.

    clock: the time that leases are counted by. patience: seconds that PostgreSQL has to answer. bell: what to
    listen to for changes.
    """

    def __init__(self, url: str, clock: Clock, synchronous: str = "normal", patience: float = PATIENCE) -> None:
        self.clock = clock
        self.bell = Bell()
        self._read = read_engine(url, synchronous, patience)
        self._write = write_engine(url, synchronous, patience)
        # SQLite's own waiting is a poll, which who writes again and again wins each time.
        self._order = asyncio.Lock() if is_sqlite(url) else ALL_AT_ONCE
        # PostgreSQL may let one wait for another worker's row, and leases must be renewed meanwhile.
        self._rest = write_engine(url, synchronous, patience, spare=0 if is_sqlite(url) else 1)
        self._writer = Writer(self._write, clock, self.bell, order=self._order)
        self._listen = None if is_sqlite(url) else listen_engine(url, patience)
        ears = hear(self._listen, self.bell, patience) if self._listen else None
        self._ears = asyncio.create_task(ears, name="store-ears") if ears else None

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        with _translated():
            async with self._read.connect() as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        with _translated():
            async with self._rest.connect() as connection, self._order, connection.begin():
                yield connection

    def submit(self, unit: Unit[T]) -> Future[T]:
        """Commit a unit of work together with what else is pending. The future raises what the unit
        raised, or `StoreUnavailable`."""
        return self._writer.submit(unit)

    async def keep_time(self) -> None:
        """Set the clock by the database's, where it is one that follows it."""
        if isinstance(self.clock, DatabaseClock):
            async with self.reading() as connection:  # which may have taken a while to come by
                before = time.monotonic()
                told = await connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())::float8")
                now = float(told.scalar_one())
            self.clock.set(now + (time.monotonic() - before) / 2)

    async def check(self) -> None:
        """Raise `StoreUnavailable` where the database does not answer or nothing writes to it any more."""
        async with self.reading() as connection:
            await connection.exec_driver_sql("SELECT 1")
        if not self._writer.working:
            raise StoreUnavailable("Nothing writes to the database any more.")

    async def close(self) -> None:
        await self._writer.close()
        if self._ears is not None and self._listen is not None:
            self._ears.cancel()
            with suppress(asyncio.CancelledError):
                await self._ears
            await self._listen.dispose()
        await self._read.dispose()
        await self._write.dispose()
        await self._rest.dispose()
