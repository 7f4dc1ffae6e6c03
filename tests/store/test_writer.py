"""The group-commit writer: what goes into one transaction, what fails alone, and what outlives an outage."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import URL, Executable, event, insert, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from responses_ingress.errors import InvalidRequest, StoreUnavailable
from responses_ingress.ids import Clock
from responses_ingress.store.engine import is_sqlite, read_engine, write_engine
from responses_ingress.store.tables import journal
from responses_ingress.store.wake import Bell
from responses_ingress.store.writer import PATIENCE, Batch, Branch, Unit, Writer
from tests.conftest import run_on

NOW = 1_760_000_000.0
INSERT = insert(journal)
FAIL = text("SELECT fail(:state)")
FAIL_FUNCTION = """CREATE FUNCTION fail(state text) RETURNS void LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'as asked' USING ERRCODE = state; END $$"""
Outage = Callable[[], AbstractAsyncContextManager[None]]


def at_noon() -> float:
    return NOW


@dataclass
class Bench:
    """A writer over an empty database; units write rows of the journal, told by their number."""

    engine: AsyncEngine
    writer: Writer
    url: str
    bell: Bell

    def submit(self, apply: Callable[[Batch], Any], patient: bool = False) -> asyncio.Future[Any]:
        return self.writer.submit(Unit(apply, patient=patient))

    async def written(self) -> list[int]:
        engine = read_engine(self.url)
        try:
            async with engine.connect() as connection:
                return [row[0] for row in await connection.execute(select(journal.c.first).order_by(journal.c.first))]
        finally:
            await engine.dispose()

    def commits(self) -> list[None]:
        """One entry for every transaction committed from now on."""
        seen: list[None] = []
        event.listen(self.engine.sync_engine, "commit", lambda connection: seen.append(None))
        return seen

    def statements(self) -> list[str]:
        """The statements run from now on; for SQLite, without the BEGIN that PostgreSQL's driver does itself."""
        seen: list[str] = []

        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if not statement.startswith("BEGIN"):
                seen.append(statement)

        event.listen(self.engine.sync_engine, "before_cursor_execute", note)
        return seen


def row(batch: Batch, number: int) -> None:
    batch.add(INSERT, response_id="resp_1", first=number, tenant="", count=1, payload=b"[]")


def writes(number: int) -> Callable[[Batch], int]:
    def apply(batch: Batch) -> int:
        row(batch, number)
        return number

    return apply


def refuses(batch: Batch) -> None:
    raise InvalidRequest("No.")


@asynccontextmanager
async def at_bench(url: str, patience: float = PATIENCE) -> AsyncIterator[Bench]:
    engine = write_engine(url)
    if is_sqlite(url):  # a lock is told of at once, not after ten seconds

        def impatient(connection: Any, _record: object) -> None:
            connection.execute("PRAGMA busy_timeout=0")

        event.listen(engine.sync_engine, "connect", impatient)
    bell = Bell()
    writer = Writer(engine, at_noon, bell, patience)
    yield Bench(engine, writer, url, bell)
    await writer.close()
    await engine.dispose()


@pytest.fixture
async def bench(each_database: str) -> AsyncIterator[Bench]:
    async with at_bench(each_database) as bench:
        yield bench


@pytest.fixture
async def postgres_bench(postgres_database: str) -> AsyncIterator[Bench]:
    """A bench at a PostgreSQL that has a function to fail with any SQLSTATE."""
    async with at_bench(postgres_database) as bench:
        await run_on(make_url(postgres_database), FAIL_FUNCTION)
        yield bench


@pytest.fixture
def outage(each_database: str, request: pytest.FixtureRequest) -> Outage:
    """Makes the database unusable for the time of a `with`."""
    url = make_url(each_database)
    if is_sqlite(each_database):
        return lambda: locked(url)
    return lambda: closed_to_all(request.getfixturevalue("postgres"), url)


@asynccontextmanager
async def locked(url: URL) -> AsyncIterator[None]:
    with closing(sqlite3.connect(url.database or "", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@asynccontextmanager
async def closed_to_all(server: URL, url: URL) -> AsyncIterator[None]:
    leave = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.database}'"
    await run_on(server, f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false", leave)
    yield
    await run_on(server, f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true")


async def outcome(future: Awaitable[Any]) -> Any:
    """What a unit returned, or the kind of error it raised."""
    try:
        return await future
    except Exception as error:
        return type(error)


async def test_units_that_are_pending_together_are_one_transaction(bench: Bench) -> None:
    commits = bench.commits()
    assert await asyncio.gather(*(bench.submit(writes(number)) for number in range(50))) == list(range(50))
    assert len(commits) == 1
    assert await bench.written() == list(range(50))


async def test_what_comes_while_a_commit_is_under_way_is_the_next_batch(bench: Bench) -> None:
    commits = bench.commits()
    later: list[asyncio.Future[Any]] = []

    def first(batch: Batch) -> int:
        later.extend(bench.submit(writes(number)) for number in range(1, 20))
        return writes(0)(batch)

    await bench.submit(first)
    assert len(commits) == 1
    assert not any(future.done() for future in later)
    await asyncio.gather(*later)
    assert len(commits) == 2
    assert await bench.written() == list(range(20))


async def test_a_crowd_is_written_in_several_transactions(bench: Bench) -> None:
    commits = bench.commits()
    await asyncio.gather(*(bench.submit(writes(number)) for number in range(450)))
    assert 1 < len(commits) <= 3
    assert await bench.written() == list(range(450))


async def test_fifty_units_take_as_many_statements_as_one(bench: Bench) -> None:
    statements = bench.statements()
    await bench.submit(writes(0))
    alone = len(statements)
    await asyncio.gather(*(bench.submit(writes(number)) for number in range(1, 51)))
    assert len(statements) == 2 * alone


async def test_the_facts_of_all_units_are_read_with_one_query_each(bench: Bench) -> None:
    def opens(branch: str) -> Callable[[Batch], None]:
        return lambda batch: batch.add_branch(Branch(branch, "thread_1", 3), "")

    await asyncio.gather(*(bench.submit(opens(f"b{number}")) for number in range(9)))
    statements = bench.statements()

    def head_of(branch: str) -> Unit[int]:
        return Unit(lambda batch: batch.branches[branch].head, branches=(branch, "b0", "no such branch"))

    found = await asyncio.gather(*(bench.writer.submit(head_of(f"b{number}")) for number in range(9)))
    assert found == [3] * 9
    assert len(statements) == 1


async def test_a_caller_resumes_when_its_rows_are_committed(bench: Bench) -> None:
    await bench.submit(writes(7))
    assert await bench.written() == [7]


async def test_a_unit_that_refuses_costs_the_others_nothing(bench: Bench) -> None:
    commits = bench.commits()
    futures = [bench.submit(apply) for apply in (writes(1), refuses, writes(2), refuses)]
    assert [await outcome(future) for future in futures] == [1, InvalidRequest, 2, InvalidRequest]
    assert len(commits) == 1
    assert await bench.written() == [1, 2]


async def test_units_are_applied_in_the_order_they_came(bench: Bench) -> None:
    order: list[int] = []

    def noted(number: int) -> Callable[[Batch], None]:
        return lambda batch: order.append(number)

    await asyncio.gather(*(bench.submit(noted(number)) for number in range(300)))
    assert order == list(range(300))


async def test_a_unit_sees_what_those_before_it_in_its_batch_decided(bench: Bench) -> None:
    def opens(batch: Batch) -> None:
        batch.add_branch(Branch("b", "thread_1", 0), "")

    def moves(batch: Batch) -> int:
        batch.move_head(batch.branches["b"], batch.branches["b"].head + 2)
        return batch.branches["b"].head

    futures = [bench.submit(apply) for apply in (opens, moves, moves)]
    assert [await future for future in futures] == [None, 2, 4]
    assert await bench.writer.submit(Unit(lambda batch: batch.branches["b"].head, branches=("b",))) == 4


async def test_the_bell_rings_for_what_is_committed_only(bench: Bench) -> None:
    def rings(batch: Batch) -> None:
        batch.ring("a")
        batch.ring("b")

    def breaks(batch: Batch) -> None:
        batch.ring("a")
        batch.add(text("INSERT INTO no_such_table (x) VALUES (:x)"), x=1)

    with bench.bell.listen("a") as one, bench.bell.listen("b") as other, bench.bell.listen("c") as none:
        await outcome(bench.submit(breaks))
        assert not await one.heard(0)
        await bench.submit(rings)
        assert [await ear.heard(0) for ear in (one, other, none)] == [True, True, False]


async def test_time_is_the_injected_clocks(bench: Bench) -> None:
    assert await bench.submit(lambda batch: batch.now) == NOW


async def test_a_row_that_is_there_already_fails_alone(bench: Bench) -> None:
    await bench.submit(writes(2))
    futures = [bench.submit(writes(number)) for number in (1, 2, 3)]
    assert [await outcome(future) for future in futures] == [1, StoreUnavailable, 3]
    assert await bench.written() == [1, 2, 3]


async def test_of_two_units_with_the_same_row_the_first_wins(bench: Bench) -> None:
    futures = [bench.submit(writes(number)) for number in (1, 1)]
    assert [await outcome(future) for future in futures] == [1, StoreUnavailable]
    assert await bench.written() == [1]


async def test_a_unit_that_another_was_quicker_than_decides_again(bench: Bench) -> None:
    """As two workers do that make the same thread at once: the second then finds it."""
    await bench.submit(writes(1))
    tries: list[int] = []

    def apply(batch: Batch) -> str:
        tries.append(len(tries))
        row(batch, 1 if len(tries) == 1 else 2)
        return f"try {len(tries)}"

    assert await bench.submit(apply) == "try 2"
    assert await bench.written() == [1, 2]


BAD: dict[str, dict[str, object]] = {
    "too large": {"first": 2**70},
    "NUL": {"tenant": "a\0b"},
    "half a character": {"tenant": "\ud800"},
    "no bytes": {"payload": object()},
    "nothing": {"tenant": None},
}


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("what", BAD)
async def test_data_that_no_database_takes_fails_its_own_unit_at_once(bench: Bench, what: str, patient: bool) -> None:
    takes = what == "NUL" and is_sqlite(bench.url)
    bad = {"response_id": "resp_1", "first": 2, "tenant": "", "count": 1, "payload": b"[]", **BAD[what]}
    futures = [
        bench.submit(writes(1), patient),
        bench.submit(lambda batch: batch.add(INSERT, **bad), patient),
        bench.submit(writes(3), patient),
    ]
    async with asyncio.timeout(10):
        assert [await outcome(future) for future in futures] == [1, None if takes else StoreUnavailable, 3]
    assert await bench.written() == ([1, 2, 3] if takes else [1, 3])


async def test_a_row_without_a_value_that_its_statement_needs_fails_its_own_unit(bench: Bench) -> None:
    futures = [bench.submit(writes(1)), bench.submit(lambda batch: batch.add(INSERT, first=2)), bench.submit(writes(3))]
    assert [await outcome(future) for future in futures] == [1, StoreUnavailable, 3]
    assert await bench.written() == [1, 3]


@dataclass
class Failing:
    """A unit that fails with one of `states` each time it is applied, as long as there are any; then it writes."""

    number: int
    states: list[str]
    applied: list[int]

    def __call__(self, batch: Batch) -> int:
        self.applied.append(self.number)
        if self.states:
            if state := self.states.pop(0):
                batch.add(FAIL, state=state)
        else:
            row(batch, self.number)
        return self.number


AT_FAULT = ["22P02", "22021", "23505", "23502", "42P01", "54000", "0A000"]
DOWN = ["57P01", "57P03", "53300", "53100", "25006", "08006", "55P03"]
CONTENDED = ["40001", "40P01"]


@pytest.mark.parametrize("state", AT_FAULT)
async def test_what_is_at_fault_fails_alone_after_a_second_look(postgres_bench: Bench, state: str) -> None:
    applied: list[int] = []
    unit = Failing(1, [state] * 9, applied)
    futures = [postgres_bench.submit(unit, patient=True), postgres_bench.submit(writes(2))]
    assert [await outcome(future) for future in futures] == [StoreUnavailable, 2]
    assert len(applied) == 3  # together, alone, and with the facts read again


@pytest.mark.parametrize("state", DOWN)
async def test_a_database_that_cannot_is_waited_for_by_work_and_not_by_requests(
    postgres_bench: Bench, state: str
) -> None:
    applied: list[int] = []
    work = postgres_bench.submit(Failing(1, [state], applied), patient=True)
    request = postgres_bench.submit(Failing(2, [""], applied))
    assert [await outcome(future) for future in (work, request)] == [1, StoreUnavailable]
    assert applied == [1, 2, 1]
    assert await postgres_bench.written() == [1]


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("state", CONTENDED)
async def test_what_was_only_in_anothers_way_is_written_again(postgres_bench: Bench, state: str, patient: bool) -> None:
    applied: list[int] = []
    units = [Failing(1, [state] * 3, applied), Failing(2, [""] * 3, applied)]
    assert await asyncio.gather(*(postgres_bench.submit(unit, patient) for unit in units)) == [1, 2]
    assert applied == [1, 2] * 4
    assert await postgres_bench.written() == [1, 2]


async def test_none_passes_one_that_is_put_off_while_they_are_written_singly(postgres_bench: Bench) -> None:
    """Among them may be the end of a response and what is to be journaled before it."""
    applied: list[int] = []
    units = [
        Failing(1, ["", "40001"], applied),
        Failing(2, ["23505"], applied),
        Failing(3, [""], applied),
    ]
    await asyncio.gather(*map(postgres_bench.submit, units))
    assert applied == [1, 2, 3, 1, 1, 2, 3]


async def test_of_two_that_wait_for_each_other_both_are_written(postgres_bench: Bench) -> None:
    """A true deadlock: the writer has one row and wants another's, who wants the writer's."""

    def opens(batch: Batch) -> None:
        for branch in ("a", "b"):
            batch.add_branch(Branch(branch, "thread_1", 0), "")

    await postgres_bench.submit(opens)
    tries: list[int] = []

    def both(batch: Batch) -> None:
        tries.append(len(tries))
        for branch in ("a", "b"):
            batch.move_head(batch.branches.get(branch) or Branch(branch, "thread_1", 0), 7)

    other = write_engine(postgres_bench.url)
    async with other.begin() as connection:
        await connection.execute(text("UPDATE branches SET tenant = 'x' WHERE id = 'b'"))
        writing = postgres_bench.submit(both)
        await somebody_waits(postgres_bench.url)
        await connection.execute(text("UPDATE branches SET tenant = 'x' WHERE id = 'a'"))
    await writing
    assert len(tries) == 2
    async with other.connect() as connection:
        found = await connection.execute(text("SELECT tenant, head FROM branches ORDER BY id"))
        assert [tuple(row) for row in found] == [("x", 7), ("x", 7)]
    await other.dispose()


async def somebody_waits(url: str) -> None:
    """Until a statement waits for a lock that another has."""
    engine = read_engine(url)
    async with engine.connect() as connection:
        while not (await connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar_one():
            pass
    await engine.dispose()


async def test_work_waits_for_a_time_and_not_longer(each_database: str, outage: Outage) -> None:
    loop = asyncio.get_running_loop()
    async with at_bench(each_database, patience=0.7) as bench:
        await bench.submit(writes(0))
        async with outage():
            began = loop.time()
            futures = [bench.submit(writes(number), patient=True) for number in (1, 2)]
            assert [await outcome(future) for future in futures] == [StoreUnavailable, StoreUnavailable]
            assert 0.7 <= loop.time() - began < 10
        assert await bench.submit(writes(3), patient=True) == 3
        assert await bench.written() == [0, 3]


async def test_an_outage_fails_requests_and_makes_work_under_way_wait(bench: Bench, outage: Outage) -> None:
    await bench.submit(writes(0))
    async with outage():
        patient = [bench.submit(writes(number), patient=True) for number in (1, 2)]
        request = bench.submit(writes(3))
        with pytest.raises(StoreUnavailable) as caught:
            await request
        assert caught.value.retry_after
        assert not any(future.done() for future in patient)
    assert await asyncio.gather(*patient) == [1, 2]
    assert await bench.written() == [0, 1, 2]


async def test_work_that_waited_goes_before_what_came_later(bench: Bench, outage: Outage) -> None:
    order: list[int] = []

    def noted(number: int) -> Callable[[Batch], None]:
        return lambda batch: order.append(number)

    async with outage():
        first = [bench.submit(noted(number), patient=True) for number in (1, 2)]
        request = bench.submit(refuses)
        await asyncio.sleep(0)  # so that the writer is at them
        later = bench.submit(noted(3), patient=True)
        await outcome(request)
    await asyncio.gather(*first, later, bench.submit(noted(4)))
    assert order == [1, 2, 3, 4]


async def test_a_writer_goes_on_after_an_outage(bench: Bench, outage: Outage) -> None:
    for number in range(2):
        async with outage():
            assert await outcome(bench.submit(writes(number))) is StoreUnavailable
        assert await bench.submit(writes(number)) == number


async def test_a_statement_the_database_refuses_fails_a_request(bench: Bench) -> None:
    broken: Executable = text("INSERT INTO no_such_table (x) VALUES (:x)")
    assert await outcome(bench.submit(lambda batch: batch.add(broken, x=1))) is StoreUnavailable
    assert await bench.submit(writes(1)) == 1


async def test_a_caller_who_leaves_does_not_take_its_unit_back(bench: Bench) -> None:
    future = bench.submit(writes(1))
    future.cancel()
    await bench.submit(writes(2))
    assert await bench.written() == [1, 2]


async def test_a_caller_who_leaves_a_unit_that_fails_is_not_told(bench: Bench) -> None:
    future = bench.submit(refuses)
    future.cancel()
    assert await bench.submit(writes(1)) == 1


async def test_closing_commits_what_is_pending_and_takes_nothing_more(each_database: str) -> None:
    clock: Clock = at_noon
    engine = write_engine(each_database)
    writer = Writer(engine, clock, Bell())
    futures = [writer.submit(Unit(writes(number))) for number in range(3)]
    await writer.close()
    assert [future.result() for future in futures] == [0, 1, 2]
    assert await Bench(engine, writer, each_database, Bell()).written() == [0, 1, 2]
    assert await outcome(writer.submit(Unit(writes(3)))) is StoreUnavailable
    await writer.close()
    await engine.dispose()
