"""A database that is lost in silence: connections stay open, and nothing comes."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from sqlalchemy import make_url

from responses_ingress.errors import StoreUnavailable
from responses_ingress.store.database import Database
from responses_ingress.store.queue import sign
from tests.cable import Cable
from tests.conftest import shown

PATIENCE = 0.3
WRITE = sign("resp_none", 1.0)


@pytest.fixture
async def cable(postgres_database: str) -> AsyncIterator[Cable]:
    async with Cable(postgres_database) as cable:
        yield cable


@pytest.fixture
async def database(cable: Cable, postgres_database: str) -> AsyncIterator[Database]:
    url = make_url(postgres_database).set(host="127.0.0.1", port=cable.port, query={})
    database = Database(shown(url), time.time, patience=PATIENCE)
    await database.check()
    yield database
    cable.mend()
    await database.close()


async def test_who_reads_or_writes_is_told_soon(cable: Cable, database: Database) -> None:
    await database.submit(WRITE)
    cable.stall()
    async with asyncio.timeout(10 * PATIENCE):
        with pytest.raises(StoreUnavailable):
            await database.check()
        with pytest.raises(StoreUnavailable):
            await database.submit(WRITE)
    cable.mend()
    await database.check()
    await database.submit(WRITE)


async def test_work_under_way_waits_and_is_written(cable: Cable, database: Database) -> None:
    cable.stall()
    written = database.submit(replace(WRITE, patient=True))
    with pytest.raises(StoreUnavailable):
        await database.submit(WRITE)
    assert not written.done()
    cable.mend()
    await written


async def test_who_listens_connects_anew(cable: Cable, database: Database) -> None:
    with database.bell.listen("topic") as ear:
        await ear.heard(5)  # it has connected, and so woken everybody
        cable.stall()
        connected = cable.connections
        while cable.connections == connected:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await ear.heard(0)
        cable.mend()
        async with asyncio.timeout(10):
            await ear.heard(10)


async def test_a_transaction_that_nobody_goes_on_with_is_ended(cable: Cable, database: Database) -> None:
    """A worker that is gone in silence keeps no row locked for longer."""
    with pytest.raises(StoreUnavailable):
        async with database.transaction() as connection:
            await connection.exec_driver_sql("LOCK TABLE threads")
            async with database.reading() as reader:
                held = "SELECT 1 FROM pg_locks WHERE relation = 'threads'::regclass AND granted"
                while (await reader.exec_driver_sql(held)).first() is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await connection.exec_driver_sql("SELECT 1")
