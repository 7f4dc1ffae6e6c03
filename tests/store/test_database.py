"""An open database: reading beside writing, transactions of one's own, and failures in plain words."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from sqlalchemy import func, insert, select, text

from responses_ingress.errors import InvalidRequest, StoreUnavailable
from responses_ingress.store.database import Database
from responses_ingress.store.tables import preambles
from responses_ingress.store.writer import Unit
from tests.store.desk import Clock, Desk

INSERT = insert(preambles)


def preamble(number: int) -> dict[str, object]:
    return {"tenant": "", "digest": b"%d" % number, "payload": b"{}"}


async def stored(database: Database) -> int:
    async with database.reading() as connection:
        return int((await connection.execute(select(func.count()).select_from(preambles))).scalar_one())


def insertion(number: int) -> Unit[None]:
    return Unit(lambda batch: batch.add(INSERT, **preamble(number)))


async def test_what_was_submitted_is_read_by_everybody(desk: Desk, other_desk: Desk) -> None:
    await desk.database.submit(insertion(1))
    assert await stored(desk.database) == await stored(other_desk.database) == 1


async def test_a_transaction_is_committed_whole_or_not_at_all(desk: Desk) -> None:
    async with desk.database.transaction() as connection:
        await connection.execute(INSERT, [preamble(1), preamble(2)])
    assert await stored(desk.database) == 2
    with pytest.raises(ZeroDivisionError):
        async with desk.database.transaction() as connection:
            await connection.execute(INSERT, preamble(3))
            raise ZeroDivisionError
    assert await stored(desk.database) == 2


async def test_readers_do_not_wait_for_a_writer_and_see_what_is_committed(desk: Desk) -> None:
    async with desk.database.transaction() as connection:
        await connection.execute(INSERT, preamble(1))
        assert await asyncio.gather(*(stored(desk.database) for _ in range(8))) == [0] * 8
    assert await stored(desk.database) == 1


async def test_a_reader_sees_the_newest_state_at_every_statement(desk: Desk) -> None:
    count = select(func.count()).select_from(preambles)
    async with desk.database.reading() as connection:
        assert (await connection.execute(count)).scalar_one() == 0
        await desk.database.submit(insertion(1))
        assert (await connection.execute(count)).scalar_one() == 1


async def test_units_and_transactions_of_several_workers_all_arrive(desk: Desk, other_desk: Desk) -> None:
    async def transact(database: Database, number: int) -> None:
        async with database.transaction() as connection:
            await connection.execute(INSERT, preamble(number))

    work: list[Awaitable[None]] = []
    for at, database in enumerate((desk.database, other_desk.database)):
        work += [database.submit(insertion(100 * at + number)) for number in range(20)]
        work += [transact(database, 100 * at + number) for number in range(20, 25)]
    await asyncio.gather(*work)
    assert await stored(desk.database) == 50


async def test_closing_commits_what_is_pending(each_database: str) -> None:
    database = Database(each_database, Clock())
    pending = [database.submit(insertion(number)) for number in range(3)]
    await database.close()
    assert all(future.done() for future in pending)
    with pytest.raises(StoreUnavailable):
        await database.submit(insertion(9))
    again = Database(each_database, Clock())
    assert await stored(again) == 3
    await again.close()


@dataclass
class Way:
    """A way of using the database."""

    name: str
    use: Callable[[Database, str], Awaitable[None]]

    def __str__(self) -> str:
        return self.name


async def read(database: Database, statement: str) -> None:
    async with database.reading() as connection:
        await connection.execute(text(statement), {"x": 1})


async def transact(database: Database, statement: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(text(statement), {"x": 1})


async def submit(database: Database, statement: str) -> None:
    await database.submit(Unit(lambda batch: batch.add(text(statement), x=1)))


WAYS = [Way("reading", read), Way("a transaction", transact), Way("a unit", submit)]


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_a_failure_of_the_database_is_told_as_one_to_try_again(desk: Desk, way: Way) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        await way.use(desk.database, "INSERT INTO no_such_table (x) VALUES (:x)")
    assert caught.value.status == 503
    assert caught.value.retry_after
    assert "no_such_table" not in caught.value.message
    assert await stored(desk.database) == 0


DOWN = ["postgresql+asyncpg://nobody@127.0.0.1:1/db", "postgresql+asyncpg://nobody@/db?host=/no/such/folder"]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("url", DOWN, ids=["no port", "no socket"])
async def test_a_server_that_is_down_is_told_as_one_to_try_again(way: Way, url: str) -> None:
    database = Database(url, Clock())
    for _ in range(2):  # the first failure does not end it
        with pytest.raises(StoreUnavailable):
            await way.use(database, "SELECT 1")
    with pytest.raises(StoreUnavailable):
        await database.check()
    await database.close()


async def test_a_database_that_answers_and_is_written_to_is_well(each_database: str) -> None:
    database = Database(each_database, Clock())
    await database.check()
    await database.close()


async def test_an_error_of_ours_passes_through_as_it_is(desk: Desk) -> None:
    with pytest.raises(InvalidRequest):
        async with desk.database.transaction() as connection:
            await connection.execute(INSERT, preamble(1))
            raise InvalidRequest("No.")
    with pytest.raises(InvalidRequest):
        async with desk.database.reading():
            raise InvalidRequest("No.")
    assert await stored(desk.database) == 0
