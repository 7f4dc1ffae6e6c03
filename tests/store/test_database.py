"""An open database: reading beside writing, transactions of one's own, failures in plain words, and the time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from sqlalchemy import func, insert, select, text

from responses_ingress.errors import InvalidRequest, StoreUnavailable
from responses_ingress.store.database import Database, DatabaseClock
from responses_ingress.store.engine import is_sqlite
from responses_ingress.store.tables import preambles
from responses_ingress.store.writer import Unit
from tests.store.desk import NOW, Clock, Desk

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


async def test_the_writer_waits_for_one_transaction_at_the_most(desk: Desk, each_database: str) -> None:
    """However many there are: they are the rare rest, and answers wait for the writer."""
    begun, go_on, done = asyncio.Event(), asyncio.Event(), []

    async def transact(number: int) -> None:
        async with desk.database.transaction() as connection:
            begun.set()
            await connection.execute(INSERT, preamble(number))
            await go_on.wait()
        done.append(number)

    async with asyncio.TaskGroup() as transactions:
        for number in range(20):
            transactions.create_task(transact(number))
        await begun.wait()
        written = desk.database.submit(insertion(20))
        if is_sqlite(each_database):  # where it waits for the one that has begun
            go_on.set()
        async with asyncio.timeout(30):
            await written
        assert len(done) <= 2
        go_on.set()
    assert await stored(desk.database) == 21


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


# The time.


async def told(database: Database) -> float:
    """What PostgreSQL's clock says."""
    async with database.reading() as connection:
        return float((await connection.execute(text("SELECT extract(epoch FROM clock_timestamp())"))).scalar_one())


@pytest.mark.parametrize("wrong", [0.0, 4e9], ids=["long ago", "far ahead"])
async def test_a_clock_that_follows_the_database_forgets_what_its_host_says(
    postgres_database: str, wrong: float
) -> None:
    clock = DatabaseClock()
    clock.set(wrong)
    database = Database(postgres_database, clock)
    await database.keep_time()
    before = await told(database)
    now = clock()
    after = await told(database)
    assert before - 0.05 <= now <= after + 0.05
    assert now < clock() < now + 10  # and it goes on
    await database.close()


async def test_hosts_whose_clocks_differ_agree_on_the_time(postgres_database: str) -> None:
    clocks = [DatabaseClock(), DatabaseClock()]
    databases = [Database(postgres_database, clock) for clock in clocks]
    for clock, database in zip(clocks, databases, strict=True):
        clock.set(clock() + (3600 if clock is clocks[0] else -3600))
        await database.keep_time()
    assert abs(clocks[0]() - clocks[1]()) < 0.1
    for database in databases:
        await database.close()


async def test_the_time_is_right_where_the_question_had_to_wait(postgres_database: str) -> None:
    """Every connection is taken: what waiting for one took is no part of the answer's way."""
    clock = DatabaseClock()
    database = Database(postgres_database, clock)
    async with AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(database.reading())
        asking = asyncio.create_task(database.keep_time())
        await asyncio.wait((asking,), timeout=1)
        assert not asking.done()
    await asking
    before = await told(database)
    assert before - 0.05 <= clock() <= await told(database) + 0.05
    await database.close()


async def test_a_clock_of_another_kind_is_left_alone(desk: Desk) -> None:
    await desk.database.keep_time()
    assert desk.database.clock() == NOW


def test_until_it_is_told_a_clock_says_what_its_host_says() -> None:
    assert abs(DatabaseClock()() - time.time()) < 1
