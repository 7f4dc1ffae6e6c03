"""What is asked again and again finds its rows by an index, however many ended responses there are."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from responses_ingress.store.engine import is_sqlite, write_engine
from responses_ingress.store.history import find_items
from responses_ingress.store.queue import asked_of, claim_left_behind, claim_queued, is_any_due, renew_leases
from responses_ingress.store.responses import find_response, has_journal, read_journal
from responses_ingress.store.retention import delete_expired, delete_idle_threads, delete_response, drop_journals
from responses_ingress.store.values import Owner
from responses_ingress.store.writer import _LEASES, _PREAMBLES, _QUEUED, _REPEATS, _THREADS

MANY, FEW = 30_000, 60
OWNER = Owner("w1", 1, 30)
SERIES = "(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {0}) SELECT n FROM s) AS s"
COMMON = "tenant, thread_id, first, own, model, backend, background, store, envelope, epoch, created_at"
VALUES = "'t' || (n % 5), 'thread_' || n, 0, 2, 'm', 'echo', true, true, {bytes}, 1, 1000"
FILL = [
    f"INSERT INTO responses ({COMMON}, id, status, base, branch_id, output_at, stop, previous_response_id, preamble,"
    " expires_at, journal_until, retry_key)"
    f" SELECT {VALUES}, 'resp_' || n, 'completed', 'branch_' || n, 'branch_' || n, 1, 2, 'resp_' || (n - 1),"
    " {digest}, 1000000 + n, CASE WHEN n % 10 = 0 THEN 1000 + n END, CASE WHEN n % 10 = 0 THEN {digest} END"
    " FROM {many}",
    f"INSERT INTO responses ({COMMON}, id, status, base, previous_response_id, lease_until, owner, asked)"
    f" SELECT {VALUES}, 'run_' || n, CASE WHEN n % 2 = 0 THEN 'queued' ELSE 'in_progress' END, 'branch_' || n,"
    " 'resp_' || (n - 1), 500 + n, 'w' || (n % 3), CASE WHEN n % 7 = 0 THEN 'yield' END FROM {few}",
    "INSERT INTO branches (id, tenant, thread_id, parent_branch, parent_position, head)"
    " SELECT 'branch_' || n, 't', 'thread_' || n, CASE WHEN n % 3 = 0 THEN 'branch_' || (n - 1) END, 0, 2 FROM {many}",
    "INSERT INTO threads (id, tenant, key, active_branch, lease_until, created_at, updated_at)"
    " SELECT 'thread_' || n, 't', 'k' || n, 'branch_' || n, 0, 0, n FROM {many}",
    "INSERT INTO items (branch_id, position, tenant, item_id, type, digest, payload)"
    " SELECT 'branch_' || n, 0, 't', 'item_' || n, 'message', {bytes}, {bytes} FROM {many}",
    "INSERT INTO items (branch_id, position, tenant, item_id, type, digest, payload)"
    " SELECT 'copies_' || n, n % 100, 't' || (n % 2), 'copied', 'message', {bytes}, {bytes} FROM {many}",
    "INSERT INTO journal (response_id, first, tenant, count, payload)"
    " SELECT 'resp_' || n, 0, 't', 1, {bytes} FROM {many}",
    "INSERT INTO preambles (tenant, digest, payload) SELECT 't' || (n % 5), {digest}, {bytes} FROM {many}",
]

Work = Callable[[AsyncConnection], Awaitable[Any]]
ASKED: dict[str, Work] = {
    "is_any_due": lambda c: is_any_due(c, 530.0),
    "claim_queued": lambda c: claim_queued(c, OWNER, 530.0, 10),
    "claim_left_behind": lambda c: claim_left_behind(c, OWNER, 530.0),
    "asked_of": lambda c: asked_of(c, OWNER.name),
    "renew_leases": lambda c: renew_leases(c, OWNER.name, {"run_1": "thread_1", "run_4": "thread_4"}, 900.0),
    "delete_expired": lambda c: delete_expired(c, 1_000_000.0 + 20),
    "drop_journals": lambda c: drop_journals(c, 1_200.0),
    "delete_idle_threads": lambda c: delete_idle_threads(c, 20.0),
    "delete_response": lambda c: delete_response(c, "t1", "resp_1", 1.0),
    "find_response": lambda c: find_response(c, "t1", "resp_1", 1.0),
    "find_items": lambda c: find_items(c, "t1", ["copied", "item_1"]),
    "has_journal": lambda c: has_journal(c, "resp_1"),
    "read_journal": lambda c: read_journal(c, "resp_1"),
    "a batch's leases": lambda c: c.execute(_LEASES, {"ids": ["resp_1", "run_1"]}),
    "a batch's threads": lambda c: c.execute(_THREADS, {"ids": ["thread_1", "thread_2"]}),
    "a batch's preambles": lambda c: c.execute(_PREAMBLES, {"tenants": ["t1", "t2"], "digests": [b"digest 1"]}),
    "a batch's repeats": lambda c: c.execute(_REPEATS, {"ids": [b"digest 10", b"digest 20"]}),
    "the length of the queue": lambda c: c.execute(_QUEUED),
}
LARGE = ("responses", "branches", "threads", "items", "journal", "preambles")


@pytest.fixture
async def engine(each_database: str) -> AsyncIterator[AsyncEngine]:
    """A database with many ended responses and a few that run or wait."""
    engine = write_engine(each_database)
    lite = is_sqlite(each_database)
    words = {
        "many": SERIES.format(MANY),
        "few": SERIES.format(FEW),
        "bytes": "zeroblob(300)" if lite else "convert_to(repeat('x', 300), 'UTF8')",
        "digest": "CAST('digest ' || n AS BLOB)" if lite else "convert_to('digest ' || n, 'UTF8')",
    }
    async with engine.begin() as connection:
        for statement in FILL:
            await connection.exec_driver_sql(statement.format(**words))
    async with engine.begin() as connection:
        await connection.exec_driver_sql("ANALYZE")
    yield engine
    await engine.dispose()


async def test_what_is_asked_often_reads_no_table_from_end_to_end(engine: AsyncEngine) -> None:
    for name, work in ASKED.items():
        plans = await plans_of(engine, work)
        assert plans
        for plan in plans:
            assert not any(scan in plan for scan in whole_tables(engine)), f"{name}: {plan}"


async def test_of_an_item_the_last_of_many_copies_is_found_by_the_index_alone(engine: AsyncEngine) -> None:
    [plan] = await plans_of(engine, ASKED["find_items"])
    assert "ix_items_tenant_item_id" in plan
    assert not any(sorted in plan for sorted in ("Sort", "TEMP B-TREE", "Bitmap")), plan


async def plans_of(engine: AsyncEngine, work: Work) -> list[str]:
    """The plans of the statements that the work runs."""
    seen: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        seen.append((statement, parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    async with engine.begin() as connection:
        await work(connection)
        await connection.rollback()
    event.remove(engine.sync_engine, "before_cursor_execute", note)
    return [await explained(engine, *one) for one in seen if not one[0].startswith("BEGIN")]


def whole_tables(engine: AsyncEngine) -> list[str]:
    """How a plan tells that a table is read from end to end."""
    if engine.dialect.name == "sqlite":
        return [f"SCAN {table}\n" for table in LARGE]
    return [f"Seq Scan on {table}" for table in LARGE]


async def explained(engine: AsyncEngine, statement: str, parameters: Any) -> str:
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    async with engine.begin() as connection:
        found = await connection.exec_driver_sql(explain + statement, parameters)
        return statement + "\n" + "".join(f"{row[-1]}\n" for row in found)
