"""Engines: what SQLite is set to, and that no two writers ever work on the same state."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from responses_ingress.store import engine as engine_module
from responses_ingress.store.engine import is_sqlite, read_engine, write_engine
from responses_ingress.store.tables import branches
from responses_ingress.store.wake import Bell
from responses_ingress.store.writer import Batch, Unit, Writer

ROOT = Path(__file__).parents[2]
COUNTER = {"id": "b", "tenant": "", "thread_id": "t", "parent_branch": None, "parent_position": 0, "head": 0}
TIMES = 50


async def make_counter(url: str) -> None:
    engine = write_engine(url)
    async with engine.begin() as connection:
        await connection.execute(insert(branches), COUNTER)
    await engine.dispose()


async def counted(url: str) -> int:
    engine = read_engine(url)
    async with engine.connect() as connection:
        head: int = (await connection.execute(select(branches.c.head))).scalar_one()
    await engine.dispose()
    return head


def add_one(batch: Batch) -> None:
    """Read, modify, write: one more at the branch's head."""
    batch.move_head(batch.branches["b"], batch.branches["b"].head + 1)


async def count_up(url: str, times: int) -> None:
    """As one worker does, a transaction for each."""
    engine = write_engine(url)
    writer = Writer(engine, lambda: 0.0, Bell())
    for _ in range(times):
        await writer.submit(Unit(add_one, branches=("b",)))
    await writer.close()
    await engine.dispose()


@pytest.mark.parametrize(
    ("url", "yes"),
    [("sqlite+aiosqlite:///x.db", True), ("sqlite:///x.db", True), ("postgresql+asyncpg://localhost/sqlite", False)],
)
def test_a_url_tells_whether_it_is_sqlite(url: str, yes: bool) -> None:
    assert is_sqlite(url) is yes


@pytest.mark.parametrize("make", [read_engine, write_engine])
@pytest.mark.parametrize(("synchronous", "level"), [("normal", 1), ("full", 2)])
async def test_sqlite_writes_ahead_and_waits_for_other_writers(
    migrated_database: str, make: Callable[[str, str], AsyncEngine], synchronous: str, level: int
) -> None:
    engine = make(migrated_database, synchronous)
    async with engine.connect() as connection:
        found = [
            (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        ]
    await engine.dispose()
    assert found == ["wal", level, 10_000]


async def test_a_writing_transaction_on_sqlite_keeps_others_out_from_its_first_read(migrated_database: str) -> None:
    """Of two that read and then write, the second reads what the first wrote. The driver's default would
    let both read the same and lose one."""
    await make_counter(migrated_database)
    engines = [write_engine(migrated_database) for _ in range(2)]
    both_have_read = asyncio.Barrier(2)

    async def add(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            head = (await connection.execute(select(branches.c.head))).scalar_one()
            try:
                async with asyncio.timeout(0.2):
                    await both_have_read.wait()
            except (TimeoutError, asyncio.BrokenBarrierError):
                pass  # as it should be: the other is kept waiting
            await connection.execute(update(branches).values(head=head + 1))

    await asyncio.gather(*map(add, engines))
    for engine in engines:
        await engine.dispose()
    assert await counted(migrated_database) == 2


async def test_two_writers_count_without_losing_one(each_database: str) -> None:
    await make_counter(each_database)
    await asyncio.gather(count_up(each_database, TIMES), count_up(each_database, TIMES))
    assert await counted(each_database) == 2 * TIMES


async def test_two_processes_count_without_losing_one(each_database: str) -> None:
    await make_counter(each_database)
    code = "import asyncio, sys; from tests.store.test_engine import count_up, TIMES"
    code += "; asyncio.run(count_up(sys.argv[1], TIMES))"
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", code, each_database, cwd=ROOT) for _ in range(2)
    ]
    assert [await process.wait() for process in processes] == [0, 0]
    assert await counted(each_database) == 2 * TIMES


async def test_a_reader_is_in_no_transaction(each_database: str) -> None:
    """So it holds back neither writers nor the clean-up of what is old."""
    engine = read_engine(each_database)
    async with engine.connect() as connection:
        await connection.execute(select(branches))
        await make_counter(each_database)
        assert (await connection.execute(select(branches.c.head))).scalar_one() == 0
        if is_sqlite(each_database):
            busy, _, _ = (await connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))).one()
            assert busy == 0
        else:
            other = await engine.connect()
            me = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            asked = text("SELECT state FROM pg_stat_activity WHERE pid = :pid")
            assert (await other.execute(asked, {"pid": me})).scalar_one() == "idle"
            await other.close()
    await engine.dispose()


async def test_more_readers_than_connections_take_turns(each_database: str) -> None:
    engine = read_engine(each_database)

    async def read() -> int:
        async with engine.connect() as connection:
            return int((await connection.execute(text("SELECT 1"))).scalar_one())

    assert await asyncio.gather(*(read() for _ in range(40))) == [1] * 40
    await engine.dispose()


@pytest.mark.parametrize("make", [read_engine, write_engine])
@pytest.mark.parametrize("rest", [0.0, 3600.0])
async def test_a_connection_lost_while_nobody_used_it_is_replaced(
    make: Callable[[str], AsyncEngine], rest: float, postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody has heard of its end: one that has rested is tried."""
    monkeypatch.setattr(engine_module, "_REST", rest)
    engine = make(postgres_database)
    async with engine.connect() as connection:
        backend = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        driver: Any = (await connection.get_raw_connection()).driver_connection
    killer = write_engine(postgres_database)
    async with killer.begin() as connection:
        await connection.execute(text(f"SELECT pg_terminate_backend({backend}, 10000)"))
    while rest and not driver.is_closed():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one() != backend
    await engine.dispose()
    await killer.dispose()
