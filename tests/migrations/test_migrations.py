"""The migrations: they make what the tables say, whatever tables there are, and keep the rows, on SQLite and on
PostgreSQL."""

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Column, Connection, LargeBinary, MetaData, inspect, text

from responses_ingress.errors import SettingsError
from responses_ingress.settings import CONFIG
from responses_ingress.store import migrate
from responses_ingress.store.queue import nowhere
from responses_ingress.store.responses import envelope_of, read_journal
from responses_ingress.store.retention import delete_expired
from responses_ingress.store.tables import metadata
from responses_ingress.store.values import Entry
from tests.conftest import run_on, shown
from tests.store.desk import LEASE, Desk, at_desk

ROOT = Path(__file__).parents[2]
SCRIPTS = ScriptDirectory(str(migrate.migrations_folder()))
T = TypeVar("T")
PG_INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()"
_numbers = itertools.count()
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]
BROKEN = """
import sqlalchemy as sa
from alembic import op

revision = "broken"
down_revision = {down!r}

def upgrade():
    op.create_table("half", sa.Column("id", sa.Text(), primary_key=True))
    raise RuntimeError("in the middle")
"""


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/x.db"


@pytest.fixture
async def bare_postgres(postgres: URL) -> AsyncIterator[str]:
    name = f"ingress_bare_{os.getpid()}_{next(_numbers)}"
    await run_on(postgres, f"CREATE DATABASE {name}")
    yield shown(postgres.set(database=name))
    await run_on(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a database without anything in it."""
    found: str = request.getfixturevalue({"sqlite": "file_url", "postgres": "bare_postgres"}[request.param])
    return found


async def on(url: str, work: Callable[..., T], *arguments: Any) -> T:
    async with migrate.transaction(url) as connection:
        return await connection.run_sync(work, *arguments)


def differences(connection: Connection) -> list[Any]:
    found: list[Any] = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)
    return found


def indexes(connection: Connection) -> dict[str, str]:
    """Every index, with all that makes it: autogenerate sees neither which rows a partial one has, nor on SQLite
    that it is partial."""
    lite = connection.dialect.name == "sqlite"
    known = "SELECT name, sql FROM sqlite_master WHERE type = 'index'" if lite else PG_INDEXES
    found = {name: definition for name, definition in connection.exec_driver_sql(known).all() if definition}
    found.pop("alembic_version_pkc", None)
    return found


def made_by_the_tables(connection: Connection) -> dict[str, str]:
    migrate.downgrade(connection, "base")
    metadata.create_all(connection)
    return indexes(connection)


def tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names()) - {"alembic_version"}


def value(column: Column[Any]) -> Any:
    if isinstance(column.type, LargeBinary):
        return b"\x00x"
    return column.type.python_type(1)


def fill(connection: Connection) -> None:
    """One row in every table there is."""
    found = MetaData()
    found.reflect(connection)
    for table in found.sorted_tables:
        if table.name != "alembic_version":
            connection.execute(table.insert(), {column.name: value(column) for column in table.columns})


def rows(connection: Connection) -> dict[str, int]:
    return {name: len(connection.exec_driver_sql(f'SELECT * FROM "{name}"').all()) for name in tables(connection)}


async def test_from_empty_to_head_is_what_the_tables_say(url: str) -> None:
    await migrate.migrate(url)
    assert await on(url, differences) == []
    assert await on(url, tables) == set(metadata.tables)
    found = await on(url, indexes)
    assert len(found) > 10
    assert found == await on(url, made_by_the_tables)


async def test_down_to_base_leaves_nothing_and_up_again_everything(url: str) -> None:
    await migrate.migrate(url)
    await on(url, migrate.downgrade, "base")
    assert await on(url, tables) == set()
    await migrate.migrate(url)
    assert await on(url, differences) == []


@pytest.mark.parametrize("revision", REVISIONS)
async def test_rows_survive_the_way_to_head_and_back(url: str, revision: str) -> None:
    await migrate.migrate(url, revision)
    await on(url, fill)
    before = await on(url, rows)
    await migrate.migrate(url)
    at_head = await on(url, rows)
    assert before.items() <= at_head.items()
    await on(url, migrate.downgrade, revision)
    assert await on(url, rows) == before


THREAD = "thread_" + "a" * 16 + "01" + "b" * 32
CHAIN = "thread_" + "c" * 16 + "00" + "d" * 32
OLD_ROWS = [
    "INSERT INTO threads (id, tenant, key, active_branch, running, lease_until, created_at, updated_at)"
    f" VALUES ('{THREAD}', '', 's', 'branch_s', 'resp_running', 2000, 1000, 1000)",
    "INSERT INTO branches (id, tenant, thread_id, parent_position, head)"
    f" VALUES ('branch_s', '', '{THREAD}', 0, 2), ('branch_c', '', '{CHAIN}', 0, 2)",
    "INSERT INTO items (branch_id, position, tenant, item_id, type, digest, payload) VALUES"
    " ('branch_s', 0, '', 'msg_1', 'message', :bytes, :a), ('branch_s', 1, '', 'msg_2', 'message', :bytes, :b),"
    " ('branch_c', 0, '', 'msg_3', 'message', :bytes, :a), ('branch_c', 1, '', 'msg_4', 'message', :bytes, :b)",
    "INSERT INTO responses (id, tenant, thread_id, branch_id, first, own, output_at, stop, status, model, backend,"
    " background, store, envelope, input, output, owner, lease_until, epoch, created_at) VALUES"
    f" ('resp_ended', '', '{CHAIN}', 'branch_c', 0, 0, 1, 2, 'completed', 'm', 'echo', :no, :yes, :object, NULL, NULL,"
    " NULL, NULL, 1, 1000),"
    f" ('resp_failed', '', '{CHAIN}', NULL, 2, 2, NULL, NULL, 'failed', 'm', 'echo', :no, :yes, :object, :list, :list,"
    " NULL, NULL, 1, 1000),"
    f" ('resp_running', '', '{THREAD}', NULL, 2, 2, NULL, NULL, 'in_progress', 'm', 'echo', :no, :yes, :object, :list,"
    " NULL, 'worker', 2000, 1, 1000)",
    "INSERT INTO journal (response_id, first, tenant, count, payload) VALUES ('resp_running', 0, '', 2, :list)",
]
VALUES = {
    "bytes": b"x",
    "a": b'{"type":"message","content":"a"}',
    "b": b'{"type":"message","content":"b"}',
    "object": b'{"temperature":0.5}',
    "list": b"[]",
    "yes": True,
    "no": False,
}


def insert_old_rows(connection: Connection) -> None:
    """A database as a server of the first revision left it, in the middle of a turn."""
    for statement in OLD_ROWS:
        asked = {name: value for name, value in VALUES.items() if f":{name}" in statement}
        connection.execute(text(statement), asked)


async def test_a_server_goes_on_with_the_rows_of_the_first_revision(url: str) -> None:
    await migrate.migrate(url, "0001")
    await on(url, insert_old_rows)
    await migrate.migrate(url)
    async with at_desk(url) as desk:
        async with desk.database.transaction() as connection:  # nothing of it is lost at once
            assert await delete_expired(connection, time.time() + 29 * 86_400) == 0
        [left] = await desk.claim_left()
        assert (left.id, left.epoch, left.request, left.base) == ("resp_running", 2, None, None)
        async with desk.database.reading() as connection:
            assert await read_journal(connection, left.id) == [Entry(0, 2, b"[]")]
        await desk.end(left.id, nowhere(left), [], ["half"], status="failed", owner=desk.as_owner(left))
        assert await desk.read("branch_s", 2) == ["a", "b"]
        child = await desk.turn(await desk.after("resp_ended"), "c", "d")
        assert await desk.lineage(child) == ["a", "b", "c", "d"]
        async with desk.database.transaction() as connection:
            assert await delete_expired(connection, time.time() + 31 * 86_400) == 4


async def a_server_runs_and_stops(desk: Desk) -> dict[str, str]:
    """What it leaves behind, by what it is."""
    ended_at, unstored_at = desk.chain(), await desk.session()
    ended = await desk.begin(ended_at, envelope=b'{"temperature":0.5}')
    last = Entry(0, 3, b"[]")
    await desk.end(ended, ended_at, ["a"], ["b"], lingers=True, journal=last, echo=b'{"service_tier":"flex"}')
    unstored = await desk.begin(unstored_at, store=False)
    await desk.end(unstored, unstored_at, ["c"], ["d"], store=False, lingers=True, journal=last)
    running = await desk.begin(await desk.session())
    await desk.journal(running, 0)
    return {"ended": ended, "unstored": unstored, "running": running, "waiting": await desk.wait()}


async def test_the_way_back_leaves_what_the_first_revision_knows(url: str) -> None:
    await migrate.migrate(url)
    async with at_desk(url) as desk:
        left = await a_server_runs_and_stops(desk)
    await on(url, migrate.downgrade, "0001")
    names = "SELECT {} FROM {}"
    found = await on(url, lambda c: set(c.exec_driver_sql(names.format("id", "responses")).scalars()))
    assert found == {left["ended"], left["running"]}
    found = await on(url, lambda c: set(c.exec_driver_sql(names.format("response_id", "journal")).scalars()))
    assert found == {left["running"]}
    await migrate.migrate(url)
    async with at_desk(url) as desk:
        envelope = envelope_of(await desk.row(left["ended"]))
        assert (envelope["temperature"], envelope["service_tier"]) == (0.5, "flex")
        assert await desk.lineage(left["ended"]) == ["a", "b"]
        assert await desk.history() == ["c", "d"]
        desk.clock.now += LEASE
        assert [row.id for row in await desk.claim_left()] == [left["running"]]


async def test_several_processes_may_start_on_an_empty_database(url: str) -> None:
    await asyncio.gather(*(migrate.ensure(url, auto=True) for _ in range(4)))
    assert await migrate.is_current(url)


async def test_without_leave_to_migrate_it_says_what_to_run(url: str) -> None:
    with pytest.raises(SettingsError, match="Run: responses-ingress migrate"):
        await migrate.ensure(url, auto=False)
    assert not await migrate.is_current(url)


async def test_a_schema_from_the_future_is_refused(url: str) -> None:
    await migrate.migrate(url)
    await on(url, lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'later'"))
    for attempt in (migrate.is_current(url), migrate.ensure(url, auto=True), migrate.migrate(url)):
        with pytest.raises(SettingsError, match="newer version"):
            await attempt


async def test_a_file_that_is_no_database_is_refused(file_url: str, tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("not a database, " * 100, encoding="utf-8")
    with pytest.raises(SettingsError, match="file is not a database"):
        await migrate.ensure(file_url, auto=True)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A migration behind the newest one that fails half-way."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrate.migrations_folder(), folder)
    (folder / "versions" / "broken.py").write_text(BROKEN.format(down=migrate.head_revision()), encoding="utf-8")
    monkeypatch.setattr(migrate, "migrations_folder", lambda: folder)
    yield


@pytest.mark.usefixtures("broken")
async def test_a_migration_that_fails_leaves_nothing_behind(url: str) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):
        await migrate.migrate(url)
    assert await on(url, tables) == set()


@pytest.mark.parametrize("by", ["file", "environment"])
def test_alembic_in_the_checkout_has_the_servers_settings(tmp_path: Path, file_url: str, by: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f"database_url = 'sqlite:///{tmp_path}/x.db'", encoding="utf-8")
    chosen = ["-x", f"config={config}"] if by == "file" else []
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *chosen, "upgrade", "head"],
        cwd=ROOT,
        env={**os.environ, CONFIG: "" if chosen else str(config)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert asyncio.run(migrate.is_current(file_url))


def test_alembic_reports_a_wrong_setting_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-x", "config=none.toml", "current"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "none.toml cannot be read" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
